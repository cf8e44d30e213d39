"""Finding, cutting and reading input files: every row arrives as it was written, and no file stops a run."""

import datetime
import gzip
import json
import math
import pickle
import uuid
import zlib
from decimal import Decimal
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.errors import ConfigError, ErrorCode
from pipeline.dataset.arrow_rows import table_schema, to_values
from pipeline.dataset.file_split import FileSplit, RawRow
from pipeline.dataset.read import read_file_split, read_table
from pipeline.dataset.source import list_file_splits
from pipeline.storage.filesystem import exists, resolve, write_atomic


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def rows(path: object, *, chunk_bytes: int = 64 << 20, **options: int) -> list[RawRow]:
    return [
        row
        for file_split in list_file_splits(path, chunk_bytes=chunk_bytes)
        for batch in read_file_split(file_split, **options)
        for row in batch
    ]


def good(path: object, **options: int) -> list[object]:
    found = rows(path, **options)
    assert [row.error for row in found] == [None] * len(found)
    return [row.columns for row in found]


def one_error(tmp_path: Path, line: bytes, **options: int) -> str:
    """The error of `line`, between two good rows that must not suffer."""
    found = rows(write(tmp_path / "in.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 2}\n'), **options)
    assert [row.row for row in found] == [0, 1, 2]
    assert (found[0].columns, found[2].columns) == ({"a": 1}, {"a": 2})
    assert found[1].columns is None
    assert found[1].raw is not None and line.startswith(found[1].raw)
    assert found[1].error is not None and "\n" not in found[1].error
    return found[1].error


def names(path: object) -> list[str]:
    return [file_split.name for file_split in list_file_splits(path)]


# --- finding ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    # fmt: off
    for name in ("b.jsonl", "a.jsonl", "sub/c.ndjson", "sub/deep/d.json", "notes.txt", ".hidden.jsonl", "_tmp/e.jsonl",
                 "sub/_SUCCESS", ".git/f.jsonl"):
        write(tmp_path / name, '{"a": 1}\n')
    # fmt: on
    write(tmp_path / "z.jsonl.gz", gzip.compress(b'{"a": 1}\n'))
    return tmp_path


def test_a_directory_is_searched_recursively_in_order_without_hidden_files(tree: Path) -> None:
    assert names(str(tree)) == ["a.jsonl", "b.jsonl", "sub/c.ndjson", "sub/deep/d.json", "z.jsonl.gz"]


def test_a_trailing_slash_changes_nothing(tree: Path) -> None:
    assert list_file_splits(f"{tree}/") == list_file_splits(str(tree))


def test_a_dataset_below_a_hidden_directory_is_read(tmp_path: Path) -> None:
    write(tmp_path / "_run/.cache/a.jsonl", "{}\n")
    assert names(str(tmp_path / "_run/.cache")) == ["a.jsonl"]


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("?.jsonl", ["a.jsonl", "b.jsonl"]),
        ("[b-z].jsonl", ["b.jsonl"]),
        ("[!b].jsonl", ["a.jsonl"]),
        ("**/*.ndjson", ["sub/c.ndjson"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("sub/**", ["c.ndjson", "deep/d.json"]),
        ("s*", ["sub/c.ndjson", "sub/deep/d.json"]),
        ("*/deep/*.json", ["sub/deep/d.json"]),
        ("_tmp/*", ["e.jsonl"]),
        ("*.txt", ["notes.txt"]),
    ],
)
def test_globs(tree: Path, pattern: str, expected: list[str]) -> None:
    assert names(f"{tree}/{pattern}") == expected


def test_a_list_keeps_its_order_and_a_file_named_twice_is_read_once(tree: Path) -> None:
    assert names([f"{tree}/b.jsonl", f"{tree}/*.jsonl", f"file://{tree}/a.jsonl"]) == ["b.jsonl", "a.jsonl"]


def test_names_stay_when_the_dataset_moves(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    moved = tmp_path_factory.mktemp("elsewhere") / "data"
    before = names(str(tree))
    tree.rename(moved)
    assert names(str(moved)) == before


def test_a_literal_name_wins_over_its_reading_as_a_glob(tmp_path: Path) -> None:
    write(tmp_path / "a[1].jsonl", '{"literal": true}\n')
    write(tmp_path / "a1.jsonl", '{"literal": false}\n')
    assert good(f"{tmp_path}/a[1].jsonl") == [{"literal": True}]


def test_a_name_with_spaces_and_percent_signs_is_taken_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "my data %20.jsonl", '{"a": 1}\n')
    assert good(str(path)) == [{"a": 1}]
    assert good(path.as_uri()) == [{"a": 1}]


def test_a_wrong_path_names_the_nearest_right_one(tree: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file or directory '.*/aa\.jsonl' \(did you mean 'a\.jsonl'\?\)"):
        list_file_splits(f"{tree}/aa.jsonl")
    with pytest.raises(ConfigError, match=r"nothing matches '.*/\*\.parquet' \(known: .*a\.jsonl"):
        list_file_splits(f"{tree}/*.parquet")
    with pytest.raises(ConfigError, match=r"there is no file or directory"):
        list_file_splits([f"{tree}/a.jsonl", f"{tree}/nowhere/at/all.jsonl"])


def test_a_directory_without_data_says_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path / "table.xlsx", "")
    with pytest.raises(ConfigError, match=r"dataset\.path: there is no data file in '.*' \(known: table\.xlsx\)"):
        list_file_splits(str(tmp_path))


@pytest.mark.parametrize("path", ["", [], [""]])
def test_an_empty_path_is_refused(path: object) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.path is empty"):
        list_file_splits(path)


def test_an_unknown_scheme_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"there is no reader for 'nosuch://' paths"):
        list_file_splits("nosuch://bucket/x")


def test_a_scheme_whose_package_is_missing_says_which() -> None:
    pytest.importorskip("fsspec")
    with pytest.raises(ConfigError, match=r"dropbox:// needs a package that is not installed: .*dropbox"):
        resolve("dropbox://x/y")


def test_credentials_in_a_path_are_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="credentials") as caught:
        resolve("s3://AKIA:topsecret@bucket/key")
    assert "topsecret" not in str(caught.value)


