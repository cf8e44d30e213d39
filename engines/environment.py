"""Environment variables, of this process for a while and of processes that it starts."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping


@contextlib.contextmanager
def changed_environment(wanted: Mapping[str, str | None]) -> Iterator[None]:
    """Inside, this process has these variables, and lacks those that are None. Processes that it starts inherit that.

    All other variables stay untouched, because other threads may read them.
    """
    before = {name: os.environ.get(name) for name in wanted}
    try:
        _set(wanted)
        yield
    finally:
        _set(before)


def module_path() -> dict[str, str]:
    """Variables with which another Python finds the modules that this one finds, and none in its working directory."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
