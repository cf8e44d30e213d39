"""Ten million rows in a thousand files over fifty nodes.

    python -m bench --only scale [--sizes ROWS,FILES,NODES,REPLICAS[,NODES_WITH_A_CPU]]

What is real: the raylets, each with its own object store, agents and worker processes, in one Ray cluster; the command
`eagleray infer engine=echo` as its driver; replicas spread over the nodes; reading and the final output as Ray tasks on all
of them; every row, segment, part and fsync. What is not: a network, and more than the machine's cores and its one disk, so
the rate says what the machine does, not what 50 would. Memory is a process's own pages without the object store.

On the way the driver is killed once, at a quarter of the rows, and all processes of one node at half of them. At the end
every row of the output is checked, and the command runs again over the finished output.

    python -m bench.scale --sizes 10000000,1000,50,12 --work DIR --limit-s 1500 --out FILE

takes as much of it as fits into 1,500 s, and keeps the rest in DIR: the same command continues. DIR is removed at the end.
A machine with 23 GB of memory has room for 24 nodes with a CPU (`--sizes 10000000,1000,50,12,24`). With more, the bench
ends the driver when the memory is full.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bench.scale_watch import Watch
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger import SEGMENT_SCHEMA, TOKENS, USAGE, _put
from pipeline.storage.output_files import MANIFEST, SEGMENTS

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

# The agents of the nodes are those of an installation without Ray's dashboard, which take less memory.
HOST = """
import json, sys
from ray._private import utils
from ray.cluster_utils import Cluster
utils.get_dashboard_dependency_error = lambda: ImportError("not needed here")
nodes, cpu_nodes = map(int, sys.argv[1:])
head = {"num_cpus": 0, "object_store_memory": 3 << 30, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
for at in range(nodes - 1):
    cluster.add_node(num_cpus=int(at < cpu_nodes), object_store_memory=80 << 20)
raylets = [node.all_processes["raylet"][0].process.pid for node in [cluster.head_node, *cluster.worker_nodes]]
print("=>" + json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
sys.stdin.read()
"""

# Reads the ledger as a run's task does, and says what it took.
INDEX = """
import json, sys, time
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger_index import read_index
def most():  # not `getrusage`, whose value may be that of the parent
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = most()
began, cpu = time.perf_counter(), time.process_time()
index = read_index(*resolve(sys.argv[1]))
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
arrays = (index.hi, index.lo, index.segment, index.row, index.failed, index.tokens, index.cost_usd, index.flags,
          index.attempts)
peak = (most() - before) * 1024
print(json.dumps({"rows": len(index), "segments": len(index.paths), "seconds": seconds, "cpu": cpu, "peak": peak,
                  "bytes": sum(array.nbytes for array in arrays)}))
"""

QUESTION = "Question {}: how many?"
# The share of the rows at which the driver is killed, and a node.
KILLS = {"driver": 0.25, "node": 0.5}
# Up to so many rows, the finished output is also given to a run that must read them again.
READ_AGAIN = 200_000
# A driver has this many seconds to end after a signal.
DRAIN_S = 120


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def write_files(folder: Path, rows: int, files: int) -> int:
    """`rows` short conversations in `files` files; their bytes."""
    folder.mkdir(exist_ok=True)
    for at in range(files):
        lines = (
            f'{{"messages":[{{"role":"user","content":"{QUESTION.format(n)}"}}],"n":{n % 97}}}\n'
            for n in range(at * rows // files, (at + 1) * rows // files)
        )
        (folder / f"{at:05d}.jsonl").write_text("".join(lines))
    return sum(path.stat().st_size for path in folder.iterdir())


@contextlib.contextmanager
def cluster(nodes: int, cpu_nodes: int, scratch: str) -> Iterator[dict[str, Any]]:
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
        yield {**found, "env": {**env, "RAY_ADDRESS": found["address"]}, "host": host.pid}
    finally:
        left = [psutil.Process(host.pid), *psutil.Process(host.pid).children(recursive=True)]
        for process in left:  # the host first: it would start nothing again, but wait for each
            with contextlib.suppress(psutil.Error):
                process.kill()
        host.wait()
        psutil.wait_procs(left, timeout=30)


class Scale:
    """One run of the whole size, in one or more pieces. Everything it needs is in `work`."""

    def __init__(self, work: Path, sizes: Sequence[int], limit_s: float) -> None:
        self.work = work
        self.rows, self.files, self.nodes, self.replicas, *cpu_nodes = sizes
        self.cpu_nodes = cpu_nodes[0] if cpu_nodes else self.nodes - 1
        self.data, self.out, self.log = work / "in", work / "out", work / "driver.log"
        self.ends_at = time.monotonic() + limit_s
        state = work / "state.json"
        self.state: dict[str, Any] = json.loads(state.read_text()) if state.exists() else {"figures": {}, "drivers": []}
        if self.state.setdefault("sizes", [self.rows, self.files]) != [self.rows, self.files]:
            raise SystemExit(f"{work} has a run of other sizes: {self.state['sizes']}")

    def save(self) -> None:
        (self.work / "state.json").write_text(json.dumps(self.state))

    def go(self) -> dict[str, Any] | None:
        """The figures, or None if the time is over before the end."""
        if "input_mib" not in self.state:
            self.state["input_mib"] = round(write_files(self.data, self.rows, self.files) / 2**20)
            self.save()
            say(f"{self.rows:,} rows in {self.files:,} files: {self.state['input_mib']} MiB")
        scratch = tempfile.mkdtemp(prefix="es", dir="/tmp")  # short: Ray's sockets lie there
        try:
            with cluster(self.nodes, self.cpu_nodes, scratch) as where:
                self.state["raylet_mib"] = where["raylet_mib"]
                say(f"{self.nodes} raylets, {where['raylet_mib']} MiB each")
                watch = Watch(where["host"], where["raylets"], self.out, self.state["figures"])
                watch.start()
                try:
                    ended = self._ask(where, watch)
                finally:
                    watch.end()
                    self.save()
                if not ended:
                    return None
                return self._figures(where)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    # -- the run ---------------------------------------------------------------------------------------------------

    def _driver(self, where: dict[str, Any]) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, "-m", "jobs.infer", "engine=echo", f"dataset.path={self.data}", f"output.path={self.out}",
            f"hardware.replicas={self.replicas}", "run.progress_s=30",
        ]  # fmt: skip
        with self.log.open("a") as log:
            return subprocess.Popen(command, env=where["env"], stdout=log, stderr=log)

    def _ask(self, where: dict[str, Any], watch: Watch) -> bool:
        """Runs drivers until one ends by itself, which is True, or the time is over."""
        killed: dict[str, int] = self.state.setdefault("killed", {})
        while True:
            driver, began = self._driver(where), time.time()
            watch.driver = psutil.Process(driver.pid)
            say(f"a driver starts ({len(self.state['drivers']) + 1})")
            told = 0.0
            try:
                while driver.poll() is None:
                    time.sleep(1.0)
                    done = watch.rows_done()
                    if time.monotonic() > told + 30:
                        told = time.monotonic()
                        say(f"{done:,} rows done, {psutil.virtual_memory().available >> 20:,} MiB of memory left")
                    if time.monotonic() > self.ends_at:
                        say("the time of this piece is over")
                        driver.send_signal(signal.SIGTERM)
                        driver.wait(DRAIN_S)
                    elif "driver" not in killed and done >= KILLS["driver"] * self.rows:
                        killed["driver"] = done
                        say(f"kills the driver at {done:,} rows")
                        driver.kill()
                    elif (
                        "node" not in killed
                        and done >= KILLS["node"] * self.rows
                        and (node := watch.node_with_a_replica()) is not None
                    ):
                        killed["node"] = done
                        say(f"kills node {node} at {done:,} rows")
                        watch.kill_node(node)
            finally:
                if driver.poll() is None:
                    driver.kill()
                driver.wait()
                self.state["drivers"].append([began, time.time(), driver.returncode])
                self.save()
            if driver.returncode == 0:
                return True
            if watch.full:
                raise SystemExit(
                    "no memory is left: give fewer nodes a CPU (the fifth of --sizes); the rows so far are kept"
                )
            if time.monotonic() > self.ends_at:
                return False
            if driver.returncode != -signal.SIGKILL:
                raise RuntimeError(self.log.read_text()[-3000:])

    # -- its figures -----------------------------------------------------------------------------------------------

    def _figures(self, where: dict[str, Any]) -> dict[str, Any]:
        """Checks the output, runs the command again, and returns everything that was found."""
        manifest = json.loads((self.out / MANIFEST).read_text())
        segments = list((self.out / SEGMENTS).glob("*.parquet"))
        done = [pq.read_table(path, columns=["done_at"])["done_at"].cast(pa.int64()) for path in segments]
        end = max(pc.max(times).as_py() for times in done) / 1000
        begin = min(pc.min(times).as_py() for times in done) / 1000
        parts = sorted(path.stat().st_mtime for path in (self.out / "data").iterdir())
        drivers, figures = self.state["drivers"], self.state["figures"]
        wall = sum(ended - began for began, ended, _ in drivers)
        asking = sum(min(ended, end) - max(began, begin) for began, ended, _ in drivers if ended > begin and began < end)
        say(f"{self.rows:,} rows in {wall:,.0f} s; the rows are checked")
        result = {
            "rows": self.rows, "files": self.files, "nodes": self.nodes, "replicas": self.replicas,
            "cpu_nodes": self.cpu_nodes,
            "wrong_rows": wrong_rows(self.out, self.rows), "killed": self.state["killed"], "drivers": len(drivers),
            "extra_requests": manifest["requests_sent"] - self.rows,
            "raylet_mib": self.state["raylet_mib"], "input_mib": self.state["input_mib"],
            "ledger_mib": round(sum(path.stat().st_size for path in segments) / 2**20), "segments": len(segments),
            "wall_s": round(wall), "rows_per_s": round(self.rows / wall),
            "asking_s": round(asking), "asking_rows_per_s": round(self.rows / asking),
            "finalize_s": round(parts[-1] - parts[0], 1), "parts": len(parts),
            "finalize_share": round((parts[-1] - parts[0]) / wall, 3),
            "finalize_nodes": list(figures["finalize_nodes"].values()),
            "peak_mib": figures["peak_mib"], "workers_mib": figures["workers_mib"],
            "memory_over_time": _some([[int(at - begin), *rest] for at, *rest in figures["series"]], 16),
            "cpu_s": figures["cpu_s"],
            "cpu_us_per_row": {kind: round(1e6 * s / self.rows, 1) for kind, s in figures["cpu_s"].items()},
        }  # fmt: skip
        say(json.dumps(result))
        result["resume"] = self._again(where)
        manifest = json.loads((self.out / MANIFEST).read_text())
        if self.rows <= READ_AGAIN:  # as a run whose manifest does not tell if a file has changed, such as an older one
            del manifest["stamps"]
            (self.out / MANIFEST).write_text(json.dumps(manifest))
            result["resume_with_reading"] = self._again(where)
        return result

    def _again(self, where: dict[str, Any]) -> dict[str, Any]:
        """The same command over the finished output."""
        figures: dict[str, Any] = {}
        watch = Watch(where["host"], where["raylets"], self.out, figures)
        for process in psutil.Process(where["host"]).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                watch.seen[process.pid] = process.create_time(), sum(process.cpu_times()[:2])
        watch.start()
        began = time.monotonic()
        driver = self._driver(where)
        watch.driver = psutil.Process(driver.pid)
        status = driver.wait()
        seconds = time.monotonic() - began
        watch.end()
        if status != 0 or "the output is up to date" not in self.log.read_text()[-3000:]:
            raise RuntimeError(self.log.read_text()[-3000:])
        found = {"seconds": round(seconds, 1), "cpu_s": figures["cpu_s"], "peak_mib": figures["peak_mib"]}
        say(f"again, over the finished output: {found}")
        return found


def wrong_rows(out: Path, rows: int) -> int:
    """The rows of the output that are missing, in a wrong place, or have a wrong answer."""
    wrong = at = 0
    for path in sorted((out / "data").iterdir()):
        part = pq.read_table(path, columns=["index", "response"])
        numbers = range(at, at + len(part))
        right = pc.and_(
            pc.equal(part["index"], pa.array(numbers, pa.int64())),
            pc.equal(part["response"], pa.array([QUESTION.format(n) for n in numbers])),
        )
        wrong += len(part) - (pc.sum(pc.fill_null(right, False)).as_py() or 0)
        at += len(part)
    return wrong + abs(rows - at)


def _some(values: list[Any], count: int) -> list[Any]:
    """About `count` of the values, evenly spaced, the last one included."""
    step = max(1, len(values) // count)
    return values[:-1:step] + values[-1:]


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
                _put(*resolve(str(work)), "w1", [pa.Table.from_arrays(columns, schema=SEGMENT_SCHEMA)])
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
    sizes: Sequence[int] = (10_000_000, 1000, 50, 12), work: Path | None = None, limit_s: float = float("inf")
) -> dict[str, Any] | None:
    """One run of these sizes: rows, files, nodes, replicas and, if not all nodes but the head have a CPU, how many do.

    None if the time is over before its end: `work` has the rest.
    """
    work = work or Path(tempfile.mkdtemp(prefix="eagleray-scale-"))
    work.mkdir(parents=True, exist_ok=True)
    found = Scale(work, sizes, limit_s).go()
    if found is not None:
        shutil.rmtree(work)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale")
    parser.add_argument("--sizes", default="10000000,1000,50,12", help="rows, files, nodes, replicas, nodes with a CPU")
    parser.add_argument("--work", type=Path, help="keeps the run between pieces; default: a new directory")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="seconds of this piece")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends all raylets, as Ctrl-C does
    found = run([int(size) for size in args.sizes.split(",")], args.work, args.limit_s)
    if found is None:
        raise SystemExit("not finished: the same command continues")
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
