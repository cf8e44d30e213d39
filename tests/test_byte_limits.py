"""Memory is bounded in bytes, not only in rows: in the queue, leases, workers, engines, segments and merges."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engines.config import EngineConfig
from engines.params import GenerationParams
from engines.types import Choice, Completion, Request, answer
from pipeline.dataset.formats import RowParser
from pipeline.dataset.keys import RequestHasher
from pipeline.dataset.read import read_file_split
from pipeline.dataset.reader import ReadSplit, RowReader
from pipeline.dataset.source import list_file_splits
from pipeline.executors.live import byte_limits, feed, flusher, lease_table, waiting_rows, worker
from pipeline.executors.live.admission import Admission
from pipeline.executors.live.byte_limits import count_within, result_bytes
from pipeline.executors.live.crash_trial import CrashTrial
from pipeline.executors.live.dispatcher import Dispatcher
from pipeline.executors.live.flusher import Flusher
from pipeline.executors.live.lease_table import LeaseTable
from pipeline.executors.live.queue import PrefixQueue
from pipeline.executors.live.recorder import LeasedRow, RowRecorder
from pipeline.executors.live.worker import Worker, WorkerConfig
from pipeline.executors.requests import PendingRequest
from pipeline.monitor.status import RunStatus
from pipeline.storage import ledger
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger import Compactor, Record, list_segments, read_segment, write_segment
from pipeline.storage.ledger_index import Index, read_index
from tests.support.infer import ask
from tests.support.processes import PATIENCE_S, until
from tests.support.s3_server import S3Server

MB = 1 << 20
Write = Callable[..., Path]


def pending(count: int, size: int) -> list[PendingRequest]:
    return [PendingRequest(b"%032d" % i, f"r{i}", b"x" * size, i % 3, 0) for i in range(count)]


def test_leading_items_within_a_limit_are_at_least_one() -> None:
    assert [count_within([3, 3, 3], limit) for limit in (0, 3, 6, 8, 9, 100)] == [1, 1, 2, 2, 3, 3]
    assert count_within([], 5) == 0


def test_all_texts_of_a_result_count() -> None:
    message = {**answer("a" * 1000), "reasoning_details": [{"text": "b" * 500}]}
    logprob = {"token": "x", "logprob": -1.0, "top_logprobs": [{"token": "x", "logprob": -1.0}] * 20}
    completion = Completion([Choice(message, "stop", [logprob] * 10)], reasoning="c" * 200)  # type: ignore[arg-type]
    completion.dialogue = [answer("d" * 3000)]
    assert 4700 + 10 * 21 * 50 < result_bytes(completion) < 4700 + 10 * 21 * 200


def test_leases_are_bounded_in_bytes_and_all_leases_together() -> None:
    table = LeaseTable(PrefixQueue(), CrashTrial(), Admission(None, ""))
    table.queue.add(pending(2000, MB))
    assert table.queue.bytes == 2000 * MB
    for name in ("w1", "w2", "w3"):
        table.join(name)
    share = byte_limits.LEASED_BYTES // 3
    held = Counting()
    for name in ("w1", "w2", "w3"):
        while (lease := table.lend(name, 512, held.rows[name], False)) is not None:
            assert len(lease) >= 1 and sum(map(len, lease.requests)) <= byte_limits.LEASE_BYTES
            held.add(name, len(lease), lease.number)
        assert share - byte_limits.LEASE_BYTES < held.rows[name] * MB <= share + byte_limits.LEASE_BYTES
    assert table.queue.bytes == (2000 - sum(held.rows.values())) * MB
    # The memory of durable rows is free, and their place as well.
    number = held.leases["w1"][0]
    lease_rows = table.leases["w1"][number].rows
    table.commit("w1", [(number, [0, 1])])
    assert [len(row.request) for row in lease_rows[:3]] == [0, 0, MB]
    before = table.held_bytes["w1"]
    table.leave("w1", None, None)
    assert table.queue.bytes == (2000 - sum(held.rows.values())) * MB + before and table.held_bytes["w1"] == 0


class Counting:
    def __init__(self) -> None:
        self.rows: dict[str, int] = dict.fromkeys(("w1", "w2", "w3"), 0)
        self.leases: dict[str, list[int]] = {name: [] for name in self.rows}

    def add(self, name: str, rows: int, number: int) -> None:
        self.rows[name] += rows
        self.leases[name].append(number)


def test_a_row_larger_than_every_limit_is_leased() -> None:
    table = LeaseTable(PrefixQueue(), CrashTrial(), Admission(None, ""))
    table.queue.add(pending(2, byte_limits.LEASED_BYTES + 1))
    for name in ("w1", "w2"):
        lease = table.lend(name, 512, 0, True)
        assert lease is not None and len(lease) == 1
        assert table.lend(name, 512, 1, True) is None


# -- a whole worker and its dispatcher, in this process ---------------------------------------------------------------

SIZE = 100_000  # bytes of a row's text and of its answer
LIMITS = {
    "BUFFER_BYTES": 10 * SIZE, "LEASE_BYTES": 6 * SIZE, "LEASED_BYTES": 40 * SIZE, "HELD_BYTES": 20 * SIZE,
    "ENGINE_BYTES": 8 * SIZE, "SEGMENT_BYTES": 5 * SIZE, "UNWRITTEN_BYTES": 10 * SIZE,
}  # fmt: skip


class Direct:
    """Calls the methods of an actor's class in this process."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.actor, name))


