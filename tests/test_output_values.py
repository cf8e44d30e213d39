"""Values of the input that Python or Parquet cannot hold, and columns with our names: the output has them all. No Ray."""

from __future__ import annotations

import csv
import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import export, show
from pipeline.dataset.arrow_rows import readable_values
from pipeline.dataset.column_types import input_name, stored_type
from pipeline.output.export import PartsExport
from pipeline.output.summary import first_rows
from pipeline.storage.filesystem import resolve
from tests.support.length_executor import Job


def seen_as(kind: pa.DataType, values: pa.Array) -> pa.Array:
    """The bytes of `values` as an array of another type, without a check."""
    return pa.Array.from_buffers(kind, len(values), values.buffers())


END = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
FAR = [2**62, 0, None]
# Arrays whose first value Python cannot hold; the text for it; the other values.
ODD: dict[str, tuple[pa.Array, Any, list[Any]]] = {
    "the end of time": (
        pa.array([END, None, None], pa.timestamp("us", "Asia/Tokyo")),
        "10000-01-01 08:59:59.000000+0900",
        [None, None],
    ),
    "timestamp": (pa.array(FAR, pa.timestamp("us")), f"<value out of range: {2**62}>", ["1970-01-01T00:00:00", None]),
    "date": (
        seen_as(pa.date32(), pa.array([2**30, 0, 1], pa.int32())),
        f"<value out of range: {2**30}>",
        ["1970-01-01", "1970-01-02"],
    ),
    "duration": (pa.array(FAR, pa.duration("s")), str(2**62), ["0:00:00", None]),
    "UTF-8": (seen_as(pa.string(), pa.array([b"\xff\xfe", b"ok", b""], pa.binary())), "\\xff\\xfe", ["ok", ""]),
    "list": (
        pa.array([FAR, [], None], pa.list_(pa.timestamp("us"))),
        [f"<value out of range: {2**62}>", "1970-01-01T00:00:00", None],
        [[], None],
    ),
    "struct": (
        pa.array([{"a": 2**62, "b": 1}, {"a": 0}, None], pa.struct([("a", pa.duration("s")), ("b", pa.int8())])),
        {"a": str(2**62), "b": 1},
        [{"a": "0:00:00", "b": None}, None],
    ),
    "map": (pa.array([[("a", 2**62)], [], None], pa.map_(pa.string(), pa.timestamp("us"))), None, [[], None]),
}


def odd_table(values: pa.Array) -> pa.Table:
    """The last row has no prompt, so that errors/ has a row with values that Python can hold."""
    prompts = ["x"] * (len(values) - 1) + [None]
    return pa.table({"id": [f"r{at}" for at in range(len(values))], "prompt": prompts, "v": values})


