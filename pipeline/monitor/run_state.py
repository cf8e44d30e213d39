"""How a run stands, in one small file in its output directory, for whoever looks at it from another process."""

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
# What "lately" means for rates: the last minute.
SAMPLES = 7


@dataclass(slots=True)
class RunState:
    """What the driver tells: it sets the fields, a thread writes them down every 10 s, on object stores as well."""

    fs: pafs.FileSystem
    path: str
    config: dict[str, Any]
    status: RunStatus = field(default_factory=RunStatus)
    source: Callable[[], RunStatus] | None = None  # where there is one, it is asked instead
    phase: str = "starting"
    began: float = field(default_factory=time.time)  # `status` counts from here on; what came before is in `answered`
    started: float = field(default_factory=time.time)
    ended: str | None = None  # why, of a run that did not come to its end
    recent: deque[tuple[float, int, int, int]] = field(default_factory=lambda: deque(maxlen=SAMPLES))

    def enter(self, phase: str) -> None:
        """The run has come to `phase`."""
        self.phase = phase
        if phase == "asking":  # counts begin anew
            self.began, self.status = time.time(), RunStatus()
            self.recent = deque([(self.began, 0, 0, 0)], SAMPLES)

    def write(self) -> None:
        """Writes it down. A store that is away costs this beat, never the run."""
        with suppress(Exception):  # a counter that grew while it was copied, a store that is away: no run ends for this
            status, now = self.source() if self.source else self.status, time.time()
            self.recent.append((now, status.done + status.failed, status.input_tokens, status.output_tokens))
            values = {
                "phase": self.phase, "ended": self.ended, "pid": os.getpid(), "host": socket.gethostname(),
                "started_at": self.started, "began_at": self.began, "beat_at": now,
                "status": {f.name: getattr(status, f.name) for f in fields(status)},  # asdict makes nonsense of a Counter
                "recent": list(self.recent), "config": self.config,
            }  # fmt: skip
            write_atomic(self.fs, self.path, orjson.dumps(values))


@contextmanager
def keep_run_state(config: Config, fs: pafs.FileSystem, root: str) -> Iterator[RunState]:
    """Keeps `_run.json` while a run goes on. A run that reaches its end removes it: then the manifest says everything.
    One that stops leaves it with the reason; one that is killed leaves it as it was."""
    state = RunState(fs, f"{root}/{STATE}", without_secrets(config))
    stop = threading.Event()

    def keep() -> None:
        state.write()
        while not stop.wait(EVERY_S):
            state.write()

    keeper = threading.Thread(target=keep, name="state", daemon=True)
    keeper.start()
    try:
        yield state
    except BaseException as error:
        # What a bug says may hold anything; ours are written to be read.
        state.ended = one_line(error) if isinstance(error, EaglerayError) else type(error).__name__
        raise
    finally:
        stop.set()
        keeper.join()
        if state.ended is not None:
            state.write()
        else:
            with suppress(OSError):
                patiently(lambda: fs.delete_file(state.path))
