"""The kinds of input files: CSV, JSON, Arrow, encodings, directories. The same table gives the same rows in each kind."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.errors import ConfigError
from pipeline.dataset.arrow_rows import table_schema
from pipeline.dataset.file_split import FileSplit
from pipeline.dataset.read import read_file_split, read_table
from pipeline.dataset.source import list_file_splits
from tests.test_source import VALUES, good, names, rows, write

ENCODINGS = {
    "UTF-8": str.encode,
    "UTF-8 with BOM": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "UTF-16 LE": lambda text: b"\xff\xfe" + text.encode("utf-16-le"),
    "UTF-16 BE": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "UTF-32": lambda text: text.encode("utf-32"),
}
COMPRESSED: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


LONG = 12345678901234567890

# --- the same table ---------------------------------------------------------------------------------------------------

CHARACTERS = st.characters(exclude_categories=["Cs"])
# The first line of a text file has no control characters.
NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8).map(str.strip).filter(bool)
# Texts that a reader with types would change, and texts with the characters of the formats.
CELLS = st.one_of(
    st.none(),
    st.text(CHARACTERS, max_size=12),
    st.text(st.sampled_from('",;\t|\n\r 0a\u2028'), max_size=8),
    st.sampled_from(["", "007", "1.50", "1e5", "NaN", "null", "NULL", "true", "2024-01-01", " x ", "-Infinity"]),
)
TABLES = st.lists(NAMES, min_size=2, max_size=4, unique=True).flatmap(
    lambda columns: st.lists(st.fixed_dictionaries(dict.fromkeys(columns, CELLS)), min_size=1, max_size=8)
)


def as_arrow(table: list[dict[str, Any]]) -> pa.Table:
    return pa.table({name: pa.array([row[name] for row in table], pa.string()) for name in table[0]})


def as_csv(table: list[dict[str, Any]], delimiter: str) -> str:
    sink = pa.BufferOutputStream()
    pa.csv.write_csv(as_arrow(table), sink, pa.csv.WriteOptions(delimiter=delimiter))
    return sink.getvalue().to_pybytes().decode()


TEXTS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "comma.csv": lambda table: as_csv(table, ","),
    "semicolon.csv": lambda table: as_csv(table, ";"),
    "tab.tsv": lambda table: as_csv(table, "\t"),
    "array.json": json.dumps,
    "array.jsonl": lambda table: json.dumps(table, ensure_ascii=False),
    "pretty.json": lambda table: json.dumps(table, indent=2),
    "objects.json": lambda table: "\n".join(json.dumps(row, indent=2) for row in table),
    "lines.json": lambda table: "\n".join(map(json.dumps, table)),
}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=TABLES, encoding=st.sampled_from(sorted(ENCODINGS)), ending=st.sampled_from(sorted(COMPRESSED)))
def test_the_same_table_gives_the_same_rows(tmp_path: Path, table: list[Any], encoding: str, ending: str) -> None:
    for name, text in TEXTS.items():
        data = COMPRESSED[ending](ENCODINGS[encoding](text(table)))
        assert good(write(tmp_path / f"{name}{ending}", data)) == table, name
    pq.write_table(as_arrow(table), tmp_path / "t.parquet")
    with pa.ipc.new_stream(tmp_path / "t.arrow", as_arrow(table).schema) as stream:
        stream.write_table(as_arrow(table), max_chunksize=3)
    with pa.ipc.new_file(tmp_path / "t.feather", as_arrow(table).schema) as file:
        file.write_table(as_arrow(table), max_chunksize=3)
    for name in ("t.parquet", "t.arrow", "t.feather"):
        assert good(tmp_path / name) == table, name


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    objects=st.lists(st.dictionaries(st.text(CHARACTERS, max_size=5), VALUES, max_size=4), min_size=1, max_size=6),
    indent=st.sampled_from([None, 1]),
    block=st.sampled_from([3, 64, 1 << 18]),
)
def test_any_json_array_gives_the_rows_of_its_lines(
    tmp_path: Path, objects: list[Any], indent: int | None, block: int
) -> None:
    array = write(tmp_path / "a.json", json.dumps(objects, indent=indent, ensure_ascii=False))
    lines = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, objects)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.dataset.json_rows.BLOCK", block)
        found = good(array)
    assert json.dumps(found) == json.dumps(good(lines)) == json.dumps(objects)


# --- CSV --------------------------------------------------------------------------------------------------------------


def test_a_csv_row_knows_its_line_and_a_bad_one_is_one_error(tmp_path: Path) -> None:
    text = 'id,text\n\n1,"two\nlines"\n\n2,a,b\n3,"x"y\n4\n5,5" pipe\n6,""\n7,\n8,"never\nends\n'
    found = rows(write(tmp_path / "a.csv", text))
    assert [(row.row + 1, row.columns) for row in found if not row.error] == [
        (3, {"id": "1", "text": "two\nlines"}),
        (9, {"id": "5", "text": '5" pipe'}),
        (10, {"id": "6", "text": ""}),
        (11, {"id": "7", "text": None}),
    ]
    assert [(row.row + 1, row.error) for row in found if row.error] == [
        (6, "the row has 3 cells, the header has 2"),
        (7, "invalid CSV: ',' expected after '\"'"),
        (8, "the row has 1 cells, the header has 2"),
        (12, "a quote in this row does not close: the rest of the file belongs to it"),
    ]
    assert found[1].raw == b"2,a,b\n"


@pytest.mark.parametrize(
    "text, columns",
    [
        ("a;b\n1,5;x\n", {"a": "1,5", "b": "x"}),
        ("a\tb\n1,5\tx\n", {"a": "1,5", "b": "x"}),
        ("a|b\r\n1,5|x\r\n", {"a": "1,5", "b": "x"}),
        ('"a,b,c";d\n1;2\n', {"a,b,c": "1", "d": "2"}),
        ("question\nwhy; or why not\n", {"question": "why; or why not"}),
        ("\n\n a , b \n1,2", {"a": "1", "b": "2"}),
        (",a\n0,x\n", {"": "0", "a": "x"}),  # as pandas writes its index
    ],
)
def test_the_header_tells_the_delimiter(tmp_path: Path, text: str, columns: dict[str, str]) -> None:
    assert good(write(tmp_path / "a.csv", text)) == [columns]


def test_quoted_and_missing_cells_are_told_apart_beside_quotes_and_delimiters(tmp_path: Path) -> None:
    sink = io.StringIO()
    csv.writer(sink, quoting=csv.QUOTE_ALL).writerow(['a,"",b', "", '\n"",\n', ""])
    found = good(write(tmp_path / "a.csv", "a,b,c,d\n" + sink.getvalue() + ',,"x, """" y",""\n'))
    assert found == [
        {"a": 'a,"",b', "b": "", "c": '\n"",\n', "d": ""},
        {"a": None, "b": None, "c": 'x, "" y', "d": ""},
    ]


