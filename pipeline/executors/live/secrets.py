"""Environment variables that a worker needs from the driver."""

from __future__ import annotations

import os
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Secrets:
    """Environment variables that the driver has and a worker on another node may lack. Sent in a call, which Ray keeps
    nowhere, never in an actor's constructor or a runtime environment, which its metadata show."""

    values: dict[str, str] = field(repr=False)


def settle_environment(secrets: Secrets, cpus: float) -> None:
    """What an engine is to find in its process's environment."""
    for name, value in secrets.values.items():
        os.environ.setdefault(name, value)
    # Ray pins OpenMP to one thread for actors that reserve no CPU; an engine wants what it was given.
    if cpus >= 1:
        os.environ["OMP_NUM_THREADS"] = str(int(cpus))
    else:
        os.environ.pop("OMP_NUM_THREADS", None)
