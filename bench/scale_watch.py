"""Watches a cluster of many raylets on this machine: memory over time, and the processor time of each kind of process."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from bench.pipeline import private_mib

# The driver is ended if the machine has no more memory left.
LEFT_BYTES = 1 << 30

# A part of the first three words of a process's command line -> its kind. The first one counts. A process that waits for a
# task has no title of its own while it imports the modules of the next one.
KINDS = (
    ("raylet/raylet", "raylets"),
    ("gcs_server", "Ray's server"),
    ("ray::Worker", "replica"),
    ("ray::Dispatcher", "dispatcher"),
    ("ray::_run_task", "finalize"),
    ("ray::_read_rows", "reader"),
    ("ray::ReadConversations", "reader"),
    ("ray::IndexActor", "index"),
    ("ray::_read_ledger", "index"),
    ("ray::IDLE", "start of processes"),
    ("ray::DashboardAgent", "agents"),
    ("ray::RuntimeEnvAgent", "agents"),
    ("ray::", "other Ray tasks"),
    ("default_worker.py", "start of processes"),
    ("setup_worker.py", "start of processes"),
    ("agent", "agents"),
)
# Kinds whose memory is measured.
MEASURED = ("driver", "replica", "dispatcher", "finalize", "reader", "index")


def kind_of(process: psutil.Process) -> str:
    title = " ".join(process.cmdline()[:3])
    return next((kind for part, kind in KINDS if part in title), "other processes")


class Watch(threading.Thread):
    """`figures` has the findings of all drivers that were watched; the caller keeps it over several pieces of a run."""

    def __init__(self, host: int, raylets: list[int], out: Path, figures: dict[str, Any], every_s: float = 10.0) -> None:
        super().__init__(daemon=True)
        self.host, self.raylets, self.out, self.every_s = host, raylets, out, every_s
        self.driver: psutil.Process | None = None
        self.over = threading.Event()
        self.full = False  # the driver was ended, because the machine had no memory left
        self.figures = figures
        self.figures.setdefault("series", [])  # [s, rows done, MiB of the driver, MiB of the dispatcher]
        self.cpu: Counter[str] = Counter(figures.get("cpu_s", {}))
        self.peak: dict[str, float] = figures.setdefault("peak_mib", {})
        self.nodes: Counter[int] = Counter()  # node -> times that a process of it was seen at the final output
        self.seen: dict[int, tuple[float, float]] = {}  # process -> its start, and its processor time
        self.last: dict[str, float] = {}

    def run(self) -> None:
        looked = 0.0
        while not self.over.wait(1.0):
            with contextlib.suppress(psutil.Error):
                measure = time.monotonic() >= looked + self.every_s
                looked = time.monotonic() if measure else looked
                self._look(measure)

    def end(self) -> None:
        self.over.set()
        self.join()
        self.figures["cpu_s"] = {kind: round(seconds, 1) for kind, seconds in self.cpu.most_common()}
        nodes = Counter({int(at): n for at, n in self.figures.get("finalize_nodes", {}).items()}) + self.nodes
        self.figures["finalize_nodes"] = dict(sorted(nodes.items()))

    def rows_done(self) -> int:
        """As the run tells in `_run.json`, every 10 s."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            status = json.loads((self.out / "_run.json").read_text())["status"]
            return int(status["rows_done"]) + int(status["answered"])
        return 0

    def _look(self, measure: bool) -> None:
        used: dict[str, float] = {}
        total = 0.0
        driver = self.driver
        if driver is not None and driver.is_running():
            if psutil.virtual_memory().available < LEFT_BYTES:
                self.full = True
                driver.send_signal(signal.SIGTERM)
            self._add_time(driver, "driver")
            if measure:
                used["driver"] = private_mib(driver)
        for process in psutil.Process(self.host).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                kind = kind_of(process)
                self._add_time(process, kind)
                if kind == "finalize":
                    self.nodes[self._node_of(process)] += 1
                if measure and kind in MEASURED:
                    mib = private_mib(process)
                    used[kind] = max(used.get(kind, 0.0), mib)
                    total += mib
        if measure:
            self.peak.update({kind: round(max(mib, self.peak.get(kind, 0.0))) for kind, mib in used.items()})
            self.figures["workers_mib"] = round(max(total, self.figures.get("workers_mib", 0.0)))
            if "dispatcher" in used or "finalize" in used:
                found = [round(used.get(kind, 0.0)) for kind in ("driver", "dispatcher")]
                self.figures["series"].append([round(time.time()), self.rows_done(), *found])

    def _add_time(self, process: psutil.Process, kind: str) -> None:
        """Adds the processor time since the last look to the kind that the process has now."""
        seconds, start = sum(process.cpu_times()[:2]), process.create_time()
        before = self.seen.get(process.pid)
        known = before[1] if before is not None and before[0] == start else 0.0
        self.seen[process.pid] = (start, seconds)
        if not known and kind not in ("driver", "raylets", "agents", "Ray's server", "start of processes"):
            kind = "start of processes"  # seen for the first time: it has started since the last look
        self.cpu[kind] += max(0.0, seconds - known)

    def _node_of(self, process: psutil.Process) -> int:
        with contextlib.suppress(psutil.Error):
            for parent in process.parents():
                if parent.pid in self.raylets:
                    return self.raylets.index(parent.pid)
        return -1

    def node_with_a_replica(self) -> int | None:
        """The number of a node that has a replica and is not the head."""
        for process in psutil.Process(self.host).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if kind_of(process) == "replica" and (node := self._node_of(process)) > 0:
                    return node
        return None

    def kill_node(self, node: int) -> None:
        """Kills all processes of a node at once."""
        raylet = psutil.Process(self.raylets[node])
        for process in [raylet, *raylet.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                process.kill()