def test_a_csv_row_over_the_limit_ends_the_file_with_one_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a,b\n1,2\n3," + "x" * 5000 + "\n4,5\n")
    first, last = rows(path, max_row_bytes=1000)
    assert (first.columns, last.row) == ({"a": "1", "b": "2"}, 2)
    assert last.error.startswith("the file cannot be read: the row has 1,001 bytes, the limit is 1,000 (dataset.max_row")
    assert last.error.endswith("or a quote does not close: the rows from here on are missing")


def test_a_file_of_another_encoding_is_refused_and_a_single_bad_byte_is_not(tmp_path: Path) -> None:
    latin = write(tmp_path / "latin.csv", "id,text\n1,gr\xfc\xdfe\n2,x\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8 text: save it as UTF-8"):
        list_file_splits(latin)
    damaged = write(tmp_path / "damaged.csv", "id,text\n1,grüße\n2,".encode() + b"\xff\n3,x\n")
    assert [row.error for row in rows(damaged)] == [None, "invalid UTF-8 in the row, at character 3", None]


def test_a_header_and_a_first_value_may_be_longer_than_what_is_looked_at(tmp_path: Path) -> None:
    columns = {f"column é {number}": f"value ü {number}" for number in range(3000)}
    text = ",".join(columns) + "\n" + ",".join(columns.values()) + "\n"
    assert good(write(tmp_path / "a.csv", text)) == good(write(tmp_path / "b.csv", text.encode("utf-16"))) == [columns]
    assert good(write(tmp_path / "a.json", json.dumps([columns], indent=1))) == [columns]
    assert good(write(tmp_path / "a.json.gz", gzip.compress(json.dumps(columns, indent=1).encode()))) == [columns]


