"""The pipeline itself, measured with engine=echo: rates, memory, resume, stragglers, cold start.

Every run is the real command in a fresh process, Ray's start and the final output included. Memory is a
process's private pages without Ray's object store, sampled four times a second over the driver and its workers.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from pipeline.configuration.compose import compose
from pipeline.context import resolve_context
from pipeline.dataset.plan import list_splits
from pipeline.dataset.reader import SplitSummary
from pipeline.executors.requests import read_split
from pipeline.garbage import collect_rarely
from pipeline.storage.ledger_index import Index
from pipeline.storage.output_files import SEGMENTS


def write_rows(path: Path, rows: int) -> None:
    """A conversation dataset of one JSONL file, about 230 bytes a row."""
    with path.open("w") as file:
        for i in range(rows):
            question = f"Question {i}: how many of the {i % 97} boxes hold {i % 13} apples each, and why?"
            messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": question}]
            file.write(json.dumps({"id": f"row-{i}", "messages": messages, "score": i / 7, "tag": f"{i % 50:03d}"}) + "\n")


class Memory(threading.Thread):
    """The highest memory, in MiB, of each kind of process below `pid`."""

    every_s = 0.25

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.over = pid, dict[str, float](), threading.Event()
        self.cpu: dict[int, float] = {}  # process -> seconds
        self.cpu_by_kind: Counter[str] = Counter()

    def run(self) -> None:
        """Also the processor time of all of them, as far as they were seen."""
        while not self.over.wait(self.every_s):
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(self.pid)
                for process in [root, *root.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        kind, seconds = self.kind(process, root), sum(process.cpu_times()[:2])
                        self.cpu_by_kind[kind or "ray"] += seconds - self.cpu.get(process.pid, 0.0)
                        self.cpu[process.pid] = seconds
                        if kind is not None:
                            used = private_mib(process)
                            self.peak[kind] = max(self.peak.get(kind, 0.0), used)

    def kind(self, process: psutil.Process, root: psutil.Process) -> str | None:
        """The kind of a process, or None if its memory is not of interest."""
        return _kind(process, root)


class Processor(Memory):
    """Only the processor time: looking at the memory of processes would slow a short run down."""

    every_s = 0.1

    def kind(self, process: psutil.Process, root: psutil.Process) -> str | None:
        return None


def private_mib(process: psutil.Process) -> float:
    """A process's own memory; pages of Ray's object store are everybody's, whoever touched them first."""
    maps = process.memory_maps(grouped=True)
    own = [m for m in maps if not m.path.startswith(("/dev/shm", "/memfd", "/tmp/ray"))]
    return sum(m.private_clean + m.private_dirty for m in own) / 2**20


def _kind(process: psutil.Process, root: psutil.Process) -> str | None:
    if process.pid == root.pid:
        return "driver"
    title = " ".join(process.cmdline())
    for part, kind in (("ray::Worker", "worker"), ("ray::Dispatcher", "dispatcher"), ("ray::_run_task", "finalize"),
                       ("ray::Read", "reader"), ("ray::_read_ledger", "ledger")):  # fmt: skip
        if part in title:
            return kind
    return None


def infer(data: Path, out: Path, *overrides: str, engine: str = "echo", memory: type[Memory] = Memory) -> dict[str, Any]:
    """Runs the command; seconds of wall and CPU (of all its processes) and the memory."""
    command = [
        sys.executable,
        "-m",
        "jobs.infer",
        f"engine={engine}",
        f"dataset.path={data}",
        f"output.path={out}",
        *overrides,
    ]
    started = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    watch = memory(process.pid)
    watch.start()
    _, printed = process.communicate()
    wall = time.perf_counter() - started
    watch.over.set()
    if process.returncode != 0:
        raise RuntimeError(printed)
    peak = {k: round(v) for k, v in watch.peak.items()}
    return {
        "wall_s": wall, "cpu_s": sum(watch.cpu.values()), "cpu_by_kind_s": dict(watch.cpu_by_kind), "peak_mib": peak,
        "printed": printed,
    }  # fmt: skip


