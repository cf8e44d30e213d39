"""Delta Lake and Lance tables as datasets."""

from __future__ import annotations

import dataclasses
import datetime
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engines.errors import ConfigError, ErrorCode
from engines.types import Choice, Completion
from pipeline.dataset.read import read_file_split, read_table
from pipeline.dataset.source import list_file_splits
from pipeline.executors import registry
from pipeline.run import Outcome
from tests.support.infer import Infer
from tests.support.length_executor import LengthExecutor
from tests.support.pages import ROOT

deltalake = pytest.importorskip("deltalake")
lance = pytest.importorskip("lance")

TYPED = pa.table(
    {
        "prompt": ["a", "b", "c"],
        "n": pa.array([1, None, 3], pa.int32()),
        "day": pa.array([datetime.date(2026, 1, 2)] * 3),
        "vector": pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float32())),
        "part": ["x y", "c/d", None],
    }
)


class AnswersHere(LengthExecutor):
    """Answers each row with its question, without Ray."""

    def _record(self, row: Any) -> Any:
        record = super()._record(row)
        if record is None:
            return None
        text = json.loads(row["request"])["messages"][-1]["content"]
        completion = Completion([Choice({"role": "assistant", "content": text}, "stop")], engine="length")
        return dataclasses.replace(record, completion=completion)


@pytest.fixture
def infer(tmp_path: Path) -> Iterator[Infer]:
    registry.register("length", AnswersHere)
    infer = Here(tmp_path / "out")
    yield infer
    registry.unregister("length")


class Here(Infer):
    def __call__(self, dataset: Any, *overrides: str, engine: str = "echo") -> Outcome:
        return super().__call__(dataset, "run.mode=length", *overrides, engine=engine)


def rows(path: object) -> list[dict[str, Any]]:
    return [row.columns or {} for split in list_file_splits(str(path)) for batch in read_file_split(split) for row in batch]


def test_a_delta_table_is_read_at_one_version_with_its_types(tmp_path: Path, infer: Infer) -> None:
    table = tmp_path / "t"
    deltalake.write_deltalake(table, TYPED, partition_by=["part", "n"])
    deltalake.write_deltalake(table, TYPED.slice(0, 1).set_column(0, "prompt", [["d"]]), mode="append")
    assert {row["prompt"] for row in rows(table)} == set("abcd")
    deltalake.DeltaTable(table).delete("prompt = 'b'")  # its file stays in the directory
    assert {row["prompt"] for row in rows(table)} == {row["prompt"] for row in rows(f"delta://{table}")} == set("acd")
    first = sorted(rows(f"delta://{table}@0"), key=lambda row: row["prompt"])
    assert first == TYPED.to_pylist()
    assert infer(f"delta://{table}@0").exit_status == 0
    found = infer.table()
    for name in TYPED.column_names:
        assert found.schema.field(name).type == TYPED.schema.field(name).type
    assert sorted(found["response"].to_pylist()) == ["a", "b", "c"]
    with pytest.raises(ConfigError, match="cannot read the Delta table") as missing:
        list_file_splits(f"delta://{table}@9")
    assert missing.value.code == ErrorCode.TABLE


def test_a_directory_of_delta_tables_is_not_read_as_files(tmp_path: Path) -> None:
    deltalake.write_deltalake(tmp_path / "in" / "t", TYPED)
    with pytest.raises(ConfigError, match=f"{tmp_path}/in/t is a Delta table: name it by itself"):
        list_file_splits(tmp_path / "in")


def test_a_delta_table_with_deletion_vectors_or_mapped_names_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "t"
    deltalake.write_deltalake(table, TYPED)
    log = table / "_delta_log" / "00000000000000000000.json"
    actions = [json.loads(line) for line in log.read_text().splitlines()]
    for action in actions:
        if "protocol" in action:
            action["protocol"] = {"minReaderVersion": 2, "minWriterVersion": 5}
        if "metaData" in action:
            action["metaData"]["configuration"] = {"delta.columnMapping.mode": "name"}
    log.write_text("\n".join(map(json.dumps, actions)))
    with pytest.raises(ConfigError) as refused:
        list_file_splits(table)
    assert refused.value.code == ErrorCode.TABLE


def test_a_lance_table_is_read_in_order_without_its_deleted_rows(
    tmp_path: Path, infer: Infer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.dataset.tables.LANCE_ROWS", 2)
    path = tmp_path / "t.lance"
    table = lance.write_dataset(TYPED, path)
    table.insert(pa.concat_tables([TYPED, TYPED]))
    splits = list_file_splits(path)
    assert [(split.start, split.stop) for split in splits] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)]
    table.delete("prompt = 'b'")
    assert rows(path) == [row for row in TYPED.to_pylist() * 3 if row["prompt"] != "b"]
    before = [batch for split in splits for batch in read_table(split)]  # the version that was listed
    assert pa.Table.from_batches(before).to_pylist() == TYPED.to_pylist() * 3
    assert infer(path, "dataset.limit=5").exit_status == 0
    found = infer.table()
    assert found["response"].to_pylist() == ["a", "c", "a", "c", "a"]
    for name in TYPED.column_names:
        assert found.schema.field(name).type == TYPED.schema.field(name).type
    with pytest.raises(ConfigError, match="cannot read the Lance table"):
        list_file_splits(tmp_path / "none.lance")


# --- tables as outputs ---------------------------------------------------------------------------------------------------


