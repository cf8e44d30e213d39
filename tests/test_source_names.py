"""The names of input files. They are parts of ids and of keys: a name that changes loses the answers to sampled rows. No
Ray."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.configuration.compose import compose
from pipeline.dataset import source
from pipeline.dataset.formats import RowParser
from pipeline.dataset.keys import RequestHasher
from pipeline.dataset.reader import ReadSplit, RowReader
from pipeline.dataset.source import list_file_splits
from pipeline.dataset.tree import printable
from pipeline.output.ownership import dataset_places
from pipeline.storage.filesystem import split_options
from pipeline.storage.output_files import MARKER
from tests.support.file_server import FileServer
from tests.support.length_executor import Job, LengthExecutor

SAMPLED = "generation.temperature=1"
SECRET = "0123456789abcdef"


def write(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def names(*paths: object) -> list[str]:
    return [split.name for split in list_file_splits([str(path) for path in paths])]


def given(*paths: object) -> Any:
    """A value of `dataset.path`."""
    listed = ",".join(f"'{path}'" for path in paths)
    return f"[{listed}]"


def keys(*paths: object) -> list[bytes | None]:
    """The keys of sampled rows."""
    config = compose(["engine=echo", SAMPLED])
    reader = RowReader(RowParser(), RequestHasher(config.engine, config.params()), 1 << 20)
    splits = [ReadSplit(number, split) for number, split in enumerate(list_file_splits([str(path) for path in paths]))]
    return [item.key for split in splits for items in reader.read(split) for item in items]


def rows(job: Job) -> list[dict[str, Any]]:
    return [row for path in sorted((job.out / "data").iterdir()) for row in pq.read_table(path).to_pylist()]


# --- files of one name ---------------------------------------------------------------------------------------------------


def test_only_later_files_of_a_name_get_a_longer_one(tmp_path: Path) -> None:
    a, b, c = (write(tmp_path / f"{place}/in.jsonl", ["x"]) for place in ("x/1", "y/1", "z/1"))
    other = write(tmp_path / "y/2/other.jsonl", ["x"])
    assert names(a) == ["in.jsonl"]
    assert names(a, b) == ["in.jsonl", "1/in.jsonl"]
    assert names(a, b, other, c) == ["in.jsonl", "1/in.jsonl", "other.jsonl", "z/1/in.jsonl"]
    assert names(tmp_path / "x", tmp_path / "y") == ["1/in.jsonl", "y/1/in.jsonl", "2/other.jsonl"]


def test_a_second_file_of_a_name_asks_no_row_again(job: Job, length: type[LengthExecutor], tmp_path: Path) -> None:
    first, second = (write(tmp_path / f"{place}/in.jsonl", ["a", "b"]) for place in ("d1", "d2"))
    job(first, SAMPLED)
    job(given(first, second), SAMPLED)
    assert length.passes == [2, 2]
    assert [row["id"] for row in rows(job)] == ["in.jsonl:1", "in.jsonl:2", "d2/in.jsonl:1", "d2/in.jsonl:2"]
    third = write(tmp_path.parent / f"{tmp_path.name}-elsewhere/in.jsonl", ["a", "b", "c"])
    job(given(first, second, third), SAMPLED)
    assert length.passes == [2, 2, 3]


@pytest.fixture
def earlier(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """The names of earlier versions: longer ones for all files if two were equal. They end with a call."""

    def with_names(files: list[Any]) -> list[Any]:
        if len({file.name for file in files}) < len(files):
            common = os.path.commonprefix([file.uri for file in files]).rpartition("/")[0]  # noqa: RUF071
            return [replace(file, name=file.uri[len(common) :].lstrip("/")) for file in files]
        return [replace(file, name=file.old_name or file.name, old_name="") for file in files]

    with monkeypatch.context() as patch:
        patch.setattr(source, "_with_names", with_names)
        yield patch.undo


def test_an_output_with_the_names_of_earlier_versions_goes_on(
    job: Job, length: type[LengthExecutor], tmp_path: Path, earlier: Callable[[], None]
) -> None:
    deltalake = pytest.importorskip("deltalake")
    files = [write(tmp_path / f"{place}/in.jsonl", ["a", "b"]) for place in ("d1", "d2")]
    write(files[0].with_name("more.jsonl"), ["c"])
    data = given(*files, files[0].with_name("more.jsonl"))
    table = f"output.table=delta://{tmp_path / 'table'}"
    job(data, SAMPLED, table)
    assert [row["id"] for row in rows(job)] == [f"{n}:{i}" for n in ("d1/in.jsonl", "d2/in.jsonl") for i in (1, 2)] + [
        "d1/more.jsonl:1"
    ]
    earlier()
    files[1].write_text(files[1].read_text() + '{"prompt": "new"}\n')
    job(data, SAMPLED, table)
    assert length.passes == [5, 1]  # the new row
    assert [row["response"] for row in rows(job)] == ["1", "1", "1", "1", "3", "1"]
    assert deltalake.DeltaTable(str(tmp_path / "table")).to_pyarrow_table().num_rows == 6


def test_a_row_never_gets_the_answer_to_a_row_of_another_file(
    job: Job, length: type[LengthExecutor], tmp_path: Path, earlier: Callable[[], None]
) -> None:
    """The earlier name of the first file is the new name of the second."""
    earlier()
    first, second = write(tmp_path / "d/in.jsonl", ["a"]), write(tmp_path / "q/d/in.jsonl", ["a", "b"])
    job(given(first, second), SAMPLED)
    assert names(first, second) == ["in.jsonl", "d/in.jsonl"]
    write(first, ["a", "b"])
    job(given(first, second), SAMPLED)
    assert length.passes == [3, 1]


def test_lance_tables_of_one_name_have_rows_of_their_own(tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    places = [tmp_path / "a/x.lance", tmp_path / "b/x.lance"]
    for place in places:
        place.parent.mkdir()
        lance.write_dataset(pa.table({"prompt": ["same", "same"]}), str(place))
    before = keys(*places)
    assert len(set(before)) == 4
    assert keys(places[0]) == before[:2]
    lance.write_dataset(pa.table({"prompt": ["new"]}), str(places[1]), mode="append")
    assert keys(*places)[:4] == before  # the name has no version of the table


# --- signed URLs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query",
    [f"X-Amz-Signature={SECRET}&X-Amz-Expires=5", f"sv=1&sig=ab/{SECRET}=", f"sig=/{SECRET}", f"a.b&token={SECRET}"],
)
def test_a_name_has_no_query(job: Job, length: type[LengthExecutor], query: str) -> None:
    data = b'{"prompt": "a"}\n{"prompt": "b"}\nbroken\n'
    with FileServer({"in.jsonl": data, "in.csv": b"prompt,n\nx,1\ny,2\n"}) as server:
        url = f"{server.url}/in.jsonl"
        job(given(f"{url}?{query}"), SAMPLED)
        assert all(SECRET in asked for asked in server.queries)
        job(given(f"{url}?{query.replace(SECRET, 'fedcba9876543210')}"), SAMPLED)
        assert length.passes == [2, 0]
        assert names(f"{server.url}/in.csv?{query}", f"{server.url}/in.csv?{query}2")[0] == "in.csv"
        assert {split.kind for split in list_file_splits(f"{server.url}/in.csv?{query}")} == {"csv"}
    assert [row["id"] for row in rows(job)] == ["in.jsonl:1", "in.jsonl:2", "in.jsonl:3"]
    assert rows(job)[2]["error"]["message"].startswith("in.jsonl:3: ")
    files = [path for path in job.out.rglob("*") if path.is_file()]
    texts = [str(pq.read_table(path).to_pydict()) for path in files if path.suffix == ".parquet"]
    texts += [path.read_bytes().decode(errors="replace") for path in files]
    assert not [text for text in [*texts, job.printed] if SECRET in text]


def test_urls_that_differ_in_their_queries_are_different_files() -> None:
    with FileServer({"get": b'{"prompt": "a"}\n'}) as server:
        found = names(*(f"{server.url}/get?id={number}" for number in range(4)))
    host = server.url.partition("://")[2]
    assert found == ["get", f"{host}/get", "get (2)", "get (3)"]


def test_the_answers_to_a_url_with_a_query_are_kept(
    job: Job, length: type[LengthExecutor], earlier: Callable[[], None]
) -> None:
    with FileServer({"get": b'{"prompt": "a"}\n'}) as server:
        url = f"{server.url}/get?path=/in.jsonl"
        job(given(url), SAMPLED)
        assert rows(job)[0]["id"] == "in.jsonl:1"
        marker = json.loads((job.out / MARKER).read_text())
        (job.out / MARKER).write_text(json.dumps({**marker, "dataset": url}))  # earlier versions kept such a query
        earlier()
        job(given(url), SAMPLED)
        assert names(url) == ["get"]
    assert length.passes == [1, 0]
    assert json.loads((job.out / MARKER).read_text())["dataset"] == f"{server.url}/get"


def test_the_query_of_a_url_begins_with_its_first_question_mark() -> None:
    for query in ("?sig=/a", "?a", "?a.b=c", "?x=?y", "?x="):
        assert split_options(f"https://h/d/in.jsonl{query}") == ("https://h/d/in.jsonl", query)
        assert dataset_places(f"https://h/d/in.jsonl{query}") == ["https://h/d/in.jsonl"]
    assert split_options("s3://b/part-?.jsonl?region=/x") == ("s3://b/part-?.jsonl", "?region=/x")
    assert split_options("s3://b/part-?.jsonl") == ("s3://b/part-?.jsonl", "")


# --- names that are not UTF-8 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [b"caf\xe9.jsonl", b"caf\xe9/in.jsonl", b"y=caf\xe9/in.jsonl"])
@pytest.mark.parametrize("glob", ["", "/**/*.jsonl"])
def test_a_name_that_is_not_utf_8_is_one_error_row(job: Job, tmp_path: Path, place: bytes, glob: str) -> None:
    folder = tmp_path / "in"
    bad = folder / os.fsdecode(place)
    write(bad, ["a"])
    bad.with_suffix(".txt").touch()
    write(folder / "ok.jsonl", ["b"])
    job(Path(f"{folder}{glob}"), SAMPLED)
    shown = place.decode("utf-8", "backslashreplace")
    failed, done = sorted(rows(job), key=lambda row: row["error"] is None)
    assert (done["id"], done["response"]) == ("ok.jsonl:1", "1")
    assert failed["id"] == f"{shown}:1" and "its name is not UTF-8" in failed["error"]["message"]
    manifest = json.loads((job.out / "manifest.json").read_text())
    assert f"{folder}/{shown}" in [file["path"] for file in manifest["input"]["files"]]
    assert f"{shown} is not readable" in " ".join(job.printed.split())


def test_printable_names() -> None:
    assert printable("é/ü.jsonl") == "é/ü.jsonl"
    assert printable(os.fsdecode(b"caf\xe9")) == "caf\\xe9"
    assert printable("\ud83d") == "\\ud83d"