def test_files_elsewhere_are_found_through_fsspec() -> None:
    memory = fsspec.filesystem("memory")
    root = f"/{uuid.uuid4().hex}"
    for name in ("b/2.jsonl", "a/1.jsonl"):
        memory.pipe(f"{root}/{name}", f'{{"from": "{name}"}}\n'.encode() * 3)
    assert names(f"memory:/{root}") == ["a/1.jsonl", "b/2.jsonl"]
    assert names(f"memory:/{root}/*/2.jsonl") == ["b/2.jsonl"]
    assert good(f"memory:/{root}/**/*.jsonl", chunk_bytes=8)[3] == {"from": "b/2.jsonl"}
    with pytest.raises(ConfigError, match=r"did you mean '1\.jsonl'"):
        list_file_splits(f"memory:/{root}/a/1.json")


def test_chunks_are_small_to_send() -> None:
    file_split = FileSplit("s3://bucket/a/very/long/path/part-00000.jsonl", "part-00000.jsonl", "jsonl", 0, 1 << 40, 12)
    assert pickle.loads(pickle.dumps(file_split)) == file_split
    assert len(pickle.dumps([file_split] * 2)) < 500


# --- kinds -----------------------------------------------------------------------------------------------------------


def test_content_tells_where_the_name_does_not(tmp_path: Path) -> None:
    line = b'{"a": 1}\n'
    for name, data in (("p", line), ("g", gzip.compress(line)), ("z.bin", zstandard.compress(line))):
        assert good(str(write(tmp_path / name, data))) == [{"a": 1}]
    pq.write_table(pa.table({"a": [1]}), tmp_path / "q")
    assert good(str(tmp_path / "q")) == [{"a": 1}]
    assert good(str(write(tmp_path / "zipped.jsonl", gzip.compress(line)))) == [{"a": 1}]


def test_compressed_files_of_several_parts_are_read_to_their_end(tmp_path: Path) -> None:
    lines = [f'{{"a": {i}}}\n'.encode() for i in range(3)]
    both = {
        "a.jsonl.gz": b"".join(map(gzip.compress, lines)) + b"\0" * 100,
        "a.jsonl.zst": b"".join(map(zstandard.compress, lines)),
        "skip.zst": b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstandard.compress(b"".join(lines)),
    }
    for name, data in both.items():
        assert good(str(write(tmp_path / name, data))) == [{"a": 0}, {"a": 1}, {"a": 2}], name