def read(path: str) -> pa.Table:
    return deltalake.DeltaTable(path).to_pyarrow_table() if "lance" not in path else lance.dataset(path).to_table()


@pytest.fixture(params=["delta", "lance"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """A table as `output.table` names it, and its directory."""
    folder = str(tmp_path / ("table" if request.param == "delta" else "table.lance"))
    return (f"delta://{folder}" if request.param == "delta" else folder), folder


def test_each_answered_row_is_appended_once(infer: Infer, target: tuple[str, str], tmp_path: Path) -> None:
    name, folder = target
    path = tmp_path / "in.jsonl"
    lines = [json.dumps({"prompt": text, "n": 1}) for text in ("a", "b", "a", "c")]
    path.write_text("\n".join([*lines, "{"]))
    outcome = infer(path, f"output.table={name}")
    assert (outcome.exit_status, outcome.manifest["table"]) == (3, {"path": name, "rows_appended": 4, "commits": 1})
    assert sorted(read(folder)["response"].to_pylist()) == ["a", "a", "b", "c"]
    assert infer(path, f"output.table={name}", "run.retry_failed=false").exit_status == 3
    # More rows, another of the same request, and one that now can be read.
    path.write_text("\n".join([*lines, *lines[:1], '{"prompt": "d", "more": true}']))
    assert infer(path, f"output.table={name}").manifest["table"] == {"path": name, "rows_appended": 2, "commits": 2}
    found = read(folder)
    assert sorted(found["response"].to_pylist()) == ["a", "a", "a", "b", "c", "d"]
    assert sorted(found["more"].to_pylist(), key=str) == [None] * 5 + [True]
    # Another output into the same table, and an output that starts again.
    other = Here(tmp_path / "other")
    assert other(path, f"output.table={name}").manifest["table"]["rows_appended"] == 6
    assert infer(path, f"output.table={name}", "run.resume=false").manifest["table"]["rows_appended"] == 6
    assert len(read(folder)) == 18


def test_a_table_keeps_the_types_of_columns(infer: Infer, target: tuple[str, str], tmp_path: Path) -> None:
    name, folder = target
    typed = TYPED.append_column("small", pa.array([1, 255, 3], pa.uint8()))
    pq.write_table(typed, tmp_path / "in.parquet")
    infer(tmp_path / "in.parquet", f"output.table={name}")
    found = read(folder)
    assert {row["prompt"]: row["small"] for row in found.to_pylist()} == {"a": 1, "b": 255, "c": 3}
    for column in TYPED.column_names:
        kind = TYPED.schema.field(column).type
        assert found.schema.field(column).type in (kind, pa.list_(pa.field("element", pa.float32())))


def test_what_is_no_table_is_refused_before_the_run(infer: Infer, tmp_path: Path) -> None:
    for keys, reason in (
        ([f"output.table={tmp_path}/x"], "is not a table"),
        ([f"output.table={tmp_path}/x.lance", "output=jsonl"], "needs output.format=parquet"),
    ):
        with pytest.raises(ConfigError, match=reason):
            infer(tmp_path / "in.jsonl", *keys)


KILLED = """
import hashlib, os, random, signal, sys, threading, time
from pathlib import Path
import pyarrow as pa, pyarrow.fs as pafs, pyarrow.parquet as pq
from pipeline.output import table_append, table_sinks

root, name = sys.argv[1:]
Path(root, "data").mkdir(parents=True)
random.seed(0)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def all_read(self, *args):  # the rows are on their way into the table; the commit follows
    yield from batches(self, *args)
    threading.Thread(target=lambda: (time.sleep(random.uniform(0, 0.01)), die())).start()

def half_read(self, *args):
    yield next(batches(self, *args))
    die()

def committed(self, *args):  # committed, and not yet written down in the output
    commit[type(self)](self, *args)
    die()

batches = table_append._Append._batches
commit = {kind: kind.commit for kind in (table_sinks.DeltaSink, table_sinks.LanceSink)}
for number in range(25):
    parts = {}
    for at in range(2):  # each run has more rows than the one before
        ids = [hashlib.sha256(f"{at} {row}".encode()).digest()[:16] for row in range(100 * (number + 1))]
        table = pa.table({"id": [id.hex() for id in ids], "row": pa.array(range(len(ids)), pa.int32())})
        pq.write_table(table, f"{root}/data/part-{at:05d}.parquet")
        parts[f"data/part-{at:05d}.parquet"] = b"".join(ids)
    child = 0 if number == 24 else os.fork()  # the last run is not killed
    if child == 0:
        if number % 4 == 3:
            for kind in commit:
                kind.commit = committed
        elif number < 24:
            table_append._Append._batches = half_read if number % 4 == 1 else all_read
        table_append.append_rows(pafs.LocalFileSystem(), root, name, parts)
        time.sleep(0.1 if number < 24 else 0)
        os._exit(0)
    print(os.WIFSIGNALED(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_kills_between_write_and_commit_neither_lose_nor_repeat_a_row(target: tuple[str, str], tmp_path: Path) -> None:
    name, folder = target
    words = [sys.executable, "-c", KILLED, str(tmp_path / "out"), name]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("True") >= 20
    found = read(folder)
    assert len(found["id"].to_pylist()) == len(set(found["id"].to_pylist())) == 5000
    assert found.schema.field("row").type == pa.int32()
