"""Environment variables that a worker needs from the driver."""

from __future__ import annotations

import os
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Secrets:
    """Environment variables of the driver that a worker on another node may lack. They are sent in a method call, which Ray
    does not store. An actor's constructor or a runtime environment would show them in Ray's metadata."""

    values: dict[str, str] = field(repr=False)


def settle_environment(secrets: Secrets, cpus: float) -> None:
    """Sets the environment that the engine finds in this process."""
    for name, value in secrets.values.items():
        os.environ.setdefault(name, value)
    # Ray limits OpenMP to one thread in actors that reserve no CPU. An engine should use all it was given.
    if cpus >= 1:
        os.environ["OMP_NUM_THREADS"] = str(int(cpus))
    else:
        os.environ.pop("OMP_NUM_THREADS", None)