@pytest.mark.parametrize("name, compress", [("x.jsonl.gz", gzip.compress), ("x.jsonl.zst", zstandard.compress)])
def test_large_compressible_files_come_whole(tmp_path: Path, name: str, compress: object) -> None:
    text = b"".join(b'{"i": %d, "x": "%s"}\n' % (i, b"x" * 5000) for i in range(2000))  # 10 MB of it
    found = good(str(write(tmp_path / name, compress(text))))
    assert [row["i"] for row in found] == list(range(2000))


@pytest.mark.parametrize("name, compress", [("x.jsonl.gz", gzip.compress), ("x.jsonl.zst", zstandard.compress)])
def test_a_truncated_stream_gives_its_rows_and_then_one_error(tmp_path: Path, name: str, compress: object) -> None:
    text = b"".join(b'{"i": %d, "x": "%s"}\n' % (i, uuid.uuid4().hex.encode() * 4) for i in range(5000))
    data = compress(text)
    found = rows(str(write(tmp_path / name, data[: len(data) * 2 // 3])))
    *before, last = found
    assert len(before) > 1000
    assert [row.columns["i"] for row in before] == list(range(len(before)))
    assert last.row == len(before)
    assert last.error.startswith("the file cannot be read: ")
    assert last.error.endswith(": the rows from here on are missing")


def test_a_damaged_gzip_stream_is_one_error_after_its_rows(tmp_path: Path) -> None:
    data = gzip.compress(b'{"a": 1}\n')
    crc_wrong = data[:-8] + b"\0\0\0\0" + data[-4:]
    first, last = rows(str(write(tmp_path / "a.gz", crc_wrong)))
    assert first.columns == {"a": 1}
    assert last.error.startswith("the file cannot be read: CRC check failed")
    *_, last = rows(str(write(tmp_path / "b.gz", data + b"rubbish")))
    assert last.row == 1 and "Not a gzipped file" in last.error


@pytest.mark.parametrize(
    "name, data, reason",
    [
        ("bad.parquet", b"PAR1 and nothing else", "not a Parquet file: Parquet magic bytes not found in footer"),
        ("bad.parquet", b"PAR1", "not a Parquet file: Parquet file size is 4 bytes"),
        ("bad.parquet", b"", "not a Parquet file: Parquet file size is 0 bytes"),
        ("bad.parquet", b'{"a": 1}\n', "not a Parquet file: Parquet magic bytes not found in footer"),
        ("bad.jsonl.gz", b'{"a": 1}\n', "not a gzip file: it begins with b'{\"a\"'"),
        ("bad.jsonl.gz", b"", "not a gzip file: it begins with b''"),
        ("bad.jsonl.zst", b"nope", "not a zstd file: it begins with b'nope'"),
        ("bad.arrow", b'{"a": 1}\n', "not an Arrow file: "),
        ("bad.jsonl", b"PK\x03\x04rest", "an Excel or zip file: save it as CSV, or unpack it"),
        ("bad.jsonl.gz", gzip.compress(b"name\0\0\0", mtime=0), "not text: it begins with b'name\\x00\\x00\\x00'"),
        ("bad", b"\x7fELF\x02\x01\x01\0", "not text: it begins with b'\\x7fELF"),
        ("bad.csv", b"a,b,a\n1,2,3\n", "a CSV file with two columns named 'a'"),
        ("bad.csv", b"name,gr\xf6\xdfe\n", "not UTF-8 text: save it as UTF-8"),
        ("bad.csv", b'"a"b,c\n', "not a CSV file: its header: "),
    ],
)
def test_a_file_that_cannot_be_read_is_one_error_row_or_refused(
    tmp_path: Path, name: str, data: bytes, reason: str
) -> None:
    bad = str(write(tmp_path / name, data))
    fine = str(write(tmp_path / "fine.jsonl", '{"a": 1}\n'))
    file_split, other = list_file_splits([bad, fine])
    assert (file_split.kind, file_split.name, other.kind) == ("bad", name, "jsonl")
    assert file_split.reason.startswith(reason)
    assert list(read_file_split(file_split)) == [[RawRow(0, None, f"the file is {file_split.reason}")]]
    for fails in ({"path": bad}, {"path": [fine, bad], "on_bad_input": "fail"}):
        with pytest.raises(ConfigError) as caught:
            list_file_splits(**fails)
        assert str(caught.value).startswith(f"dataset.path: {bad} is {reason}")
        assert caught.value.code == ErrorCode.INPUT_FILES


def test_empty_files_have_no_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "")
    write(tmp_path / "b.jsonl", "\n \n\t\r\n")
    write(tmp_path / "c.jsonl", b"\xef\xbb\xbf")
    pq.write_table(pa.table({"x": pa.array([], pa.int64())}), tmp_path / "d.parquet")
    write(tmp_path / "e.jsonl.gz", gzip.compress(b""))
    assert rows(str(tmp_path)) == []
    assert {file_split.kind for file_split in list_file_splits(str(tmp_path))} == {"jsonl", "parquet"}


# --- lines -----------------------------------------------------------------------------------------------------------


def test_blank_lines_are_counted_and_skipped(tmp_path: Path) -> None:
    found = rows(str(write(tmp_path / "in.jsonl", '\n{"a": 1}\n\n   \n{"a": 2}')))
    assert [(row.row, row.columns) for row in found] == [(1, {"a": 1}), (4, {"a": 2})]


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_row(tmp_path: Path) -> None:
    text = b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": "x\\r"}\r\n'
    assert good(str(write(tmp_path / "in.jsonl", text))) == [{"a": 1}, {"a": "x\r"}]
    assert good(str(write(tmp_path / "in.jsonl.gz", gzip.compress(text)))) == [{"a": 1}, {"a": "x\r"}]


def test_values_come_exactly_as_they_were_written(tmp_path: Path) -> None:
    line = (
        '{"id": "001", "date": "2024-01-01T00:00:00Z", "big": 123456789012345678901234567890,'
        ' "neg": -9223372036854775809, "edge": 18446744073709551616, "float": 0.1,'
        ' "text": "\u2028 é \U0001f600 \\u00e9 \\ud83d\\ude00 \\u0000",'
        ' "content": [1, "x", null, {"y": []}], "nan": NaN, "inf": -Infinity, "empty": {}, "": 1}\n'
    )
    (row,) = good(str(write(tmp_path / "in.jsonl", line)))
    assert math.isnan(row.pop("nan"))
    assert row == {
        "id": "001",
        "date": "2024-01-01T00:00:00Z",
        "big": 123456789012345678901234567890,
        "neg": -9223372036854775809,
        "edge": 18446744073709551616,
        "float": 0.1,
        "text": "\u2028 é \U0001f600 é \U0001f600 \0",
        "content": [1, "x", None, {"y": []}],
        "inf": -math.inf,
        "empty": {},
        "": 1,
    }
    assert list(row)[:3] == ["id", "date", "big"]


def test_of_a_repeated_key_the_last_wins(tmp_path: Path) -> None:
    assert good(str(write(tmp_path / "in.jsonl", '{"a": 1, "a": 2}\n{"a": 1, "a": 12345678901234567890123}\n'))) == [
        {"a": 2},
        {"a": 12345678901234567890123},
    ]


@pytest.mark.parametrize(
    "line, error",
    [
        (b'{"a" 1}', "invalid JSON: Expecting ':' delimiter at column 6"),
        (b'{"a": 1 "b": 2}', "invalid JSON: Expecting ',' delimiter at column 9"),
        (b'{"a": "x', "invalid JSON: Unterminated string starting at column 7"),
        (b'{"a": 1} {"a": 2}', "invalid JSON: Extra data at column 10"),
        (b"nonsense", "invalid JSON: Expecting value at column 1"),
        (b'{"a": "x\tx"}', "invalid JSON: Invalid control character at column 9"),
        (b'{"a": "\xff"}', "invalid UTF-8 at byte 8"),
        (b'{"a": "\xed\xa0\x80"}', "invalid UTF-8 at byte 8"),
        (b'{"a": {"b": "\\ud800"}}', "a lone surrogate (\\ud800) in 'a'"),
        (b'{"a": "\\uDEAD tail"}', "a lone surrogate (\\udead) in 'a'"),
        (b'{"\\ud8ff": 1}', "a lone surrogate (\\ud8ff) in '\\ud8ff'"),
        (b"[1, 2]", "not an object but a list"),
        (b'"text"', "not an object but a text"),
        (b"12", "not an object but a number"),
        (b"null", "not an object but null"),
        (b"true", "not an object but true or false"),
        (b'{"a": ' + b"9" * 5000 + b"}", "an integer of more than 4,300 digits"),
        (b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}", "nested more than 200 levels deep"),
        (b"[" * 100_000, "nested more than 200 levels deep"),
        (b'{"a": ' * 5000 + b"1" + b"}" * 5000, "nested more than 200 levels deep"),
        (b"\0\0\0\0", "invalid JSON: Expecting value at column 1"),
    ],
)
def test_a_bad_line_is_a_row_that_says_why(tmp_path: Path, line: bytes, error: str) -> None:
    assert one_error(tmp_path, line) == error


def test_many_brackets_that_are_not_deep_are_fine(tmp_path: Path) -> None:
    wide = {"a": [{"b": [1]}] * 500, "deep": json.loads("[" * 150 + "]" * 150)}
    assert good(str(write(tmp_path / "in.jsonl", json.dumps(wide)))) == [wide]


def test_a_line_over_the_limit_is_one_error_row_that_is_not_held_whole(tmp_path: Path) -> None:
    size = 9_000_000
    line = b'{"a": "' + b"x" * (size - 9) + b'"}'
    assert (
        one_error(tmp_path, line, max_row_bytes=1 << 20)
        == "the row has 9,000,000 bytes, the limit is 1,048,576 (dataset.max_row_bytes)"
    )
    (_, row, _) = rows(str(tmp_path / "in.jsonl"), max_row_bytes=1 << 20)
    assert row.raw == line[: 64 << 10]


@pytest.mark.parametrize("newline", [b"", b"\n"])
def test_the_limit_is_exact_at_the_end_of_a_file_too(tmp_path: Path, newline: bytes) -> None:
    path = str(write(tmp_path / "in.jsonl", b'{"a": 1}' + newline))
    assert rows(path, max_row_bytes=8) == [RawRow(0, {"a": 1}, None)]
    assert rows(path, max_row_bytes=7) == [
        RawRow(0, None, "the row has 8 bytes, the limit is 7 (dataset.max_row_bytes)", b'{"a": 1}')
    ]


def test_the_last_line_of_an_oversized_file_without_a_newline_is_reported(tmp_path: Path) -> None:
    (row,) = rows(str(write(tmp_path / "in.jsonl", b"x" * 5_000_001)), max_row_bytes=1000)
    assert (row.row, row.error) == (0, "the row has 5,000,001 bytes, the limit is 1,000 (dataset.max_row_bytes)")
    assert row.raw == b"x" * (64 << 10)


def test_an_oversized_line_in_a_compressed_file_is_reported_too(tmp_path: Path) -> None:
    text = b'{"a": 1}\n"' + b"x" * 9_000_000 + b'"\n{"a": 2}\n'
    for name, compress in (("a.gz", gzip.compress), ("a.zst", zstandard.compress)):
        found = rows(str(write(tmp_path / name, compress(text))), max_row_bytes=1 << 20)
        assert [row.error for row in found] == [
            None,
            "the row has 9,000,002 bytes, the limit is 1,048,576 (dataset.max_row_bytes)",
            None,
        ]


def test_batches_are_bounded_in_rows_and_bytes(tmp_path: Path) -> None:
    small = str(write(tmp_path / "small.jsonl", '{"a": 1}\n' * 4500))
    assert [len(batch) for file_split in list_file_splits(small) for batch in read_file_split(file_split)] == [
        2000,
        2000,
        500,
    ]
    large = str(write(tmp_path / "large.jsonl", (json.dumps({"a": "x" * (1 << 20)}) + "\n") * 40))
    assert [len(batch) for file_split in list_file_splits(large) for batch in read_file_split(file_split)] == [16, 16, 8]


def test_a_file_that_vanishes_or_shrinks_after_listing_is_an_error_row(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", '{"a": 1}\n{"a": 2}\n')
    (file_split,) = list_file_splits(str(path))
    path.write_text('{"a": 1}\n')
    first, last = (row for batch in read_file_split(file_split) for row in batch)
    assert (first.columns, last.row) == ({"a": 1}, 1)
    assert last.error == "the file cannot be read: it ends at byte 9 of 18: the rows from here on are missing"
    path.unlink()
    ((row,),) = read_file_split(file_split)
    assert row.row == 0 and row.error.startswith("the file cannot be read: ")


# --- cutting ---------------------------------------------------------------------------------------------------------

# Lines of all kinds, good and bad, with and without carriage returns.
LINES = st.lists(
    st.one_of(
        st.integers(0, 10**25).map(lambda n: b'{"n": %d}' % n),
        st.text(max_size=40).map(lambda s: json.dumps({"s": s}, ensure_ascii=False).encode("utf-8", "surrogatepass")),
        st.sampled_from([b"", b"  ", b"{", b"[1]", b'{"a": 1}\r', b'{"long": "' + b"y" * 300 + b'"}']),
        st.binary(max_size=20),
    ),
    max_size=40,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES, chunk_bytes=st.integers(1, 400), end=st.sampled_from([b"", b"\n"]))
def test_cutting_a_file_anywhere_gives_the_same_rows(
    tmp_path: Path, lines: list[bytes], chunk_bytes: int, end: bytes
) -> None:
    path = str(write(tmp_path / "in.jsonl", b'{"first": 1}\n' + b"\n".join(lines) + end))
    whole = rows(path, max_row_bytes=200)
    file_splits = list_file_splits(path, chunk_bytes=chunk_bytes)
    assert [row for c in file_splits for b in read_file_split(c, max_row_bytes=200, batch_rows=3) for row in b] == whole
    assert [file_split.start for file_split in file_splits[1:]] == [file_split.stop for file_split in file_splits[:-1]]
    assert all(file_split.stop > file_split.start for file_split in file_splits)


@pytest.mark.parametrize("block", [4, 7, 64, 1000])
def test_the_size_of_the_blocks_read_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    text = b"".join(b'{"i": %d, "x": "%s"}\n\n' % (i * 10**18, b"z" * (i % 50)) for i in range(60)) + b'{"last": 1}'
    data = {"a.jsonl": text, "a.gz": gzip.compress(text), "a.zst": zstandard.compress(text)}
    for name, content in data.items():
        path = str(write(tmp_path / name, content))
        expected = rows(path, max_row_bytes=80)
        assert any(row.error for row in expected)
        assert any(row.columns for row in expected)
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.dataset.json_rows.BLOCK", block)
            assert rows(path, max_row_bytes=80, chunk_bytes=500) == expected


# --- properties ------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.lists(st.dictionaries(TEXT, VALUES, max_size=5), min_size=1, max_size=8)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(objects=OBJECTS, ascii_only=st.booleans())
def test_any_json_objects_come_back_equal(tmp_path: Path, objects: list[dict[str, object]], ascii_only: bool) -> None:
    text = "\n".join(json.dumps(o, ensure_ascii=ascii_only) for o in objects)
    found = good(str(write(tmp_path / "in.jsonl", text)))
    assert found == objects
    assert json.dumps(found) == json.dumps(objects)  # 1, 1.0 and True are equal in Python and not in JSON


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=300),
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv.gz", "a.gz", "a.zst", "a.parquet", "a.arrow", "a"]),
)
def test_no_bytes_whatever_make_reading_raise(tmp_path: Path, data: bytes, name: str) -> None:
    fine = write(tmp_path / "fine.jsonl", "{}\n")
    for row in rows([str(write(tmp_path / name, data)), str(fine)]):
        assert (row.columns is None) == (row.error is not None)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), value=st.integers(0, 255), kind=st.sampled_from(["gz", "zst", "parquet"]))
