"""Processes that tests start: wait for what they do, find their children, end them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

PATIENCE_S = 240  # the longest wait for an event that must come; no test measures time by it


def until(true: Callable[[], Any], run: subprocess.Popen[str] | None = None) -> Any:
    """Waits until `true()` is true, and returns its value. With `run`: the process must go on until then."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := true()):
        assert run is None or run.poll() is None, f"the run ended first: {run.communicate()}"
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return found


def finish(run: subprocess.Popen[str], status: int = 0) -> str:
    _, printed = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == status, printed
    return printed


def family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def gone(pid: int) -> bool:
    """The process has ended; a zombie has, too."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    return True


def replicas(pid: int) -> list[psutil.Process]:
    """The processes of a run's replicas, in the Ray that this process started."""
    return [process for process in family(pid) if "ray::Worker" in title(process)]


def wait_gone(processes: list[psutil.Process]) -> None:
    """Waits until all have ended by themselves: then a killed run's replicas have written their last segments."""
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE_S)
    assert alive == [], alive


def content(path: Path) -> bytes:
    """The bytes of a file that a program in another process may remove at any time; then there are none."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    return b""


def own_ray() -> dict[str, str]:
    """The environment of a run that starts its own Ray."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


@contextlib.contextmanager
def folder() -> Iterator[str]:
    """A directory with a short path: Ray makes sockets in it, whose paths may have 107 bytes."""
    path = tempfile.mkdtemp(prefix="r-", dir="/tmp")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
