"""Segments in, index out: the best record of every key wins, whatever order they were written in."""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from engines.config import EngineConfig
from engines.errors import Failure
from engines.types import Choice, Completion, answer
from engines.usage import Usage
from pipeline.configuration.compose import compose
from pipeline.errors import Stopped
from pipeline.executors.live.flusher import Flusher
from pipeline.executors.live.recorder import LeasedRow, RowRecorder
from pipeline.monitor.status import RunStatus
from pipeline.output.export import LedgerExport
from pipeline.storage import ledger
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger import (
    ANSWER_SCHEMA,
    Compactor,
    Record,
    distinct_records,
    list_segments,
    read_records,
    read_rows,
    read_segment,
    write_segment,
)
from pipeline.storage.ledger_index import DedupFilter, _index_of, _Keys, read_index, split_keys
from tests.support.length_executor import Job, LengthExecutor


def key(n: int) -> bytes:
    return hashlib.sha256(str(n).encode()).digest()


def good(text: str = "x") -> Completion:
    return Completion([Choice(answer(text), "stop")], Usage(10, 3, 5))


def bad() -> Completion:
    return Completion(error=Failure("server", "down", 503, True))


def test_a_segment_gives_back_what_was_written(tmp_path: Path) -> None:
    fs, root = resolve(str(tmp_path))
    path = write_segment(fs, root, "w1", [Record(key(1), "a", good("héllo\n"), 5.0), Record(key(2), "b", bad(), 6.0)])
    rows = read_segment(fs, path).to_pylist()
    assert rows[0]["response"] == "héllo\n"
    assert rows[0]["usage"] == {"input": 10, "cached_input": 3, "output": 5, "cache_write": 0, "reasoning": 0}
    assert rows[0]["error"] is None
    assert rows[1]["error"] == {"type": "server", "message": "down", "status": 503, "retryable": True}
    assert rows[1]["usage"] is None


def test_a_success_beats_a_failure_and_the_latest_beats_the_earlier(tmp_path: Path) -> None:
    fs, root = resolve(str(tmp_path))
    write_segment(fs, root, "w", [Record(key(1), "", good("old"), 1.0), Record(key(2), "", good(), 1.0)])
    write_segment(fs, root, "w", [Record(key(1), "", good("new"), 2.0), Record(key(2), "", bad(), 9.0)])
    write_segment(fs, root, "w", [Record(key(3), "", bad(), 1.0)])
    index = read_index(fs, root)
    at = index.find([key(1), key(2), key(3), key(4)])
    assert list(at >= 0) == [True, True, True, False]
    assert list(index.failed[at[:3]]) == [False, False, True]
    segment = read_segment(fs, index.paths[index.segment[at[0]]])
    assert segment["response"][index.row[at[0]]].as_py() == "new"
    assert list(index.only(failed_count_as_answered=False).find([key(1), key(3)]) >= 0) == [True, False]
    assert index.tokens[at[0]].tolist() == [20, 6, 10, 0, 0]  # of both its records: both may have been paid


def test_a_writers_segments_are_merged_and_no_row_is_ever_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "FAN", 4)
    fs, root = resolve(str(tmp_path))
    other = write_segment(fs, root, "w2", [Record(key(-1), "another's", good(), 0.0)])
    compactor = Compactor(fs, root, "w1")
    stop, fewest = threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            at_least = len(done)
            fewest.append(len(read_index(fs, root)) - 1 - at_least)

    done: list[int] = []
    reader = threading.Thread(target=look)
    reader.start()
    for n in range(70):
        compactor.add(write_segment(fs, root, "w1", [Record(key(n), f"r{n}", good(str(n)) if n % 3 else bad(), float(n))]))
        done.append(n)
    stop.set()
    reader.join()
    assert min(fewest) >= 0 and len(fewest) > 3
    paths = list_segments(fs, root)
    assert other in paths and len(paths) == 1 + 1 + 1 + 2  # 64, 4, and 2 that wait
    index = read_index(fs, root)
    assert len(index) == 71 and not index.torn and int(index.failed.sum()) == 24
    for n in range(70):
        at = index.find([key(n)])[0]
        row = read_segment(fs, index.paths[index.segment[at]]).slice(index.row[at], 1).to_pylist()[0]
        assert (row["id"], row["response"]) == (f"r{n}", str(n) if n % 3 else None)