class Measured(Worker):
    """Notes the most that it holds. It holds most just after a row entered the engine."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.most = dict.fromkeys(("engine", "held", "unwritten", "queue", "leased"), 0)

    def note(self) -> None:
        dispatcher = self.dispatcher.actor
        inside = sum(len(row.request) for row in self.inside.values())
        now = {
            "engine": inside,
            "held": inside + sum(len(row.request) for row in self.waiting.rows),
            "unwritten": sum(len(record.completion.text or "") for record in self.recorder.records),
            "queue": dispatcher.queue.bytes,
            "leased": sum(len(row.request) for lease in dispatcher.table.leases[self.name].values() for row in lease.rows),
        }
        self.most = {name: max(value, now[name]) for name, value in self.most.items()}


def test_no_part_of_a_run_holds_more_bytes_than_it_may(
    local_ray: None, tmp_path: Path, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    for module in (feed, flusher, lease_table, waiting_rows, worker):
        for name, value in LIMITS.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr("pipeline.dataset.read.BATCH_BYTES", 2 * SIZE)
    data = write_jsonl([ask(f"{i} " + "x" * SIZE, id=f"r{i}") for i in range(200)])
    engine, params = EngineConfig(kind="echo", max_concurrency=64, kwargs={"latency_s": 0.01}), GenerationParams()
    reader = RowReader(RowParser(), RequestHasher(engine, params), 32 * MB)
    splits = [ReadSplit(at, split) for at, split in enumerate(list_file_splits(data))]
    config = WorkerConfig(engine, params, str(tmp_path / "out"), 60.0, 5.0, 5.0, 0)

    async def run() -> dict[str, int]:
        dispatcher = Dispatcher(splits, reader, [ray.put(Index.empty())], False, small=True)
        await dispatcher.start(None)
        measured = Measured(config, "w1", Direct(dispatcher))
        to_request = worker._request

        def noted(row: LeasedRow, config: WorkerConfig) -> Request:
            measured.note()
            return to_request(row, config)

        monkeypatch.setattr(worker, "_request", noted)
        await measured.run(worker.Secrets({}))
        assert (await dispatcher.status()).done == 200
        return measured.most

    most = asyncio.run(run())
    fs, root = resolve(str(tmp_path / "out"))
    assert len(read_index(fs, root)) == 200
    row = SIZE + 200  # a row's request is a little longer than its text
    assert 5 * SIZE < most["engine"] <= LIMITS["ENGINE_BYTES"]
    assert most["engine"] < most["held"] <= LIMITS["HELD_BYTES"]
    assert most["queue"] <= LIMITS["BUFFER_BYTES"] + 3 * row  # one batch of the reader may come on top
    assert most["leased"] <= LIMITS["LEASED_BYTES"] + LIMITS["LEASE_BYTES"]
    assert most["unwritten"] <= LIMITS["UNWRITTEN_BYTES"] + LIMITS["ENGINE_BYTES"]  # what was in the engine then
    # `run.flush_s` is a minute: the size of the answers was the reason to write.
    assert len(list_segments(fs, root)) >= 200 * SIZE // (LIMITS["UNWRITTEN_BYTES"] + LIMITS["ENGINE_BYTES"])


def test_a_large_row_group_is_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "images.parquet"
    table = pa.table({"prompt": [f"{i} " + "x" * MB for i in range(200)], "n": range(200)})
    # Parquet's writer looks at the size of a page after each `write_batch_size` rows.
    pq.write_table(table, path, compression=None, use_dictionary=False, write_batch_size=4)
    assert pq.read_metadata(path).num_row_groups == 1
    del table
    (split,) = list_file_splits(path)
    before, most, rows = pa.total_allocated_bytes(), 0, 0
    for batch in read_file_split(split):
        most = max(most, pa.total_allocated_bytes() - before)
        assert [row.columns["n"] for row in batch if row.columns] == list(range(rows, rows + len(batch)))
        rows += len(batch)
    assert rows == 200 and most < 100 * MB


# -- segments ---------------------------------------------------------------------------------------------------------


def record(n: int, size: int = 10) -> Record:
    return Record(
        hashlib.sha256(b"%d" % n).digest(), f"r{n}", Completion([Choice(answer(f"{n} " + "y" * size), "stop")]), float(n)
    )


def test_row_groups_and_merges_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "FAN", 4)
    monkeypatch.setattr(ledger, "GROUP_BYTES", 50_000)
    fs, root = resolve(str(tmp_path))
    compactor = Compactor(fs, root, "w")
    number = 0
    for size in (10_000, 10, 30_000, 10):
        records = [record(number + at, size) for at in range(20)]
        number += 20
        compactor.add(write_segment(fs, root, "w", records))
    (path,) = list_segments(fs, root)
    metadata = pq.read_metadata(path)
    groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
    assert max(group.total_byte_size for group in groups) < 60_000
    assert max(group.num_rows for group in groups) > 20  # small segments share a group
    table = read_segment(fs, path)
    assert table["id"].to_pylist() == [f"r{n}" for n in range(80)]
    assert [len(text) for text in table["response"].to_pylist()[:20]] == [10_000 + len(f"{n} ") for n in range(20)]


def test_results_become_durable_while_a_merge_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "FAN", 4)
    for name, value in S3Server.environment.items():
        monkeypatch.setenv(name, value)
    reading, released = threading.Event(), threading.Event()

    def hold(method: str, key: str) -> None:
        """A merge reads the segments. The store does not answer it until it is released."""
        if method == "GET" and "/_segments/w1-" in key:
            reading.set()
            released.wait(PATIENCE_S)

    async def run(fs: Any, root: str) -> int:
        recorder = RowRecorder(EngineConfig(kind="echo"), 0)
        durable: list[int] = []
        changed = asyncio.Event()

        async def commit(places: list[tuple[int, list[int]]], counts: RunStatus) -> None:
            durable.extend(at for _, offsets in places for at in offsets)
            changed.set()

        async def nothing() -> None:
            pass

        flusher = Flusher(fs, root, "w1", recorder, 0.01, commit)
        tasks = [asyncio.create_task(flusher.flush_often(nothing)), asyncio.create_task(flusher.merge_often())]
        for n in range(12):
            one = record(n)
            recorder.record(LeasedRow(1, n, 0, one.key, one.id, b""), one.completion)
            while n not in durable:
                changed.clear()
                await asyncio.wait_for(changed.wait(), PATIENCE_S)
        during = len(durable) if await asyncio.to_thread(reading.wait, PATIENCE_S) and not released.is_set() else 0
        released.set()
        tasks[0].cancel()
        await flusher.flush()
        flusher.end()
        await tasks[1]
        return during

    with S3Server() as server:
        server.before = hold
        fs, root = resolve(server.uri("out"))
        assert asyncio.run(run(fs, root)) == 12
        assert len(read_index(fs, root)) == 12
        assert len(list_segments(fs, root)) == 12 - 4 + 1  # the merge under way ended; no other one began


def test_a_merge_that_began_ends_before_the_worker_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "FAN", 2)
    fs, root = resolve(str(tmp_path))
    began, may_end = threading.Event(), threading.Event()
    add = Compactor.add

    def slow(self: Compactor, path: str, level: int = 0) -> None:
        began.set()
        may_end.wait(60)
        add(self, path, level)

    monkeypatch.setattr(Compactor, "add", slow)

    async def run() -> None:
        flusher = Flusher(fs, root, "w1", RowRecorder(EngineConfig(kind="echo"), 0), 1.0, None)  # type: ignore[arg-type]
        task = asyncio.create_task(flusher.merge_often())
        flusher.to_merge.put_nowait(write_segment(fs, root, "w1", [record(1)]))
        await asyncio.to_thread(until, began.is_set)
        flusher.end()
        await asyncio.sleep(0)
        assert not task.done()
        may_end.set()
        await task

    asyncio.run(run())
