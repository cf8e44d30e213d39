"""Ten million rows in a thousand files over fifty nodes: `python -m bench --only scale`.

What is real: 50 raylets, each with its own object store, agents and worker processes, in one Ray cluster; the whole command
`eagleray infer engine=echo` as its driver; 12 replicas spread over the nodes; reading as Ray tasks on all of them, the
final output on those that have a CPU (`cpu_nodes` of them, for 50 workers at once do not fit into one machine's memory);
every row, segment, part and fsync. What is not: a network, and more than the machine's cores and its one disk, so
the rate says what the machine does, not what 50 would. Memory is a process's own pages without the object store.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from bench.pipeline import _kind, private_mib
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger import SEGMENT_SCHEMA, TOKENS, USAGE, _put
from pipeline.storage.output_files import SEGMENTS

# Nothing is started before it is needed, and nothing is ended before the machine is all but full. A worker that has nothing
# to do is kept for two minutes, longer than a node waits for its next file, and not for the rest of the run, whose memory
# they would take. The run gets its share of a machine that does other things, where Ray's workers give way to everybody
# else. And fifty nodes' own reports, which would take much of the machine's processors, are a minute apart.
SETTINGS = {
    "RAY_prestart_worker_first_driver": "0",
    "RAY_num_workers_soft_limit": "0",
    "RAY_idle_worker_killing_time_threshold_ms": "120000",
    "RAY_worker_niceness": "0",
    "RAY_memory_usage_threshold": "0.98",
    "RAY_metrics_report_interval_ms": "60000",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_task_events_report_interval_ms": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "SCAN_EVENT_DIR_INTERVAL_SECONDS": "60",
}

# The run is ended where the machine has no more memory left.
LEFT_BYTES = 1 << 30

HOST = """
import json, sys
from ray.cluster_utils import Cluster
nodes, cpu_nodes = map(int, sys.argv[1:])
head = {"num_cpus": 0, "object_store_memory": 3 << 30, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
for at in range(nodes - 1):
    cluster.add_node(num_cpus=int(at < cpu_nodes), object_store_memory=80 << 20)
raylets = [node.all_processes["raylet"][0].process.pid for node in [cluster.head_node, *cluster.worker_nodes]]
print("=>" + json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
sys.stdin.read()
cluster.shutdown()
"""

# Reads the ledger as a run's task does, and says what it took.
INDEX = """
import json, resource, sys, time
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger_index import read_index
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began, cpu = time.perf_counter(), time.process_time()
index = read_index(*resolve(sys.argv[1]))
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
arrays = (index.hi, index.lo, index.segment, index.row, index.failed, index.tokens, index.cost_usd, index.flags,
          index.attempts)
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(json.dumps({"rows": len(index), "segments": len(index.paths), "seconds": seconds, "cpu": cpu, "peak": peak,
                  "bytes": sum(array.nbytes for array in arrays)}))
"""


def write_files(folder: Path, rows: int, files: int) -> int:
    """`rows` short conversations in `files` files; their bytes."""
    folder.mkdir()
    each = rows // files
    for at in range(files):
        lines = (
            f'{{"messages":[{{"role":"user","content":"Question {n}: how many?"}}],"n":{n % 97}}}\n'
            for n in range(at * each, (at + 1) * each)
        )
        (folder / f"{at:05d}.jsonl").write_text("".join(lines))
    return sum(path.stat().st_size for path in folder.iterdir())


class Watch(threading.Thread):
    """Memory of the driver over time, the highest of each kind of worker, and on which nodes the output is put together."""

    def __init__(self, driver: int, host: int, raylets: list[int], every_s: float = 10.0) -> None:
        super().__init__(daemon=True)
        self.driver, self.host, self.raylets, self.every_s = driver, host, raylets, every_s
        self.began = time.monotonic()
        self.over = threading.Event()
        self.over_time: list[tuple[int, int]] = []
        self.peak: dict[str, float] = {}
        self.jobs: Counter[int] = Counter()  # node -> times that a process of it was seen at a part
        self.total = 0.0  # of all processes, at most

    def run(self) -> None:
        looked = 0.0
        while not self.over.wait(1.0):
            with contextlib.suppress(psutil.Error):
                measure = time.monotonic() >= looked + self.every_s
                if measure:
                    looked = time.monotonic()
                self._look(measure)

    def _look(self, measure: bool) -> None:
        driver = psutil.Process(self.driver)
        if psutil.virtual_memory().available < LEFT_BYTES:
            driver.terminate()
        if measure:
            used = private_mib(driver)
            self.over_time.append((round(time.monotonic() - self.began), round(used)))
            self.peak["driver"] = max(self.peak.get("driver", 0.0), used)
        total = 0.0
        for at, raylet in enumerate(self.raylets):
            for process in psutil.Process(raylet).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    kind = _kind(process, driver)
                    if kind == "finalize":
                        self.jobs[at] += 1
                    if measure and kind is not None:
                        used = private_mib(process)
                        total += used
                        self.peak[kind] = max(self.peak.get(kind, 0.0), used)
        self.total = max(self.total, total)


@contextlib.contextmanager
def cluster(nodes: int, cpu_nodes: int, scratch: str) -> Any:
    """Its address, the raylets' process ids, the host process, and what a raylet with its agents takes in MiB."""
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": scratch, **SETTINGS}
    env.pop("RAY_ADDRESS", None)
    with Path(scratch, "host.log").open("w") as log:
        host = subprocess.Popen(
            [sys.executable, "-c", HOST, str(nodes), str(cpu_nodes)],
            env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
        )  # fmt: skip
    assert host.stdin and host.stdout
    try:
        answer = next((line for line in host.stdout if line.startswith("=>")), None)
        if answer is None:
            raise RuntimeError(Path(scratch, "host.log").read_text()[-2000:])
        found = json.loads(answer[2:])
        family = [p for pid in found["raylets"][1:] for p in (psutil.Process(pid), *psutil.Process(pid).children(True))]
        found["raylet_mib"] = round(sum(p.memory_full_info().uss for p in family) / 2**20 / (nodes - 1))
        found["env"], found["host"] = {**env, "RAY_ADDRESS": found["address"]}, host.pid
        yield found
    finally:
        with contextlib.suppress(BrokenPipeError):
            host.stdin.close()
        try:
            host.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(host.pid, signal.SIGKILL)


def infer(data: Path, out: Path, replicas: int, where: dict[str, Any]) -> dict[str, Any]:
    """The whole command, watched."""
    command = [
        sys.executable, "-m", "jobs.infer", "engine=echo", f"dataset.path={data}", f"output.path={out}",
        f"hardware.replicas={replicas}", "run.progress_s=30",
    ]  # fmt: skip
    began = time.time()
    with (out.parent / f"{out.name}.log").open("a") as log:
        driver = subprocess.Popen(command, env=where["env"], stdout=log, stderr=log)
    watch = Watch(driver.pid, where["host"], where["raylets"])
    watch.start()
    try:
        driver.wait()
    finally:
        driver.terminate()
        watch.over.set()
        watch.join()
    if driver.returncode != 0:
        raise RuntimeError((out.parent / f"{out.name}.log").read_text()[-3000:])
    return {"began": began, "ended": time.time(), "watch": watch, "log": (out.parent / f"{out.name}.log").read_text()}


def ledger(sizes: tuple[int, ...] = (1_000_000, 5_000_000, 10_000_000)) -> list[dict[str, Any]]:
    """Ledgers of these sizes, in merged segments of 65,536 rows, each read in a fresh process."""
    found = []
    work = Path(tempfile.mkdtemp(prefix="eagleray-ledger-"))
    try:
        written = 0
        for size in sizes:
            while written < size:
                rows = min(65_536, size - written)
                keys = pa.Array.from_buffers(pa.binary(32), rows, [None, pa.py_buffer(os.urandom(32 * rows))])
                usage = pa.repeat(pa.scalar(dict.fromkeys(TOKENS, 0) | {"input": 3, "output": 3}, USAGE), rows)
                when = pa.repeat(pa.scalar(written, pa.timestamp("ms", tz="UTC")), rows)
                known = {
                    "key": keys,
                    "response": pa.repeat("an answer", rows),
                    "usage": usage,
                    "done_at": when,
                    "cost_usd": pa.repeat(0.0, rows),
                }
                columns = [known[f.name] if f.name in known else pa.nulls(rows, f.type) for f in SEGMENT_SCHEMA]
                _put(*resolve(str(work)), "w1", pa.Table.from_arrays(columns, schema=SEGMENT_SCHEMA))
                written += rows
            told = subprocess.run([sys.executable, "-c", INDEX, str(work)], check=True, capture_output=True, text=True)
            one = json.loads(told.stdout)
            found.append({
                "rows": one["rows"], "segments": one["segments"], "seconds": round(one["seconds"], 1),
                "cpu_us_per_row": round(1e6 * one["cpu"] / one["rows"], 2),
                "bytes_per_row": round(one["bytes"] / one["rows"], 1),
                "peak_bytes_per_row": round(one["peak"] / one["rows"]),
            })  # fmt: skip
            print("ledger", found[-1], file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return found


def run(
    rows: int = 10_000_000, files: int = 1000, nodes: int = 50, replicas: int = 12, cpu_nodes: int = 6
) -> dict[str, Any]:
    """One run of that size, its resume, and what its ledger costs."""
    work = Path(tempfile.mkdtemp(prefix="eagleray-scale-"))
    scratch = tempfile.mkdtemp(prefix="es", dir="/tmp")  # short: Ray's sockets lie there
    data, out = work / "in", work / "out"
    try:
        size = write_files(data, rows, files)
        with cluster(nodes, cpu_nodes, scratch) as where:
            print(f"{nodes} raylets, {where['raylet_mib']} MiB each", file=sys.stderr, flush=True)
            first = infer(data, out, replicas, where)
            watch = first["watch"]
            segments = list((out / SEGMENTS).glob("*.parquet"))
            done = [pq.read_table(path, columns=["done_at"])["done_at"].cast(pa.int64()) for path in segments]
            begin, end = min(min(t.to_pylist()) for t in done) / 1000, max(max(t.to_pylist()) for t in done) / 1000
            parts = sorted(path.stat().st_mtime for path in (out / "data").iterdir())
            wall = first["ended"] - first["began"]
            step = max(1, len(watch.over_time) // 12)
            result = {
                "rows": rows, "files": files, "nodes": nodes, "cpu_nodes": cpu_nodes, "replicas": replicas,
                "raylet_mib": where["raylet_mib"],
                "input_mib": round(size / 2**20),
                "ledger_mib": round(sum(path.stat().st_size for path in segments) / 2**20),
                "segments": len(segments),
                "wall_s": round(wall), "rows_per_s": round(rows / wall),
                "asking_s": round(end - begin), "asking_rows_per_s": round(rows / (end - begin)),
                "first_row_s": round(begin - first["began"], 1),
                "index_s": round(parts[0] - end, 1),
                "finalize_s": round(parts[-1] - parts[0], 1),
                "finalize_share": round((first["ended"] - end) / wall, 3),
                "parts": len(parts),
                "finalize_nodes": sorted((watch.jobs[at] for at in watch.jobs), reverse=True),
                "peak_mib": {kind: round(mib) for kind, mib in sorted(watch.peak.items())},
                "workers_mib": round(watch.total),
                "driver_mib_over_time": watch.over_time[::step],
            }  # fmt: skip
            print(result, file=sys.stderr, flush=True)
            again = infer(data, out, replicas, where)
            result["resume_s"] = round(again["ended"] - again["began"])
            result["resume_peak_mib"] = {kind: round(mib) for kind, mib in sorted(again["watch"].peak.items())}
            print("resume", result["resume_s"], result["resume_peak_mib"], file=sys.stderr, flush=True)
        return {**result, "ledger": ledger()}
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    print(json.dumps(run(*map(int, sys.argv[1:])), indent=2))