def asking_s(out: Path) -> tuple[float, list[float]]:
    """Seconds between the first and the last completion, and all completion times, from the segments."""
    times = pq.read_table(out / SEGMENTS, columns=["done_at"])["done_at"].cast(pa.int64()).to_numpy()
    times.sort()
    return (times[-1] - times[0]) / 1000, (times / 1000).tolist()


def scale(work: Path, sizes: list[int]) -> dict[str, Any]:
    """Rows a second at each size, end to end, and a resume over the largest, finished one."""
    result: dict[str, Any] = {}
    for rows in sizes:
        data, out = work / f"{rows}.jsonl", work / f"out-{rows}"
        write_rows(data, rows)
        found = infer(data, out)
        asking, _ = asking_s(out)
        result[str(rows)] = {
            "rows_per_s": round(rows / found["wall_s"]),
            "wall_s": round(found["wall_s"], 1),
            "asking_s": round(asking, 1),
            "asking_rows_per_s": round(rows / asking),
            "peak_mib": found["peak_mib"],
        }
        print(rows, result[str(rows)], file=sys.stderr, flush=True)
    small, large = (result[str(rows)]["rows_per_s"] for rows in (sizes[0], sizes[-1]))
    result["ratio"] = round(large / small, 3)
    again = infer(work / f"{sizes[-1]}.jsonl", work / f"out-{sizes[-1]}")
    result["resume_s"] = round(again["wall_s"], 1)
    return result


def stragglers(work: Path, rows: int = 24_000, slots: int = 256) -> dict[str, Any]:
    """One worker, mean 0.3 s, one row in 97 takes 5 s: the rate between start-up and tail against the possible one."""
    data, out = work / "stragglers.jsonl", work / "out-stragglers"
    write_rows(data, rows)
    mean, slow, every = 0.3, 5.0, 97
    plain = (mean - slow / every) / (1 - 1 / every)  # so that the mean over all rows is 0.3 s
    kwargs = {"latency_s": plain, "jitter_s": plain / 2, "slow_every": every, "slow_s": slow}
    infer(data, out, f"engine.max_concurrency={slots}", *(f"engine.kwargs.{k}={v}" for k, v in kwargs.items()))
    _, times = asking_s(out)
    # Between start-up and tail: from the moment every slot is busy and the first slow rows are out, to the last
    # moment before the feed runs dry.
    low, high = times[0] + 2 * slow, times[-1] - 2 * slow
    inside = sum(low <= t < high for t in times)
    actual_mean = _mean_latency(out)
    rate, ideal = inside / (high - low), slots / actual_mean
    return {"rows_per_s": round(rate, 1), "possible": round(ideal, 1), "ratio": round(rate / ideal, 3)}


def fleet(work: Path, seconds: int = 60, slots: int = 128) -> dict[str, Any]:
    """One fast and three slow replicas, 4:1, with one run's rows: the time against the ideal one.

    The ideal time is that of all rows at the sum of the speeds. The start is left out: time and rows count from the moment
    when each replica has answered a row.
    """
    data, out = work / "fleet.jsonl", work / "out-fleet"
    latencies = [0.2, 0.8, 0.8, 0.8]
    speed = sum(slots / latency for latency in latencies)
    write_rows(data, round(seconds * speed))
    entries = [{"engine": {"kwargs": {"latency_s": each}, "max_concurrency": slots}} for each in latencies]
    infer(data, out, f"hardware={json.dumps(entries)}", "run.flush_s=1")
    times: dict[str, list[int]] = {}
    for path in (out / SEGMENTS).glob("*.parquet"):
        writer = path.name.partition("-")[0]
        times.setdefault(writer, []).extend(
            pq.read_table(path, columns=["done_at"])["done_at"].cast(pa.int64()).to_pylist()
        )
    since, until = max(map(min, times.values())), max(map(max, times.values()))
    rows = sum(at >= since for each in times.values() for at in each)
    took, ideal = (until - since) / 1000, rows / speed
    ends = [round((until - max(each)) / 1000, 2) for each in times.values()]
    return {"rows": rows, "replicas": len(times), "took_s": round(took, 2), "ideal_s": round(ideal, 2),
            "ratio": round(took / ideal, 3), "ends_before_s": sorted(ends)}  # fmt: skip


