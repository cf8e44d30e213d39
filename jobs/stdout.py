"""Results to standard output (`output.path=-`): one JSON line for each row, in input order, when the run is complete.

The run has a temporary directory as its output. It is removed when all lines are written, and kept if the run stops early.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from engines.errors import ConfigError
from pipeline.config import STDOUT, Config
from pipeline.errors import Interrupted, Stopped

if TYPE_CHECKING:
    from rich.console import Console


def run_to_stdout(config: Config, console: Console) -> int:
    """Runs the main job and writes its rows to standard output. Returns the exit status."""
    from jobs.outcome import warn_if_empty
    from pipeline.output.summary import lines
    from pipeline.run import run
    from pipeline.storage.output_files import DATA, SEGMENTS

    _check(config)
    folder = tempfile.mkdtemp(prefix="eagleray-stdout-")
    config.output.path, config.output.format = folder, "jsonl"
    changes = {"output.path": folder, "output.format": "jsonl"}
    keep = False
    try:
        with _own_stdout() as stdout:
            outcome = run(config, console)
            if outcome.manifest:
                warn_if_empty(outcome.manifest, console)
                for line in lines(outcome.manifest):
                    console.print(line, highlight=False)
            try:
                for part in sorted(Path(folder, DATA).glob("*.jsonl")):
                    with part.open("rb") as file:
                        shutil.copyfileobj(file, stdout)
                stdout.flush()
            except BrokenPipeError:
                keep = True
                console.print(
                    f"The reader closed standard output. All rows are in {folder}/{DATA}.", highlight=False, soft_wrap=True
                )
            except OSError as error:
                text = f"cannot write to standard output ({error.strerror}): all rows are in {folder}/{DATA}"
                raise Stopped(text, changes) from None
        return outcome.exit_status
    except (Stopped, Interrupted) as stop:
        keep = True
        stop.changes.update(changes)
        raise
    finally:
        # Answers are never removed before they are written.
        done = sys.exc_info()[0] is None
        if not keep and (done or not any(Path(folder, SEGMENTS).glob("*.parquet"))):
            shutil.rmtree(folder, ignore_errors=True)
        elif not keep:
            console.print(f"The answers so far are in {folder}.", highlight=False, soft_wrap=True)


def _check(config: Config) -> None:
    """Raises `ConfigError` if the run may have several machines: they do not share a temporary directory."""
    if "RAY_ADDRESS" in os.environ or config.run.mode != "live":
        what = "the Ray cluster at RAY_ADDRESS" if "RAY_ADDRESS" in os.environ else f"run.mode={config.run.mode}"
        text = f"output.path={STDOUT} is for small runs on this machine; with {what}, name a directory or a URL"
        raise ConfigError(text, key="output.path")


@contextlib.contextmanager
def _own_stdout() -> Iterator[BinaryIO]:
    """Yields standard output for the rows alone. Inside, everything else that is printed there goes to standard error."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    stdout = os.fdopen(own, "wb")
    try:
        yield stdout
    finally:
        sys.stdout.flush()
        os.dup2(own, 1)
        with contextlib.suppress(OSError):  # the caller has seen it at `flush`
            stdout.close()