def test_a_flipped_byte_in_a_compressed_file_never_raises(tmp_path: Path, at: int, value: int, kind: str) -> None:
    text = b"".join(b'{"i": %d}\n' % i for i in range(300))
    if kind == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"i": list(range(300)), "s": [str(i) for i in range(300)]}), sink, row_group_size=100)
        data = bytearray(sink.getvalue())
    else:
        data = bytearray(gzip.compress(text) if kind == "gz" else zstandard.compress(text))
    data[at % len(data)] = value
    fine = write(tmp_path / "fine.jsonl", "{}\n")
    assert rows([str(write(tmp_path / f"a.{kind}", bytes(data))), str(fine)])


# --- Parquet ---------------------------------------------------------------------------------------------------------


def test_parquet_values_keep_their_types(tmp_path: Path) -> None:
    when = datetime.datetime(2024, 5, 6, 7, 8, 9, 123456)
    table = pa.table(
        {
            "code": ["001", None],
            "when": pa.array([when, None], pa.timestamp("ns")),
            "utc": pa.array([when, None], pa.timestamp("us", "UTC")),
            "price": pa.array([Decimal("1.10"), None]),
            "raw": pa.array([b"\xff\0", None]),
            "big": pa.array([2**63 - 1, None]),
            "tags": [["a", "b"], None],
            "kind": pa.array(["x", None]).dictionary_encode(),
            "day": pa.array([datetime.date(2024, 1, 1), None]),
        }
    )
    path = str(tmp_path / "in.parquet")
    pq.write_table(table, path)
    first, second = good(path)
    assert first == {
        "code": "001",
        "when": when,
        "utc": when.replace(tzinfo=datetime.UTC),
        "price": Decimal("1.10"),
        "raw": b"\xff\0",
        "big": 2**63 - 1,
        "tags": ["a", "b"],
        "kind": "x",
        "day": datetime.date(2024, 1, 1),
    }
    assert set(second.values()) == {None}
    (file_split,) = list_file_splits(path)
    (batch,) = read_table(file_split)
    assert batch.schema.types == table_schema(file_split).types
    assert batch.schema.field("when").type == pa.timestamp("ns")