def test_large_csv_and_json_files_are_read_in_batches(tmp_path: Path) -> None:
    table = [{"id": str(i), "text": f"line one\nline {i}"} for i in range(4500)]
    for name in ("comma.csv", "pretty.json"):
        (file_split,) = list_file_splits(write(tmp_path / name, TEXTS[name](table)), chunk_bytes=1000)
        assert [len(batch) for batch in read_file_split(file_split)] == [2000, 2000, 500]
        assert [row.columns for batch in read_file_split(file_split) for row in batch] == table


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ('[{"a": 1}, 2, [3], null]', [{"a": 1}, "a number", "a list", "null"]),
        ('[]', []),
        ('[ ]\n[{"a": 1}]\n', [{"a": 1}]),
        ('{\n  "a": 1\n}\n', [{"a": 1}]),
        ('{\n  "a": 1\n}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ('{"a": 1}\n{\n', [{"a": 1}, "invalid JSON: "]),
        ('{\n{"a": 1}\n', ["invalid JSON: ", {"a": 1}]),  # a bad line, not an object over two lines
        ('[{"a": NaN}, {"a": -Infinity}, {"a": 12345678901234567890}]', ["nan", {"a": -math.inf}, {"a": LONG}]),
        ('[{"a": "\\ud800"}, {"a": 1}]', ["a lone surrogate", {"a": 1}]),
        ('[{"a": 1}, {"a" 2}]', [{"a": 1}, "the file cannot be read: invalid JSON: Expecting ':' delimiter"]),
        ('[{"a": 1} {"a": 2}]', [{"a": 1}, "the file cannot be read: invalid JSON: '{' between two elements"]),
        ('[{"a": 1},', [{"a": 1}, "the file cannot be read: the array does not end"]),
        ('[{"a": 1}, {"a": ', [{"a": 1}, "the file cannot be read: invalid JSON: Expecting value"]),
    ],
)  # fmt: skip
def test_json_values(tmp_path: Path, text: str, expected: list[Any]) -> None:
    found = rows(write(tmp_path / "a.json", text))
    assert len(found) == len(expected)
    for row, one in zip(found, expected, strict=True):
        if one == "nan":
            assert str(row.columns) == "{'a': nan}"
        elif isinstance(one, str):
            assert row.error is not None and one in row.error
        else:
            assert (row.columns, row.error) == (one, None)


def test_an_element_that_is_not_utf8_or_too_long_is_one_error(tmp_path: Path) -> None:
    data = b'[{"a": "\xff"}, {"a": "' + b"x" * 500 + b'"}, {"a": "\xc3\xa9"}]'
    found = rows(write(tmp_path / "a.json", data), max_row_bytes=300)
    assert [(row.row, row.error) for row in found] == [
        (0, "invalid UTF-8 at byte 8"),
        (1, "the row has 509 bytes, the limit is 300 (dataset.max_row_bytes)"),
        (2, None),
    ]


def test_a_long_object_over_lines_is_recognized(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "x" * 100_000}] * 3}
    assert good(write(tmp_path / "a.json", json.dumps(row, indent=1))) == [row]


def test_a_damaged_array_is_not_held_in_memory(tmp_path: Path) -> None:
    data = b'[{"a": 1}, {"a": "' + b"x" * 3_000_000
    first, last = rows(write(tmp_path / "a.json", data), max_row_bytes=1 << 20)
    assert first.columns == {"a": 1}
    assert "a value is damaged, or has more than 1,048,576 bytes" in last.error


# --- Arrow ------------------------------------------------------------------------------------------------------------


def save_to_disk(folder: Path, tables: list[pa.Table]) -> None:
    """A folder as `datasets.Dataset.save_to_disk` writes it."""
    folder.mkdir(parents=True)
    files = [f"data-{at:05d}-of-{len(tables):05d}.arrow" for at in range(len(tables))]
    for name, table in zip(files, tables, strict=True):
        with pa.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table, max_chunksize=1000)
    (folder / "dataset_info.json").write_text('{\n  "citation": "",\n  "features": {}\n}')
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in files]}, indent=2))


def test_a_folder_of_hugging_face_datasets_is_read_without_its_descriptions(tmp_path: Path) -> None:
    for split, count in (("train", 2500), ("test", 3)):
        save_to_disk(tmp_path / "set" / split, [pa.table({"prompt": [f"{split} {i}" for i in range(count)]})] * 2)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    notes: list[str] = []
    found = list_file_splits(tmp_path / "set", note=notes.append)
    assert [(split.name, split.kind) for split in found] == [
        (f"{split}/data-0000{at}-of-00002.arrow", "arrow") for split in ("test", "train") for at in (0, 1)
    ]
    assert notes == [
        f"{tmp_path}/set: these names are not read, because they describe a dataset of Hugging Face: dataset_dict.json, "
        "test/dataset_info.json, test/state.json, train/dataset_info.json, train/state.json."
    ]
    assert len(good(tmp_path / "set")) == 5006
    assert good(tmp_path / "set" / "test")[0] == {"prompt": "test 0"}
    assert [batch.num_rows for batch in read_table(found[2])] == [len(batch) for batch in read_file_split(found[2])]
    assert table_schema(found[2]) == pa.schema([("prompt", pa.string())])


