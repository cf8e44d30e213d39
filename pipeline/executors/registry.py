"""All kinds of executors, by their names in `run.mode`."""

from __future__ import annotations

from typing import Any

from pipeline.config import RUN_MODES, Config
from pipeline.context import RunContext
from pipeline.executors.base import Executor
from pipeline.executors.batch.executor import BatchExecutor
from pipeline.executors.live.executor import LiveExecutor

# A kind of executor that is added here can be named by `run.mode`.
EXECUTORS: dict[str, type[Executor]] = {"live": LiveExecutor, "batch": BatchExecutor}
RUN_MODES[:] = EXECUTORS


def register(mode: str, kind: type[Executor]) -> None:
    """Adds a kind of executor from outside of this package, such as one of a test."""
    EXECUTORS[mode] = kind
    RUN_MODES.append(mode)


def unregister(mode: str) -> None:
    del EXECUTORS[mode]
    RUN_MODES.remove(mode)


def executor_of(config: Config) -> type[Executor]:
    """The kind of the first executor of a run."""
    return EXECUTORS[config.run.mode]


def executors_for(context: RunContext) -> list[Executor]:
    """The executors of a run, in order. Each takes the rows that the ones before it left; they are closed with the run."""
    mode = context.config.run.mode
    executors = []
    for name in (mode, *EXECUTORS[mode].followed_by(context.config)):
        executor = EXECUTORS[name](context)
        context.stack.callback(executor.close)
        executors.append(executor)
    return executors


def clear(context: RunContext) -> None:
    """Removes what executors of all kinds keep in the output."""
    for kind in EXECUTORS.values():
        kind.clear(context)


def manifest_entries(context: RunContext) -> dict[str, Any]:
    """The entries of the manifest that executors of all kinds add."""
    entries: dict[str, Any] = {}
    for kind in EXECUTORS.values():
        entries |= kind.manifest_entries(context)
    return entries
