"""Measures an engine with some keys changed. Each replica is a process that lives for one measurement."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import IO, Any

from engines.environment import module_path
from engines.errors import ConfigError
from engines.text import flattened
from engines.trial import Trial
from engines.tuning import Option
from engines.types import Request
from pipeline.config import Config, cleaned
from pipeline.executors.live.placement import placement

WARM_UP_ROWS = 4
END_S = 15.0  # for a process to end and free its memory


@dataclass(slots=True)
class Measured:
    """The result of one measurement. `error` says why there is none, on one line."""

    changes: Option
    role: str = "try"  # baseline, try or confirm
    rows: int = 0
    failed: int = 0
    seconds: float = 0.0  # of all rows
    load_s: float = 0.0
    input: int = 0  # tokens
    output: int = 0
    cost_usd: float | None = 0.0
    error: str | None = None
    is_cut: bool = False  # stopped, because it is slower than the best

    @property
    def rate(self) -> float:
        """Input and output tokens a second (rows a second, if the engine counts no tokens). Unlike rows a second, it does
        not depend on the length of sampled answers."""
        return (self.input + self.output or self.rows) / self.seconds if self.seconds else 0.0


def with_changes(config: Config, changes: Option) -> Config:
    """The configuration with these dotted keys changed."""
    changed = copy.deepcopy(config)
    for name, value in changes.items():
        *path, last = name.split(".")
        inside: Any = changed
        for part in path:
            inside = inside[part] if isinstance(inside, dict) else getattr(inside, part)
        if isinstance(inside, dict):
            inside[last] = value
        else:
            setattr(inside, last, value)
    return changed


def local_replicas(config: Config, gpus: int) -> tuple[int, int]:
    """The replicas that work on this machine at once, and the GPUs of each. One replica, unless there are several GPUs."""
    if gpus < 2:
        return 1, gpus
    placed = placement(config.hardware, config.engine)
    each = max(1, int(sum(bundle.get("GPU", 0) for bundle in placed.bundles)))
    return max(1, min(placed.high, gpus // each)), each


def usable_gpus(config: Config) -> list[str]:
    """The names of this machine's GPUs, as `CUDA_VISIBLE_DEVICES` has them; none if replicas reserve no GPU."""
    if not any(bundle.get("GPU") for bundle in placement(config.hardware, config.engine).bundles):
        return []
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in given.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(at) for at, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


@dataclass(slots=True)
class Trials:
    """Measures a configuration with changes, over the same rows each time."""

    config: Config
    requests: list[Request]
    warm_up: list[Request]
    gpus: list[str] = field(default_factory=list)

    def measure(self, changes: Option, limit_s: float, load_limit_s: float) -> Measured:
        """Raises nothing that the engine causes: an engine that cannot load, or dies, is a result with `error`."""
        result = Measured(dict(changes))
        try:
            config = with_changes(self.config, changes)
            config.check(runs=False)
            count, each = local_replicas(config, len(self.gpus))
            count = min(count, len(self.requests))  # each one has a row
        except ConfigError as error:
            result.error = flattened(str(error))
            return result
        with contextlib.ExitStack() as stack:
            replicas = [
                stack.enter_context(_replica(self._trial(config, at, count, limit_s), self._environment(config, at, each)))
                for at in range(count)
            ]
            until = time.monotonic() + load_limit_s
            ready = [replica.line(until, "load") for replica in replicas]
            result.error = _first(ready, "error")
            if result.error:
                return result
            result.load_s = max(line["load_s"] for line in ready)
            for replica in replicas:
                replica.begin()
            until = time.monotonic() + limit_s + END_S
            return _summed(result, [replica.line(until, "answer the rows") for replica in replicas], len(self.requests))

    def _trial(self, config: Config, at: int, count: int, limit_s: float) -> Trial:
        engine = replace(config.engine, fallback=[])
        return Trial(engine, self.requests[at::count], self.warm_up[at::count], limit_s)

    def _environment(self, config: Config, at: int, each: int) -> dict[str, str]:
        """As a worker has it (`settle_environment`), with its own GPUs."""
        environment = {**os.environ, **module_path()}
        environment.pop("OMP_NUM_THREADS", None)
        if config.hardware.cpus >= 1:
            environment["OMP_NUM_THREADS"] = str(int(config.hardware.cpus))
        # Ray hides the GPUs from a worker that reserves none.
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[at * each : (at + 1) * each])
        return environment


def _summed(result: Measured, parts: list[dict[str, Any]], rows: int) -> Measured:
    result.error = _first(parts, "error")
    if result.error:
        result.cost_usd = None  # of the requests that were in flight
        return result
    result.seconds = max(part["seconds"] for part in parts)
    for name in ("rows", "failed", "input", "output"):
        setattr(result, name, sum(part[name] for part in parts))
    costs = [part["cost_usd"] for part in parts]
    result.cost_usd = None if None in costs else sum(costs)
    result.is_cut = result.rows < rows
    failure = _first(parts, "failure")
    if result.failed == result.rows and failure:
        result.error = f"all rows fail, for example: {failure}"
    return result


def _first(parts: list[dict[str, Any]], name: str) -> str | None:
    """The first text of this name in the reports of the processes; None if there is none."""
    return next((flattened(part[name]) for part in parts if part.get(name)), None)


# -- a process --------------------------------------------------------------------------------------------------------


class _Replica:
    def __init__(self, process: subprocess.Popen[bytes], report: int, log: IO[bytes]) -> None:
        self.process, self.report, self.log = process, report, log
        self.read = b""

    def begin(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has died: `line` says so
            self.process.stdin.write(b"go\n")
            self.process.stdin.flush()

    def line(self, until: float, work: str) -> dict[str, Any]:
        """The next line of its report. If there is none by then, an error."""
        while b"\n" not in self.read:
            # Processes that it started may hold the report open after its death.
            dead = self.process.poll() is not None
            if not select.select([self.report], [], [], 0 if dead else 0.5)[0]:
                if dead:
                    return {"error": self._death()}
                if time.monotonic() > until:
                    return {"error": f"it did not {work} in time"}
            elif more := os.read(self.report, 65536):
                self.read += more
            else:
                return {"error": self._death()}
        line, _, self.read = self.read.partition(b"\n")
        return dict(json.loads(line))

    def _death(self) -> str:
        """The end of the process in words, with the last line that it wrote."""
        status = self.process.wait()
        words = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
        words += ": perhaps the memory is full" if status == -signal.SIGKILL else ""
        self.log.seek(0)
        lines = [line for line in self.log.read().decode(errors="replace").splitlines() if line.strip()]
        last = f": {cleaned({'': lines[-1].strip()})['']}"[:300] if lines else ""
        return f"its process died ({words}){last}"


@contextlib.contextmanager
def _replica(trial: Trial, environment: dict[str, str]) -> Iterator[_Replica]:
    """A process that loads the engine. At the end it is stopped, with all that it started."""
    report, inside = os.pipe()
    log = tempfile.TemporaryFile()  # noqa: SIM115  # closed below
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "engines.trial", str(inside)], stdin=subprocess.PIPE, stdout=log, stderr=log,
            pass_fds=(inside,), env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(inside)
        try:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                pickle.dump(trial, process.stdin)
                process.stdin.flush()
            yield _Replica(process, report, log)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            with contextlib.suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
    finally:
        os.close(report)
        log.close()