def lines(out: Path, folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted((out / folder).iterdir()) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_value_that_python_cannot_hold_ends_no_run(job: Job, tmp_path: Path, name: str, form: str) -> None:
    values, text, others = ODD[name]
    pq.write_table(odd_table(values), tmp_path / "in.parquet")
    job(tmp_path / "in.parquet", f"output={form}")
    if form == "parquet":
        assert pq.read_table(job.out / "data")["v"].equals(pa.chunked_array([values]))
        manifest = json.loads((job.out / "manifest.json").read_text())
        exported = b"".join(rows.lines() for rows in PartsExport(*resolve(str(job.out)), manifest).rows())
        assert [json.loads(line)["v"] for line in exported.splitlines()] == [text, *others]
    else:
        assert [line["v"] for line in lines(job.out, "data")] == [None, *others]  # such a row is not read
        assert [line["v"] for line in lines(job.out, "errors")] == [text, others[-1]]


def test_the_first_rows_are_shown_with_such_a_value(job: Job, tmp_path: Path) -> None:
    values = seen_as(pa.string(), pa.array([b"\xff\xfe", b"ok"], pa.binary()))
    pq.write_table(pa.table({"prompt": ["x", "y"], "text": values}), tmp_path / "in.parquet")
    job(tmp_path / "in.parquet")
    manifest = json.loads((job.out / "manifest.json").read_text())
    assert [row[2] for row in first_rows(manifest, str(job.out))][1] == "1"


@pytest.mark.parametrize("name", ["timestamp", "UTF-8", "list"])
def test_commands_show_and_export_rows_with_such_a_value(
    job: Job, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values, text, others = ODD[name]
    pq.write_table(odd_table(values), tmp_path / "in.parquet")
    job(tmp_path / "in.parquet")
    assert show.main([str(job.out), "--json"]) == 0
    shown = [json.loads(line)["v"] for line in capsys.readouterr().out.splitlines()]
    assert shown == [text, *others]
    assert export.main([str(job.out), str(tmp_path / "out.csv")]) == 0
    assert len(list(csv.DictReader((tmp_path / "out.csv").open()))) == len(values)


def test_a_column_of_two_types_has_text_for_such_a_value(job: Job, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(odd_table(ODD["timestamp"][0]), tmp_path / "in" / "1.parquet")
    pq.write_table(odd_table(pa.array(["s"])), tmp_path / "in" / "2.parquet")
    job(tmp_path / "in")
    found = pq.read_table(job.out / "data")["v"].to_pylist()
    assert [text and json.loads(text) for text in found] == [ODD["timestamp"][1], *ODD["timestamp"][2], "s"]


def test_other_values_are_those_of_arrow() -> None:
    kind = pa.list_(pa.struct([("a", pa.string())]))
    values = pa.chunked_array([pa.array([[{"a": "x"}], None, []], kind), pa.array([[{"a": None}]], kind)])
    assert readable_values(values) == values.to_pylist()


# -- types that Parquet does not have -------------------------------------------------------------------------------------

UNSTORED = {
    "interval": (pa.array([pa.MonthDayNano([1, 2, 3]), None]), ["MonthDayNano(months=1, days=2, nanoseconds=3)", None]),
    "union": (
        pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", "b"])]),
        [1, "b"],
    ),
    "run-end": (pa.RunEndEncodedArray.from_arrays([1, 2], ["a", "b"]), ["a", "b"]),
    "no fields": (pa.array([{}, None], pa.struct([])), [{}, None]),
    "inside": (pa.array([[pa.MonthDayNano([1, 0, 0])], None]), [["MonthDayNano(months=1, days=0, nanoseconds=0)"], None]),
}


@pytest.mark.parametrize("name", UNSTORED)
def test_a_column_that_parquet_does_not_have_becomes_json_text(job: Job, tmp_path: Path, name: str) -> None:
    values, expected = UNSTORED[name]
    table = odd_table(values)
    with pa.OSFile(str(tmp_path / "in.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    job(tmp_path / "in.arrow")
    for folder, rows in (("data", expected), ("errors", expected[1:])):
        assert [text and json.loads(text) for text in pq.read_table(job.out / folder)["v"].to_pylist()] == rows
    job(tmp_path / "in.arrow", "output=jsonl", "output.overwrite=true")
    for folder, rows in (("data", expected), ("errors", expected[1:])):
        assert [line["v"] for line in lines(job.out, folder)] == rows


def test_types_that_parquet_has_stay() -> None:
    for kind in (pa.null(), pa.float16(), pa.list_view(pa.int8()), pa.dictionary(pa.int8(), pa.string()), pa.uuid()):
        assert stored_type(kind) == kind


# -- names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_errors_keep_each_column_of_the_input(job: Job, tmp_path: Path, form: str) -> None:
    row = {"id": "1", "prompt": None, "error": ["mine", 1], "input_error": "other"}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + '\n{"id": "2", "prompt": "x"}\n')
    job(tmp_path / "in.jsonl", f"output={form}")
    [failed] = pq.read_table(job.out / "errors").to_pylist() if form == "parquet" else lines(job.out, "errors")
    mine = failed["input_input_error"]
    assert (json.loads(mine) if form == "parquet" else mine) == ["mine", 1]
    assert (failed["input_error"], failed["error"]["type"]) == ("other", "invalid_input")


def test_a_new_name_is_free() -> None:
    assert input_name("error", ["a"]) == "input_error"
    assert input_name("error", ["input_error", "input_input_error"]) == "input_input_input_error"