def test_segments_that_are_large_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "FAN", 2)
    monkeypatch.setattr(ledger, "FULL_BYTES", 100)
    fs, root = resolve(str(tmp_path))
    compactor = Compactor(fs, root, "w")
    paths = [write_segment(fs, root, "w", [Record(key(n), "", good(), 0.0)]) for n in range(5)]
    for path in paths:
        compactor.add(path)
    assert list_segments(fs, root) == sorted(paths)


def test_rows_of_a_segment_are_read_in_the_order_asked_for_whatever_their_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "GROUP_ROWS", 7)
    fs, root = resolve(str(tmp_path))
    path = write_segment(fs, root, "w", [Record(key(n), f"r{n}", good(f"t{n}"), 0.0) for n in range(50)])
    assert pq.read_metadata(path).num_row_groups == 8
    wanted = [49, 3, 3, 28, 0, 21, 34, 35]
    table = read_rows(fs, path, np.array(wanted, np.int32))
    assert table["response"].to_pylist() == [f"t{n}" for n in wanted]
    assert table.schema == ANSWER_SCHEMA


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.integers(0, 5)), max_size=12), max_size=6))
def test_the_best_record_of_each_key_is_found_in_any_order(segments: list[list[tuple[int, bool, int]]]) -> None:
    """Held against a plain search; keys come in pairs that agree in their first 64 bits."""

    def twin(n: int) -> bytes:
        return key(n // 2)[:8] + key(n)[8:]

    def part(rows: list[tuple[int, bool, int]]) -> Any:
        hi, lo = split_keys([twin(n) for n, _, _ in rows])
        failed, done_at = np.array([f for _, f, _ in rows], np.uint8), np.array([t for _, _, t in rows], np.int64)
        none = np.zeros(len(rows))
        return _Keys(hi, lo, failed, done_at, np.zeros((len(rows), 5), np.uint32), none, none.astype(np.uint8),
                     none.astype(np.uint16))  # fmt: skip

    index = _index_of([str(at) for at in range(len(segments))], [part(rows) for rows in segments])
    best: dict[int, tuple[bool, int]] = {}
    for rows in segments:
        for n, failed, done_at in rows:
            best[n] = min(best.get(n, (failed, -done_at)), (failed, -done_at))
    assert len(index) == len(best)
    at, segment, row = index.locate([twin(n) for n in best])
    assert (at >= 0).all()
    found = [segments[s][r] for s, r in zip(segment, row, strict=True)]
    assert [(n, failed, -done_at) for n, failed, done_at in found] == [(n, *best[n]) for n in best]


def test_large_rows_are_in_small_row_groups_also_after_a_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "FAN", 3)
    monkeypatch.setattr(ledger, "GROUP_BYTES", 50_000)
    fs, root = resolve(str(tmp_path))
    compactor = Compactor(fs, root, "w")
    for number in range(3):
        records = [Record(key(n), f"r{n}", good(str(n) * 5000), 0.0) for n in range(10 * number, 10 * number + 10)]
        compactor.add(write_segment(fs, root, "w", records))
    (path,) = list_segments(fs, root)
    metadata = pq.read_metadata(path)
    sizes = [metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups)]
    assert sum(metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)) == 30
    assert len(sizes) >= 4 and max(sizes) < 2 * 50_000
    assert read_segment(fs, path)["response"].to_pylist() == [str(n) * 5000 for n in range(30)]
    assert read_rows(fs, path, np.array([29, 0, 15, 0], np.int32))["response"].to_pylist() == [
        str(n) * 5000 for n in (29, 0, 15, 0)
    ]


def test_the_index_says_how_large_records_are(tmp_path: Path) -> None:
    fs, root = resolve(str(tmp_path))
    write_segment(fs, root, "w", [Record(key(n), "", good(f"{n}" * 10_000), 1.0) for n in range(4)])
    assert 10_000 < read_index(fs, root).answer_bytes < 20_000
    assert read_index(fs, root).old_until_ms == 0


def test_an_empty_ledger_finds_nothing(tmp_path: Path) -> None:
    index = read_index(*resolve(str(tmp_path / "none")))
    assert len(index) == 0
    assert index.find([key(1)]).tolist() == [-1]


def test_keys_that_agree_in_their_first_64_bits_are_told_apart(tmp_path: Path) -> None:
    fs, root = resolve(str(tmp_path))
    twins = [b"\1" * 8 + bytes([n]) * 24 for n in (1, 2, 3)]
    write_segment(fs, root, "w", [Record(k, str(n), good(str(n)), 1.0) for n, k in enumerate(twins)])
    index = read_index(fs, root)
    texts = read_segment(fs, index.paths[0])["response"].to_pylist()
    assert [texts[index.row[at]] for at in index.find(twins)] == ["0", "1", "2"]
    assert index.find([b"\1" * 8 + b"\4" * 24]).tolist() == [-1]


