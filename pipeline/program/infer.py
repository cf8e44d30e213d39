"""A whole run from a Python program, with the keys, checks, output and errors of `eagleray infer`."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from engines.errors import ConfigError, EaglerayError
from pipeline.errors import Interrupted, Stopped

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.config import Config
    from pipeline.dataset.spool import Spool
    from pipeline.origin import Origin
    from pipeline.program.result import Result

# One run at a time in this process: the first one would end the Ray of the second.
_ONE_RUN = threading.Lock()


def infer(
    dataset: Any = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    /,
    *,
    output: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    config_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **keys: Any,
) -> Result:
    """Sends every row of a dataset to a model, and returns when each of them has a result.

        result = infer([{"prompt": "Hello"}], engine="openai", output="out", generation={"max_tokens": 100})

    `dataset` is a path, a list of paths, a pyarrow table, a frame of pandas or Polars, anything else that exports Arrow, or
    an iterable of dicts or `Conversation`s. Rows that are not in a file are written into the output once.
    `config` is the path of a run file, or a mapping of keys: `{"engine": "openai", "generation": {"max_tokens": 5}}` or
    `{"generation.max_tokens": 5}`. Keyword arguments are keys too, and replace those of `config`.
    `output` is the output directory. A call with the same dataset and output continues: it sends only what has no answer.

    Ctrl-C, or the notebook's stop button, waits for the requests in flight. A second one ends the call at once. If Ray runs
    in this process, or RAY_ADDRESS is set, the run uses this Ray; otherwise it starts Ray and ends it.

    Failed rows raise nothing: see `Result.errors`. Raises `ConfigError` for a wrong configuration, `Stopped` if the run
    stopped early, and `Interrupted`. After the last two, all durable results are kept, and the next call continues.
    """
    from pipeline.program.keys import GivenKeys, paths_of

    if dataset is None and not isinstance(keys.get("dataset"), Mapping):
        dataset = keys.pop("dataset", None)
    given = GivenKeys.of(keys.pop("config", None) if config is None else config, config_dir)
    given.add(keys)
    given.add({"output": output} if isinstance(output, Mapping) else {"output.path": output} if output is not None else {})
    paths = paths_of(dataset)
    if paths is not None:
        given.add({"dataset.path": paths})
    composed = given.compose()
    console = _console(progress)
    if dataset is None or paths is not None:
        return _run(composed.config, console, given.origin)
    return _run_rows(dataset, composed.config, console, given.origin)


def _run_rows(rows: Any, config: Config, console: Console, origin: Origin) -> Result:
    """Runs over rows that are not in a file. Nothing is written into the output of a wrong configuration."""
    from pipeline.dataset.spool import spooled

    config.dataset.path = "rows"  # until they are written
    config.check()
    with spooled(rows) as spool:
        if config.run.dry_run:
            config.dataset.path = spool.path
            return _run(config, console, origin)
        copied = _place(spool, config)
        try:
            return _run(config, console, origin)
        except ConfigError:
            if copied:
                spool.remove(str(config.output.path))
            raise


def _place(spool: Spool, config: Config) -> bool:
    """Copies the rows into the output, if it may be written into. Returns False if they are there already."""
    from pipeline.output.ownership import Ownership
    from pipeline.storage.filesystem import resolve

    output = str(config.output.path)
    config.dataset.path = spool.target(output)
    Ownership.look(config, *resolve(output))
    return spool.place(output)


def _run(config: Config, console: Console, origin: Origin) -> Result:
    from pipeline.program.result import Result
    from pipeline.run import run

    try:
        with _ONE_RUN, _same_signal_handlers(), _transient(console):
            outcome = run(config, console, origin=origin, in_program=True)
    except Stopped as stop:
        changes = " and ".join(f"{name}={value}" for name, value in stop.changes.items())
        _add_note(stop, f" with {changes}" if changes else "")
        raise
    except Interrupted as interrupt:
        _add_note(interrupt, "")
        raise
    return Result(str(config.output.path), outcome.manifest)


def _add_note(error: EaglerayError, changes: str) -> None:
    error.add_note(f"To continue, call infer again with the same dataset and output{changes}.")


def _console(progress: bool) -> Console:
    from rich.console import Console

    from pipeline.monitor.notebook import NotebookConsole

    console = Console(stderr=True, quiet=not progress)
    return NotebookConsole() if progress and console.is_jupyter else console


@contextlib.contextmanager
def _transient(console: Console) -> Iterator[None]:
    """Removes the progress line of a notebook at the end."""
    from pipeline.monitor.notebook import NotebookConsole

    try:
        yield
    finally:
        if isinstance(console, NotebookConsole):
            console.show_line("")


@contextlib.contextmanager
def _same_signal_handlers() -> Iterator[None]:
    """Ray replaces handlers of signals; the program gets its own ones back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: a handler that was not set from Python
                signal.signal(number, handler)