def test_a_row_with_a_value_python_cannot_hold_is_an_error(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff\xfe"]).buffers())
    far = pa.array([0, 2**60], pa.int64()).cast(pa.timestamp("us"))
    for name, column, value in (("s", broken, "ok"), ("t", far, datetime.datetime(1970, 1, 1))):
        path = str(tmp_path / f"{name}.parquet")
        pq.write_table(pa.table({name: column}), path)
        first, second = rows(path)
        assert first.columns == {name: value}
        assert second.row == 1 and second.columns is None
        assert second.error.startswith(("UnicodeDecodeError: ", "OverflowError: "))


def test_row_groups_are_grouped_and_rows_numbered_through_the_file(tmp_path: Path) -> None:
    path = str(tmp_path / "in.parquet")
    pq.write_table(pa.table({"i": list(range(1000))}), path, row_group_size=100)
    assert [(c.start, c.stop, c.first_row) for c in list_file_splits(path)] == [(0, 10, 0)]
    file_splits = list_file_splits(path, chunk_bytes=1)
    assert [(c.start, c.stop, c.first_row) for c in file_splits] == [(i, i + 1, 100 * i) for i in range(10)]
    for size in (1, 2000, 3000):
        found = rows(path, chunk_bytes=size, batch_rows=30)
        assert [row.row for row in found] == [row.columns["i"] for row in found] == list(range(1000))


def test_tables_and_rows_come_in_the_same_batches(tmp_path: Path) -> None:
    path = str(tmp_path / "in.parquet")
    pq.write_table(pa.table({"s": ["x" * 100_000] * 500}), path, row_group_size=300, use_dictionary=False)
    (file_split,) = list_file_splits(path)
    sizes = [len(batch) for batch in read_file_split(file_split)]
    assert sizes == [batch.num_rows for batch in read_table(file_split)]
    assert sum(sizes) == 500 and max(sizes) < 200  # 16 MB, not 2000 rows


def test_a_damaged_row_group_is_one_error_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    table = pa.table({"s": [uuid.uuid4().hex for _ in range(3000)]})
    pq.write_table(table, path, row_group_size=1000, use_dictionary=False, compression="zstd")
    column = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(bytes(data))
    (file_split,) = list_file_splits(str(path))
    found = [row for batch in read_file_split(file_split) for row in batch]
    errors = [row for row in found if row.error]
    assert [(row.row, row.columns) for row in errors] == [(1000, None)]
    assert errors[0].error.startswith("the Parquet file is damaged (")
    assert errors[0].error.endswith("): its rows 1,001 to 2,000 are missing")
    assert [row.row for row in found if not row.error] == [*range(1000), *range(2000, 3000)]
    assert [batch.num_rows for batch in read_table(file_split)] == [len(batch) for batch in read_file_split(file_split)]
    assert [batch.num_rows for batch in read_table(file_split)].count(1) == 1


def test_a_parquet_file_that_vanishes_is_an_error_row(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"i": [1]}), path)
    (file_split,) = list_file_splits(str(path))
    path.unlink()
    ((row,),) = read_file_split(file_split)
    assert row.error.startswith("the Parquet file cannot be read (")
    assert [batch.num_rows for batch in read_table(file_split)] == [1]