@given(st.lists(st.lists(st.integers(0, 60), max_size=30), max_size=12))
def test_seen_keys_agrees_with_a_set(blocks: list[list[int]]) -> None:
    seen, model = DedupFilter(), set[int]()
    for block in blocks:
        expected = []
        for n in block:
            expected.append(n not in model)
            model.add(n)
        assert seen.add(pa.array([key(n) for n in block], pa.binary(32))).tolist() == expected


@given(st.lists(st.binary(min_size=32, max_size=32), unique=True, min_size=1), st.integers(0, 3))
def test_split_keys_sort_like_the_keys_and_survive_slicing(keys: list[bytes], skip: int) -> None:
    hi, lo = split_keys(sorted(keys))
    pairs = list(zip(hi.tolist(), lo.tolist(), strict=True))
    assert pairs == sorted(pairs)
    sliced = pa.array(keys, pa.binary(32)).slice(skip)
    assert np.array_equal(split_keys(sliced)[0], split_keys(keys[skip:])[0])


def test_a_damaged_segment_ends_no_merging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "FAN", 2)
    fs, root = resolve(str(tmp_path))
    flusher = Flusher(fs, root, "w1", RowRecorder(EngineConfig(kind="echo"), 0), 1.0, None)  # type: ignore[arg-type]
    paths = [write_segment(fs, root, "w1", [Record(key(n), f"r{n}", good(), float(n))]) for n in range(6)]
    Path(paths[1]).write_bytes(b"no Parquet")  # pyarrow's own error
    Path(paths[3]).write_bytes(Path(paths[3]).read_bytes()[:-20])  # cut off

    async def merge() -> None:
        for path in [*paths, None]:
            flusher.to_merge.put_nowait(path)
        await flusher.merge_often()

    asyncio.run(merge())
    left = list_segments(fs, root)
    assert set(paths[:4]) <= set(left) and len(left) == 5  # the last two became one
    assert sorted(read_segment(fs, (set(left) - set(paths)).pop())["id"].to_pylist()) == ["r4", "r5"]


def test_a_try_and_the_answer_after_it_are_two_records_and_a_copy_is_none() -> None:
    key, at = np.array([7, 7, 7, 8], np.uint64), np.array([5, 5, 5, 5])
    assert sorted(distinct_records(key, at, np.array([True, False, False, False])).tolist()) == [0, 1, 3]


HALF = "\ud83d"  # half of a UTF-16 pair, which UTF-8 cannot encode


class Commits:
    """A worker's recorder and flusher. Keeps what they report to the dispatcher."""

    def __init__(self, root: Path) -> None:
        fs, place = resolve(str(root))
        self.recorder = RowRecorder(EngineConfig(kind="echo"), 0, budget=False)
        self.flusher = Flusher(fs, place, "w1", self.recorder, 1.0, self._commit)
        self.places: list[tuple[int, list[int]]] = []
        self.counts = RunStatus()

    async def _commit(self, places: list[tuple[int, list[int]]], counts: RunStatus) -> None:
        self.places, self.counts = places, counts

    def record(self, *completions: Completion) -> None:
        for at, completion in enumerate(completions):
            self.recorder.record(LeasedRow(7, at, 0, key(at), f"r{at}", b"{}"), completion)

    def flush(self) -> None:
        asyncio.run(self.flusher.flush())

    def rows(self) -> list[dict[str, Any]]:
        paths = list_segments(self.flusher.fs, self.flusher.root)
        found = [row for path in paths for row in read_segment(self.flusher.fs, path).to_pylist()]
        return sorted(found, key=lambda row: row["id"])


