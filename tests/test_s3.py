"""What is S3's own: requests, pages, and uploads that nobody ended. Whole runs are in test_stores.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.dataset.source import list_file_splits
from pipeline.storage.filesystem import abort_uploads, resolve, write_atomic
from pipeline.storage.output_files import MARKER
from tests.support.s3_server import S3Server
from tests.test_ownership import look


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    for name, value in S3Server.environment.items():
        monkeypatch.setenv(name, value)
    with S3Server() as server:
        yield server
        assert server.asked["PUT copy"] == 0  # a rename is a copy there


def test_small_objects_take_one_request(s3: S3Server) -> None:
    fs, root = resolve(s3.uri("out"))
    write_atomic(fs, f"{root}/manifest.json", b"{}")
    assert s3.asked == {"PUT": 1}


def test_uploads_that_killed_writers_left_are_ended(s3: S3Server) -> None:
    for key in ("out/data/part-00000.parquet", "other/data/part-00000.parquet"):
        s3.begin(key)
    abort_uploads(s3.uri("out"), lambda key: key == "data/part-00000.parquet")
    assert s3.uploads() == ["other/data/part-00000.parquet"]


def test_uploads_are_left_alone_without_a_store(tmp_path: Path) -> None:
    abort_uploads(str(tmp_path), lambda _: True)


@pytest.mark.slow
def test_a_dataset_of_many_objects_is_listed_in_pages(s3: S3Server) -> None:
    client = s3.client()
    for i in range(1500):
        client.put_object(Bucket="bucket", Key=f"in/{i:05d}.jsonl", Body=b"{}\n")
    s3.asked.clear()
    chunks = list_file_splits(s3.uri("in/*.jsonl"))
    assert [chunk.name for chunk in chunks] == [f"{i:05d}.jsonl" for i in range(1500)]
    assert s3.asked["GET list"] <= 4


def test_a_run_that_comes_second_keeps_the_marker_of_the_first(s3: S3Server) -> None:
    s3.put("in/a.jsonl", b"{}\n")
    first, second = (look(s3.uri(f"in/{name}.jsonl"), s3.uri("out")) for name in "ab")
    first.begin()
    before = s3.objects("out/")
    second.begin()
    assert s3.objects("out/") == before and list(before) == [MARKER]


def test_a_shorter_run_ends_the_uploads_of_parts_that_a_killed_run_never_completed(s3: S3Server) -> None:
    s3.put("in.jsonl", b"{}\n")
    part = "data/part-{:05d}.parquet".format
    killed = look(s3.uri("in.jsonl"), s3.uri("out"))
    killed.begin()
    killed.intend(part(i) for i in range(4))
    s3.put(f"out/{part(0)}", b"")
    for name in (part(1), part(3), "data/mine.parquet"):
        s3.begin(f"out/{name}")
    for anew in (False, True):
        own = look(s3.uri("in.jsonl"), s3.uri("out"))
        if anew:
            own.clear()
        own.intend([part(0)])
        assert part(3) not in own.files  # a file that the user puts there is the user's
        abort_uploads(s3.uri("out"), own.may_upload)
        assert s3.uploads() == ["out/data/mine.parquet"]
        look(s3.uri("in.jsonl"), s3.uri("out")).intend(part(i) for i in range(4))
        s3.begin(f"out/{part(3)}")