def _mean_latency(out: Path) -> float:
    latency = pq.read_table(out / SEGMENTS, columns=["latency_s"])["latency_s"].to_pylist()
    return math.fsum(latency) / len(latency)


def cold_start(work: Path, repeats: int = 3) -> dict[str, Any]:
    """`eagleray --help`, and ten rows end to end."""
    data = work / "ten.jsonl"
    write_rows(data, 10)
    helps, tens, cpus = [], [], []
    for repeat in range(repeats):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "jobs.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
        helps.append(time.perf_counter() - started)
        found = infer(data, work / f"out-ten-{repeat}", memory=Processor)
        tens.append(found["wall_s"])
        cpus.append(found["cpu_s"])
    return {
        "help_s": round(min(helps), 2),
        "ten_rows_s": round(min(tens), 1),
        "ten_rows_max_s": round(max(tens), 1),
        "ten_rows_cpu_s": round(min(cpus), 1),
    }


def reading(work: Path, rows: int = 50_000, repeats: int = 5) -> dict[str, Any]:
    """Processor time to read a row into a request, in µs: with Python's garbage collector as it is, and as workers have it.

    In this process. The least of several repeats.
    """
    data = work / "reading.jsonl"
    write_rows(data, rows)
    console = Console(file=io.StringIO())
    config = compose(["engine=echo", f"dataset.path={data}", f"output.path={work}/out-reading"])
    splits, reader = list_splits(config, console), resolve_context(config, console).row_reader

    def least() -> float:
        times = []
        for _ in range(repeats + 1):  # the first one is the warm-up
            began = time.process_time()
            for split in splits:
                for _ in read_split(split, reader, Index.empty(), False, SplitSummary()):
                    pass
            times.append(time.process_time() - began)
        return round(min(times[1:]) / rows * 1e6, 1)

    usual, before = gc.get_threshold(), least()
    collect_rarely()
    try:
        return {"rows": rows, "usual_us": before, "rarely_us": least()}
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()


def processes(work: Path, rows: int = 300_000) -> dict[str, Any]:
    """Processor time a row of each kind of process in a run, in µs, without the time of a run of ten rows, which is the
    start. `bench.costs` measures each part by itself."""
    found = []
    for count in (10, rows):
        data = work / f"processes-{count}.jsonl"
        write_rows(data, count)
        found.append(infer(data, work / f"out-processes-{count}")["cpu_by_kind_s"])
    few, many = found
    each = {kind: round((seconds - few.get(kind, 0.0)) / rows * 1e6, 1) for kind, seconds in sorted(many.items())}
    return {"rows": rows, "us": each}


def run(sizes: list[int] | None = None, step: str = "") -> dict[str, Any]:
    """All of it, or one step (see `steps`); 3 GB of disk at the default sizes."""
    from bench import peers  # it uses this module

    work = Path(tempfile.mkdtemp(prefix="eagleray-bench-"))
    steps: dict[str, tuple[str, Callable[[], Any]]] = {
        "reading": ("reading", lambda: reading(work)),
        "cold": ("cold_start", lambda: cold_start(work)),
        "stragglers": ("stragglers", lambda: stragglers(work)),
        "fleet": ("fleet", lambda: fleet(work)),
        "scale": ("scale", lambda: scale(work, sizes or [100_000, 1_000_000])),
        "processes": ("processes", lambda: processes(work)),
        "peers": ("peers", lambda: peers.run(work, max(sizes or [1_000_000]))),
    }
    try:
        return {name: measure() for short, (name, measure) in steps.items() if step in ("", short)}
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    print(json.dumps(run([int(size) for size in sys.argv[1:]] or None), indent=2))
