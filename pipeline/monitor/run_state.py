"""The state of a run in a small file in its output directory, for other processes such as `eagleray status`."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from typing import Any

import orjson
import pyarrow.fs as pafs

from engines.errors import EaglerayError
from engines.text import one_line
from pipeline.config import Config, without_secrets
from pipeline.monitor.status import RunStatus
from pipeline.storage.filesystem import write_atomic
from pipeline.storage.output_files import STATE
from pipeline.storage.retry import patiently

EVERY_S = 10.0
# Rates are computed over this many samples: the last minute.
SAMPLES = 7


@dataclass(slots=True)
class RunState:
    """The state that the driver publishes. The driver sets the fields, and a thread writes them to the store every 10 s."""

    fs: pafs.FileSystem
    path: str
    config: dict[str, Any]
    status: RunStatus = field(default_factory=RunStatus)
    source: Callable[[], RunStatus] | None = None  # if set, replaces `status`
    phase: str = "starting"
    began: float = field(default_factory=time.time)  # `status` counts from this time on
    started: float = field(default_factory=time.time)
    ended: str | None = None  # the reason, if the run stopped before its end
    recent: deque[tuple[float, int, int, int]] = field(default_factory=lambda: deque(maxlen=SAMPLES))

    def enter(self, phase: str) -> None:
        """Notes that the run enters `phase`."""
        self.phase = phase
        if phase == "asking":  # the counts start again
            self.began, self.status = time.time(), RunStatus()
            self.recent = deque([(self.began, 0, 0, 0)], SAMPLES)

    def write(self) -> None:
        """Writes the state. A failure only skips this write; it never stops the run."""
        with suppress(Exception):  # such as a counter that grew while it was copied, or an unavailable store
            status, now = self.source() if self.source else self.status, time.time()
            self.recent.append((now, status.done + status.failed, status.input_tokens, status.output_tokens))
            values = {
                "phase": self.phase, "ended": self.ended, "pid": os.getpid(), "host": socket.gethostname(),
                "started_at": self.started, "began_at": self.began, "beat_at": now,
                "status": {f.name: getattr(status, f.name) for f in fields(status)},  # `asdict` breaks a Counter
                "recent": list(self.recent), "config": self.config,
            }  # fmt: skip
            write_atomic(self.fs, self.path, orjson.dumps(values))


@contextmanager
def keep_run_state(config: Config, fs: pafs.FileSystem, root: str) -> Iterator[RunState]:
    """Keeps `_run.json` up to date during a run. A run that reaches its end removes the file, because the manifest has its
    content then. A run that stops early writes the reason into it. A killed run leaves the last state."""
    state = RunState(fs, f"{root}/{STATE}", without_secrets(config))
    stop = threading.Event()

    def keep_writing() -> None:
        state.write()
        while not stop.wait(EVERY_S):
            state.write()

    thread = threading.Thread(target=keep_writing, name="state", daemon=True)
    thread.start()
    try:
        yield state
    except BaseException as error:
        # The text of an unexpected exception may contain anything, such as a row. The texts of our errors do not.
        state.ended = one_line(error) if isinstance(error, EaglerayError) else type(error).__name__
        raise
    finally:
        stop.set()
        thread.join()
        if state.ended is not None:
            state.write()
        else:
            with suppress(OSError):
                patiently(lambda: fs.delete_file(state.path))
