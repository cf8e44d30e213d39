"""The cost of a row in each part of a run, each part alone and in this process: `python -m bench.costs [--run FILE]`.

Processor time, the least of several repeats, with Python's garbage collector as in a run. It writes `bench/costs.json`;
`make docs` makes the tables of docs/scale.md from it. `--run` adds the figures of `bench.scale`.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import pickle
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console

from bench.commands import commit
from bench.pipeline import write_rows
from bench.scale import ledger, say
from engines.registry import load_engine
from engines.types import Choice, Completion
from engines.usage import Usage
from pipeline.configuration.compose import compose
from pipeline.context import RunContext, resolve_context
from pipeline.dataset.plan import list_splits
from pipeline.dataset.read import read_file_split
from pipeline.dataset.reader import ReadSplit, SplitSummary
from pipeline.dataset.source import list_file_splits
from pipeline.executors.live.dispatcher import Dispatcher
from pipeline.executors.live.recorder import LeasedRow
from pipeline.executors.live.refusals import RefusalGate
from pipeline.executors.live.worker import Worker, WorkerConfig
from pipeline.executors.requests import PendingRequest, read_split
from pipeline.garbage import collect_rarely
from pipeline.monitor.status import RunStatus
from pipeline.output.finalize import WrittenOutput
from pipeline.output.manifest import make_manifest
from pipeline.output.part_writer import JobResult, PartWriter
from pipeline.output.plan import plan_columns, plan_jobs
from pipeline.storage.filesystem import resolve, write_atomic
from pipeline.storage.ledger import FAN, Compactor, Record, read_rows, write_segment
from pipeline.storage.ledger_index import DedupFilter, Index, read_index
from pipeline.storage.output_files import SEGMENTS

COSTS = Path(__file__).parent / "costs.json"
ROWS, REPEATS = 50_000, 3
# The rows of the ledger whose index is read in a fresh process, for its memory.
INDEXED = 5_000_000
# The rows of a segment before it is merged, of a lease, and that a worker holds; and the number of workers.
FLUSHED, LEASED, HELD, WORKERS = 2_000, 256, 2048, 64
# US$ for 1,000 requests to S3 Standard in us-east-1, November 2026. Deleting is free.
PRICES = {"PUT": 0.005, "POST": 0.005, "LIST": 0.005, "GET": 0.0004, "HEAD": 0.0004, "DELETE": 0.0}


def least(work: Callable[[], object]) -> float:
    """The least processor time of some repeats, in s. The first one is a warm-up."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times[1:])