def test_a_file_with_two_columns_of_one_name_is_not_read(tmp_path: Path) -> None:
    path = str(tmp_path / "in.parquet")
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), path)
    with pytest.raises(ConfigError, match="is a Parquet file with two columns named 'a'"):
        list_file_splits(path)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    fs, root = resolve(str(tmp_path / "new/dir"))
    assert not exists(fs, root)
    write_atomic(fs, f"{root}/a.json", b"one")
    write_atomic(fs, f"{root}/a.json", b"two")
    assert (tmp_path / "new/dir/a.json").read_bytes() == b"two"
    assert [p.name for p in (tmp_path / "new/dir").iterdir()] == ["a.json"]
    (tmp_path / "new/dir/taken").mkdir()
    with pytest.raises(OSError):
        write_atomic(fs, f"{root}/taken", b"x")
    assert sorted(p.name for p in (tmp_path / "new/dir").iterdir()) == ["a.json", "taken"]


def test_files_are_written_through_fsspec_too() -> None:
    fs, root = resolve(f"memory://{uuid.uuid4().hex}/out")
    write_atomic(fs, f"{root}/sub/a.json", b"one")
    assert exists(fs, f"{root}/sub/a.json")
    with fs.open_input_file(f"{root}/sub/a.json") as stream:
        assert stream.read() == b"one"


