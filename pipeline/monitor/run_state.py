"""The state of a run in a small file in its output directory, for other processes such as `eagleray status`."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from typing import Any

import orjson
import pyarrow.fs as pafs

from engines.errors import EaglerayError
from engines.text import one_line
from pipeline.config import Config, hidden_keys, without_secrets
from pipeline.errors import Stopped
from pipeline.monitor.status import SUMS, RunStatus
from pipeline.storage.filesystem import remove, write_atomic
from pipeline.storage.output_files import STATE

EVERY_S = 10.0
# The phase in which an executor sends requests, as `_run.json` has it.
ASKING = "asking"
# Rates are computed over this many samples: the last minute.
SAMPLES = 7


@dataclass(slots=True)
class RunState:
    """The state that the driver publishes. The driver sets the fields, and a thread writes them to the store every 10 s."""

    fs: pafs.FileSystem
    path: str
    config: dict[str, Any]  # without secrets
    hidden: list[str] = field(default_factory=list)  # the keys of the secrets
    origin: dict[str, Any] = field(default_factory=dict)  # the entries of `Origin`
    status: RunStatus = field(default_factory=RunStatus)
    source: Callable[[], RunStatus] | None = None  # if set, replaces `status`
    earlier: RunStatus = field(default_factory=RunStatus)  # the sums of the executors and passes before this one
    phase: str = "starting"
    began: float = field(default_factory=time.time)  # `status` counts from this time on
    started: float = field(default_factory=time.time)
    ended: str | None = None  # the reason, if the run stopped before its end
    recent: deque[tuple[float, int, int, int]] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    lock: threading.Lock = field(default_factory=threading.Lock)  # an older state must not be written after a newer one

    def enter(self, phase: str) -> None:
        """Notes that the run enters `phase`, a text for people."""
        self.phase = phase

    def begin_pass(self, since: float | None = None) -> None:
        """An executor sends requests, since now or since `since` (seconds since the epoch). Its counts start from zero: it
        sets `status` or `source` after this call.

        If the run is killed, `eagleray status` counts the results in the ledger from that time on.
        """
        self.phase = ASKING
        self.earlier.add(self._of_pass())
        now = time.time()
        self.began, self.status, self.source = now if since is None else since, RunStatus(), None
        self.recent = deque([(now, 0, 0, 0)], SAMPLES)

    @property
    def now(self) -> RunStatus:
        """The status of the whole run at this moment."""
        return self._of_pass().plus(self.earlier)

    def _of_pass(self) -> RunStatus:
        return self.source() if self.source else self.status

    def write(self) -> None:
        """Writes the state. A failure only skips this write; it never stops the run."""
        with self.lock, suppress(Exception):  # such as a counter that grew while it was copied, or an unavailable store
            status, now = self._of_pass(), time.time()
            rows = status.rows_done + status.rows_failed
            self.recent.append((now, rows, status.input_tokens, status.output_tokens))
            values = {
                "phase": self.phase, "ended": self.ended, "pid": os.getpid(), "host": socket.gethostname(),
                "started_at": self.started, "began_at": self.began, "beat_at": now,
                # The status of this pass and the sums of the passes before it. `asdict` is not used: it breaks a Counter.
                "status": {f.name: getattr(status, f.name) for f in fields(status) if f.name != "problems"},
                "earlier": {name: getattr(self.earlier, name) for name in SUMS},
                "replica_problems": self.now.problems,
                "recent": list(self.recent), "config": self.config, "hidden_keys": self.hidden,
                **self.origin,
            }  # fmt: skip
            write_atomic(self.fs, self.path, orjson.dumps(values))


@contextmanager
def keep_run_state(
    config: Config, fs: pafs.FileSystem, root: str, origin: Mapping[str, Any] | None = None
) -> Iterator[RunState]:
    """Keeps `_run.json` up to date during a run. A run that reaches its end removes the file, because the manifest has its
    content then. A run that stops early writes the reason into it. A killed run leaves the last state."""
    state = RunState(fs, f"{root}/{STATE}", without_secrets(config), hidden_keys(config), dict(origin or {}))
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
            with suppress(OSError, Stopped):  # another run may have taken over the output, and this file
                remove(fs, state.path)
