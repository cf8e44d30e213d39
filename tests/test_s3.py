"""What is S3's own: requests, pages, and uploads that nobody ended. Whole runs are in test_stores.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from engines.errors import ConfigError
from engines.types import Completion
from pipeline.dataset.source import list_file_splits
from pipeline.dataset.spool import spooled
from pipeline.output.ownership import NEW
from pipeline.storage.filesystem import abort_uploads, resolve, write_atomic
from pipeline.storage.ledger import Record, write_segment
from pipeline.storage.lock import run_lock
from pipeline.storage.output_files import DATASET, MARKER
from tests.support.s3_server import S3Server
from tests.test_ownership import look


@pytest.fixture
def s3(s3: S3Server) -> Iterator[S3Server]:
    yield s3
    assert s3.asked["PUT copy"] == 0  # a rename is a copy there


def test_small_objects_take_one_request(s3: S3Server) -> None:
    fs, root = resolve(s3.uri("out"))
    write_atomic(fs, f"{root}/manifest.json", b"{}")
    assert s3.asked == {"PUT": 1}


def test_a_text_file_is_detected_with_two_requests(s3: S3Server) -> None:
    for number in range(3):
        s3.put(f"in/{number}.jsonl", b'{"prompt": "a"}\n' * 10_000)
    s3.asked.clear()
    assert len(list_file_splits([s3.uri(f"in/{number}.jsonl") for number in range(3)])) == 3
    assert s3.asked["GET"] == 3 and s3.asked["HEAD"] <= 6  # one of the two is that of the listing


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


def test_a_run_that_comes_second_changes_nothing(s3: S3Server) -> None:
    """Two runs look at a new directory. The second begins only when the first has begun, and even has answers."""
    for name in "ab":
        s3.put(f"in/{name}.jsonl", b"{}\n")
    first, second = (look(s3.uri(f"in/{name}.jsonl"), s3.uri("out")) for name in "ab")
    first.begin()
    second.begin()
    assert s3.objects("out/") == {}  # on a store the claim is written first
    fs, root = resolve(s3.uri("out"))
    with run_lock(fs, root):
        look(s3.uri("in/a.jsonl"), s3.uri("out")).settle()
        write_segment(fs, root, "w", [Record(b"k" * 32, "r", Completion(), 0.0)])
        before = s3.objects("out/")
        with pytest.raises(ConfigError, match="another run is writing"), run_lock(fs, root):
            pass
        assert {key: data for key, data in s3.objects("out/").items() if data} == before and MARKER in before
    with pytest.raises(ConfigError, match="another dataset"):  # when the second gets the lock
        look(s3.uri("in/b.jsonl"), s3.uri("out"))


def test_a_shorter_run_ends_the_uploads_of_parts_that_a_killed_run_never_completed(s3: S3Server) -> None:
    s3.put("in.jsonl", b"{}\n")
    part = "data/part-{:05d}.parquet".format
    killed = look(s3.uri("in.jsonl"), s3.uri("out"))
    killed.settle()
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


def test_rows_of_a_program_are_written_once_and_removed_when_others_replace_them(s3: S3Server) -> None:
    out = s3.uri("out")
    with spooled([{"prompt": "a"}]) as one, spooled(pa.table({"prompt": ["b"] * 1000})) as two:
        assert (one.place(out), one.place(out)) == (True, False)
        own = look(one.target(out), out)
        assert own.state == NEW and s3.objects("out/") == {one.name: b'{"prompt":"a"}\n'}
        own.settle()
        own.commit(())
        with pytest.raises(ConfigError, match="other rows that a program gave"):
            look(two.target(out), out)
        two.place(out)
        look(two.target(out), out, "output.overwrite=true").commit(())
        # pyarrow leaves an empty object for a directory whose file it removed.
        assert [name for name, data in s3.objects("out/").items() if data and name.startswith(DATASET)] == [two.name]