def test_a_gzip_bomb_is_read_in_pieces(tmp_path: Path) -> None:
    engine = zlib.compressobj(9, wbits=31)
    data = b"".join(engine.compress(b"x" * (1 << 20)) for _ in range(64)) + engine.flush()
    (row,) = rows(str(write(tmp_path / "bomb.jsonl.gz", data)), max_row_bytes=1 << 20)
    assert row.error == "the row has 67,108,864 bytes, the limit is 1,048,576 (dataset.max_row_bytes)"


COLUMNS = {
    "text": pa.array(["a", None, "ü", ""]),
    "large_text": pa.array(["a", None, "ü", ""], pa.large_string()),
    "bytes": pa.array([b"\xff", None, b"", b"x"]),
    "fixed": pa.array([b"ab", None, b"cd", b"ef"], pa.binary(2)),
    "numbers": pa.array([1, 2, 2**62 + 1, -4]),
    "unsigned": pa.array([1, 2**64 - 1, 3, 4], pa.uint64()),
    "with_null": pa.array([1, None, 2**62 + 1, 4]),
    "floats": pa.array([1.5, -0.0, math.inf, 1e300]),
    "half": pa.array([1.5, None, 2.0, 0.0], pa.float16()),
    "flags": pa.array([True, None, False, True]),
    "nothing": pa.nulls(4),
    "times": pa.array([datetime.datetime(2024, 1, 1, 1, 1, 1, 7), None, datetime.datetime(1, 1, 1), None]),
    "decimals": pa.array([Decimal("1.50"), None, Decimal("2.00"), Decimal("3.25")]),
    "lists": pa.array([[1, 2], None, [], [None, 3]]),
    "structs": pa.array([{"a": 1, "b": "x"}, None, {"a": None, "b": None}, {"a": 2, "b": ""}]),
    "messages": pa.array([
        [{"role": "user", "content": "hi", "tags": ["a"]}, {"role": "assistant", "content": None, "tags": None}],
        None, [], [None, {"role": "user", "content": "", "tags": []}],
    ]),
    "empty_structs": pa.array([{}, None, {}, {}], pa.struct([])),
    "fixed_lists": pa.array([[1, 2], None, [3, 4], [5, 6]], pa.list_(pa.int8(), 2)),
    "maps": pa.array([[("a", 1)], None, [], [("b", None)]], pa.map_(pa.string(), pa.int64())),
    "words": pa.array(["a", None, "a", "b"]).dictionary_encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS)
def test_values_of_arrow_are_those_of_to_pylist(name: str) -> None:
    whole = COLUMNS[name]
    for array in (whole, whole[1:], whole[:3], whole[2:3], whole[:0], pa.chunked_array([whole[1:], whole])):
        found, expected = to_values(array), array.to_pylist()
        assert found == expected and repr(found) == repr(expected)