class Costs:
    """Measures one part after the other; each uses what the one before it has made."""

    def __init__(self, work: Path, rows: int) -> None:
        self.work, self.rows = work, rows
        data = work / "in.jsonl"
        write_rows(data, rows)
        console = Console(file=io.StringIO())
        config = compose(["engine=echo", f"dataset.path={data}", f"output.path={work}/out", "dataset.chunk_bytes=1000000"])
        self.context: RunContext = resolve_context(config, console)
        self.splits: list[ReadSplit] = list_splits(config, console)
        self.found: dict[str, float] = {"input_bytes": round(data.stat().st_size / rows, 1)}
        self.pending: list[PendingRequest] = []
        self.summaries: dict[int, SplitSummary] = {}

    def all(self) -> dict[str, float]:
        for part in (self.read, self.dispatch, self.ask, self.write, self.index, self.finalize, self.dedup):
            part()
            say(f"{part.__name__}: {self.found}")
        return self.found

    def _us(self, name: str, seconds: float, rows: int | None = None) -> None:
        self.found[name] = round(1e6 * seconds / (rows or self.rows), 2)

    def _each(self, work: Callable[[ReadSplit], Iterable[object]]) -> Callable[[], None]:
        def run() -> None:
            for split in self.splits:
                for _ in work(split):
                    pass

        return run

    def read(self) -> None:
        """A read task: parsing, keys, and the table of requests. The last two by difference."""
        reader, none = self.context.row_reader, Index.empty()
        parse = least(self._each(lambda split: read_file_split(split.file_split, max_row_bytes=reader.max_row_bytes)))
        keys = least(self._each(reader.read))
        whole = least(self._each(lambda split: read_split(split, reader, none, False, SplitSummary())))
        self._us("read_parse_us", parse)
        self._us("read_key_us", keys - parse)
        self._us("read_request_us", whole - keys)
        for split in self.splits:
            self.summaries[split.number] = SplitSummary()
            for table in read_split(split, reader, none, False, self.summaries[split.number]):
                self.pending += [PendingRequest(*row.values()) for row in table.to_pylist()]

    def dispatch(self) -> None:
        """The dispatcher's own work: queue, leases, counts. Ray's part of a call is not in it."""

        async def go() -> None:
            dispatcher = Dispatcher(self.splits, self.context.row_reader, [None], False)
            leases: list[tuple[str, Any]] = []
            for at in range(0, self.rows, 4096):
                await dispatcher._add(self.pending[at : at + 4096], [])
                worker = 0
                while dispatcher.table.waiting:
                    worker = (worker + 1) % WORKERS
                    lease = await dispatcher.pull(f"w{worker}", LEASED, 0, [])
                    assert lease is not None
                    leases.append((f"w{worker}", lease))
                for name, lease in leases:
                    places = [(lease.number, list(range(len(lease))))]
                    await dispatcher.commit(name, places, RunStatus(done=len(lease)))
                leases.clear()

        self._us("dispatch_us", least(lambda: asyncio.run(go())))

    def ask(self) -> None:
        """A worker's slots, with an engine that takes almost no time."""
        config = WorkerConfig(self.context.config.engine, self.context.params, self.context.output_path, 2.0, 1.0, 1.0, 0.0)

        async def go() -> None:
            worker = Worker(config, "w1", None)
            worker.engine = load_engine(config.engine)
            worker.gate = RefusalGate(worker.recorder, worker.engine, True)
            worker.waiting.full = lambda: False
            slots = [asyncio.create_task(worker._slot(worker.engine, at)) for at in range(worker.engine.concurrency)]
            for start in range(0, self.rows, HELD):
                rows = self.pending[start : start + HELD]
                worker.held += len(rows)
                now = time.monotonic()
                await worker.waiting.add(
                    LeasedRow(1, at, 0, row.key, row.id, row.request, now) for at, row in enumerate(rows)
                )
                while worker.held:
                    worker.rows_released.clear()
                    await worker.rows_released.wait()
            await worker.waiting.end()
            await asyncio.gather(*slots)

        self._us("ask_us", least(lambda: asyncio.run(go())))

    def write(self) -> None:
        """A worker's segments, and their merges."""
        fs, root = self.context.fs, self.context.root
        records = [
            Record(row.key, row.id, self._answer(row), time.time())
            for row in self.pending[: self.rows // FLUSHED * FLUSHED]
        ]
        folder = Path(root, SEGMENTS)
        paths: list[str] = []

        def flush() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            paths.clear()
            for at in range(0, len(records), FLUSHED):
                paths.append(write_segment(fs, root, "w1", records[at : at + FLUSHED]))

        self._us("segment_us", least(flush), len(records))
        self.found["segment_bytes"] = round(sum(Path(path).stat().st_size for path in paths) / len(records), 1)
        small = [write_segment(fs, root, "w2", records[at : at + 200]) for at in range(0, 200 * FAN, 200)]
        compactor, began = Compactor(fs, root, "w2"), time.process_time()
        for path in small:
            compactor.add(path)
        self._us("merge_us", time.process_time() - began, 200 * FAN)
        flush()

    def _answer(self, row: PendingRequest) -> Completion:
        message = {"role": "assistant", "content": json.loads(row.request)["messages"][-1]["content"]}
        usage = Usage(input=20, output=20)
        return Completion([Choice(message, "stop")], usage=usage, engine="echo", model="echo", cost_usd=0.0, attempts=1)

    def index(self) -> None:
        """Reading the ledger, and finding keys in it."""
        fs, root = self.context.fs, self.context.root
        self._us("index_read_us", least(lambda: read_index(fs, root)))
        index = self.known = read_index(fs, root)
        arrays = [getattr(index, name) for name in index.__slots__]
        self.found["index_bytes"] = round(sum(a.nbytes for a in arrays if isinstance(a, np.ndarray)) / len(index), 1)
        keys = pa.array([row.key for row in self.pending], pa.binary(32))
        self._us("lookup_us", least(lambda: [index.locate(keys.slice(at, 2000)) for at in range(0, self.rows, 2000)]))
        reader = self.context.row_reader
        whole = least(self._each(lambda split: read_split(split, reader, index, False, SplitSummary())))
        self._us("skip_us", whole)

    def finalize(self) -> None:
        """The tasks of finalize, and the driver's part of it."""
        context, output = self.context, self.context.config.output
        jobs = plan_jobs(self.splits, self.summaries, self.known.answer_bytes)
        writer = PartWriter(context.row_reader, plan_columns(self.splits, self.summaries, context.row_reader), output)
        results: list[JobResult] = []

        def run() -> None:
            results.clear()
            results.extend(writer.run(job, self.known) for job in jobs)

        self._us("finalize_us", least(run))
        parts = [path.stat().st_size for path in Path(context.root, "data").iterdir()]
        self.found["part_bytes"] = round(sum(parts) / self.rows, 1)
        self.found["result_bytes"] = round(len(pickle.dumps(results)) / self.rows, 1)
        context.state = type("State", (), {"now": RunStatus()})()  # type: ignore[assignment]

        def collect() -> None:
            written = WrittenOutput(np.full(len(self.known), -1, np.int8))
            for result in results:
                written.add(result)
            assert written.rows == self.rows and not written.missing
            make_manifest(context, self.splits, self.summaries, written, self.known, {})

        self._us("driver_us", least(collect))

    def dedup(self) -> None:
        """The dispatcher's set of keys."""
        filter = DedupFilter()
        for at in range(0, self.rows, 2000):
            filter.add([row.key for row in self.pending[at : at + 2000]])
        self.found["dedup_bytes"] = round(sum(run.nbytes for run in filter._runs) / self.rows, 1)


def store_requests(segments: int = FAN, rows: int = 200) -> dict[str, Any]:
    """The requests to an object store for a segment (written, merged with others, deleted), to read a merged segment for
    the index and for a part of the output, for a part, and for an input file. S3 on loopback, without a run's claim."""
    from tests.support.s3_server import S3Server

    os.environ |= S3Server.environment
    found: dict[str, Any] = {}
    with S3Server() as server:
        counts: Counter[str] = Counter()
        server.before = lambda method, key: counts.update([method if key else "LIST"])

        def took(name: str, times: int = 1) -> None:
            each = {method: round(n / times, 2) for method, n in sorted(counts.items())}
            price = sum(PRICES[method] * n for method, n in each.items()) / 1000
            found[name] = {"requests": each, "usd": round(price, 9)}
            counts.clear()

        fs, root = resolve(f"s3://bucket/out{server.options}")
        text = Choice({"role": "assistant", "content": "an answer"}, "stop")
        compactor = Compactor(fs, root, "w1")
        for _ in range(segments):
            records = [Record(os.urandom(32), f"row-{n}", Completion([text]), 1.0) for n in range(rows)]
            compactor.add(write_segment(fs, root, "w1", records))
        took("segment", segments)
        index = read_index(fs, root)
        took("index", len(index.paths))
        read_rows(fs, index.paths[0], np.arange(100, dtype=np.int32))
        took("answers")
        write_atomic(fs, f"{root}/data/part-00000.parquet", b"0" * 1_000_000)
        took("part")
        lines = "".join(f'{{"prompt": "question {n}"}}\n' for n in range(10_000))
        write_atomic(fs, "bucket/in/a.jsonl", lines.encode())
        counts.clear()
        for split in list_file_splits(f"s3://bucket/in/a.jsonl{server.options}"):
            for _ in read_file_split(split):
                pass
        took("input")
    return found


def run(rows: int = ROWS) -> dict[str, Any]:
    collect_rarely()
    work = Path(tempfile.mkdtemp(prefix="eagleray-costs-"))
    try:
        found = Costs(work, rows).all()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    found["index_peak_bytes"] = ledger((INDEXED,))[0]["peak_bytes_per_row"]
    return {"rows": rows, "parts": found, "store": store_requests()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.costs")
    parser.add_argument("--rows", type=int, default=ROWS, help="0: measure nothing, only take --run")
    parser.add_argument("--run", type=Path, help="the figures that bench.scale wrote with --out")
    parser.add_argument("--out", type=Path, default=COSTS)
    args = parser.parse_args()
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    about = {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "cpus": os.cpu_count(),
    }
    if args.rows:
        found |= {"costs": {**about, **run(args.rows)}}
    if args.run:
        found |= {"run": {**about, **json.loads(args.run.read_text())}}
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