def test_a_truncated_arrow_file_gives_its_rows_and_then_one_error(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "a", [pa.table({"i": list(range(5000))})])
    (path,) = (tmp_path / "a").glob("*.arrow")
    path.write_bytes(path.read_bytes()[:25_000])
    *before, last = rows(path)
    assert [row.columns["i"] for row in before] == list(range(3000))
    assert last.row == 3000
    assert last.error.startswith("the Arrow file cannot be read (")
    assert last.error.endswith("): rows from 3,001 on are missing")


def test_other_json_files_of_these_names_are_read(tmp_path: Path) -> None:
    write(tmp_path / "state.json", '{"a": 1}')
    assert names(tmp_path) == ["state.json"]


# --- directories ------------------------------------------------------------------------------------------------------


def test_a_directory_says_what_it_does_not_read(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.csv", "README.md", "x/notes.txt", "x/c.jsonl", ".hidden.txt", "_tmp/d.txt"):
        write(tmp_path / name, '{"a": 1}\n')
    notes: list[str] = []
    assert len(list_file_splits(tmp_path, note=notes.append)) == 3
    assert notes == [
        f'{tmp_path}: these names are not read, because they begin with "." or "_": .hidden.txt, _tmp.',
        f"{tmp_path}: these names are not read, because they have no ending of a data file: README.md, x/notes.txt.",
        f"{tmp_path} has files of several kinds (2 .jsonl, 1 .csv): all are read. A glob such as *.jsonl reads one kind.",
    ]
    for number in range(7):
        write(tmp_path / f"x/{number}.bin", "")
    notes.clear()
    list_file_splits(f"{tmp_path}/?", note=notes.append)
    assert notes == [
        f"{tmp_path}/?: these names are not read, because they have no ending of a data file: "
        "x/0.bin, x/1.bin, x/2.bin, x/3.bin, x/4.bin and 3 more."
    ]
    notes.clear()
    list_file_splits(f"{tmp_path}/*.jsonl", note=notes.append)
    assert notes == []


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_directories_with_an_equals_sign_are_columns(tmp_path: Path, kind: str) -> None:
    table = pa.table({"a": ["x"], "own": ["mine"]})
    for directory in ("year=2024/month=01/own=theirs", "year=__HIVE_DEFAULT_PARTITION__/month=a%2Fb/raw"):
        path = tmp_path / "k=v" / "in" / directory / f"t.{kind}"
        path.parent.mkdir(parents=True)
        if kind == "parquet":
            pq.write_table(table, path)
        elif kind == "arrow":
            with pa.ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table)
        else:
            path.write_text({"csv": "a,own\nx,mine\n"}.get(kind, '[{"a": "x", "own": "mine"}]'))
    root = tmp_path / "k=v" / "in"
    first, second = {"a": "x", "own": "mine", "year": 2024, "month": "01"}, {"a": "x", "own": "mine"}
    assert good(root) == [first, {**second, "year": None, "month": "a/b"}]
    assert good(f"{root}/year=2*/**/t.*") == good(f"{root}/year=2024/month=01") == [first]
    assert good(f"{root}/year=2024/month=01/own=theirs/t.{kind}") == [first]
    assert good(f"{root}/*=*/*/raw") == [{**second, "year": None, "month": "a/b"}]
    for file_split in list_file_splits(root):
        if file_split.typed:
            (batch,) = read_table(file_split)
            schema = table_schema(file_split)
            assert batch.schema == schema and schema.names == ["a", "own", "year", "month"]
            assert schema.types[2:] == [pa.int64(), pa.string()]


@pytest.mark.parametrize(
    "values, read",
    [
        (["1", "0", "-7"], [1, 0, -7]),
        (["1", "01"], ["1", "01"]),
        (["1", "1.5"], ["1", "1.5"]),
        (["1", "+1"], ["1", "+1"]),
        (["1", "1" * 19], ["1", "1" * 19]),
        (["1", "١"], ["1", "١"]),
        (["1", "__HIVE_DEFAULT_PARTITION__"], [1, None]),
    ],
)
def test_a_directory_column_is_an_integer_if_all_its_values_are(tmp_path: Path, values: list[str], read: list[Any]) -> None:
    for value in values:
        write(tmp_path / f"n={value}" / "a.csv", "a\nx\n")
    by_name = dict(zip((f"n={value}/a.csv" for value in values), read, strict=True))
    found = {split.name: rows_of_split["n"] for split in list_file_splits(tmp_path) for rows_of_split in read_rows(split)}
    assert found == by_name


def read_rows(file_split: FileSplit) -> list[dict[str, Any]]:
    return [row.columns or {} for batch in read_file_split(file_split) for row in batch]