@pytest.mark.parametrize(
    "lost",
    [
        Completion([Choice(answer(f"Great {HALF}"), "length")], Usage(10, 0, 5), cost_usd=2.0),
        Completion([Choice(answer(None, [{"function": {"arguments": HALF}}]), "length")], Usage(10, 0, 5), cost_usd=2.0),
        Completion([Choice(answer("x"), "length")], Usage(1 << 70, 0, 5), cost_usd=2.0),
    ],
    ids=["text", "tool call", "tokens"],
)
def test_an_answer_that_cannot_be_written_fails_alone(tmp_path: Path, lost: Completion) -> None:
    commits = Commits(tmp_path)
    commits.record(good("paid 0"), lost, good("paid 2"), bad())
    commits.flush()
    first, second, third, fourth = commits.rows()
    assert (first["response"], third["response"], fourth["error"]["type"]) == ("paid 0", "paid 2", "server")
    assert second["error"]["type"] == "bad_response" and "cannot be stored" in second["error"]["message"]
    assert (second["response"], second["cost_usd"]) == (None, 2.0)
    assert (second["usage"] or {"output": 5})["output"] == 5
    assert commits.places == [(7, [0, 1, 2, 3])] and not commits.counts.truncations
    assert (commits.counts.done, commits.counts.failed, commits.counts.cost_usd) == (2, 2, 2.0)
    assert sorted(commits.counts.failures) == [(7, 1, "bad_response"), (7, 3, "server")]
    assert not commits.recorder.records and not commits.recorder.unwritten


def test_names_and_messages_that_cannot_be_written_cost_no_answer(tmp_path: Path) -> None:
    commits = Commits(tmp_path)
    named, refused = good(), bad()
    named.model, refused.error = f"m{HALF}", Failure("server", f"down {HALF}")
    commits.record(named, refused)
    commits.flush()
    first, second = commits.rows()
    assert (first["response"], first["model"], first["error"]) == ("x", "m\\ud83d", None)
    assert second["error"]["message"] == "down \\ud83d" == commits.counts.first_errors["server"].partition(": ")[2]


def test_no_exception_of_a_flush_loses_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = Commits(tmp_path)
    commits.record(good("paid 0"), Completion([Choice(answer(HALF), "stop")]), good("paid 2"))
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "write_atomic", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            commits.flush()
    commits.flush()
    assert [row["response"] for row in commits.rows()] == ["paid 0", None, "paid 2"]
    assert commits.places == [(7, [0, 1, 2])]
    assert (commits.counts.done, commits.counts.failed) == (2, 1)


def damage(path: str, column: str) -> None:
    """Overwrites values of one column. The file keeps its size and its footer."""
    group = pq.ParquetFile(path).metadata.row_group(0)
    [chunk] = [found for at in range(group.num_columns) if (found := group.column(at)).path_in_schema == column]
    data = bytearray(Path(path).read_bytes())
    start = chunk.data_page_offset + 60
    data[start : start + 200] = bytes(byte ^ 0x5A for byte in data[start : start + 200])
    Path(path).write_bytes(data)


def test_a_segment_with_damaged_answers_stops_the_run_until_it_is_moved_away(
    job: Job, length: type[LengthExecutor], write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, answers = ledger.write_segment, [hashlib.sha256(key(n)).hexdigest() for n in range(200)]

    def with_long_answers(fs: Any, root: str, writer: str, records: list[Record]) -> str:
        for record, text in zip(records, answers, strict=False):
            record.completion = good(text)
        return write(fs, root, writer, records)

    monkeypatch.setattr("tests.support.length_executor.write_segment", with_long_answers)
    data = write_jsonl([{"id": str(n), "prompt": f"p{n}"} for n in range(200)])
    job(data)
    fs, root = resolve(str(job.out))
    [path] = list_segments(fs, root)
    damage(path, "response")
    assert len(read_index(fs, root)) == 200
    config = compose(["engine=echo", f"dataset.path={data}", f"output.path={root}"])
    assert read_records(fs, path, ["key", "response"]) is None and read_records(fs, path, ["key"]) is not None
    for _ in range(2):
        with pytest.raises(Stopped, match=f"the segment {path} is damaged .* move it away, and the run asks its rows"):
            job(data, "output=jsonl")
    with pytest.raises(OSError, match=f"{path} is damaged"):
        list(LedgerExport(config, fs, root, Console(file=io.StringIO())).rows())
    Path(path).rename(job.out.parent / "away.parquet")
    job(data, "output=jsonl")
    assert length.passes == [200, 0, 0, 200]


def test_a_segment_that_the_store_does_not_give_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, root = resolve(str(tmp_path))
    path = write_segment(fs, root, "w", [Record(key(1), "", good(), 1.0)])

    def fail(*_: Any) -> None:
        raise OSError("access denied")

    monkeypatch.setattr(ledger, "read_columns", fail)
    assert read_records(fs, path, ["key"]) is None  # the file can be read
    monkeypatch.setattr(ledger, "_read_through", fail)
    with pytest.raises(OSError, match="access denied"):
        read_records(fs, path, ["key"])
