"""Whole runs against an object store: real S3 requests to a server on loopback that throttles and fails in passing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.types import Completion, ConfigError
from pipeline.fs import abort_uploads, patiently, resolve, store_failed, write_atomic
from pipeline.ledger import Record, list_segments, read_index, write_segment
from pipeline.lock import run_lock
from pipeline.source import list_chunks
from tests.conftest import ask
from tests.s3_server import S3Server

Write = Callable[..., Path]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    with S3Server() as server:
        yield server
        assert server.asked["PUT copy"] == 0  # a rename is a copy there


def put(s3: S3Server, key: str, path: Path) -> str:
    s3.client().upload_file(str(path), "bucket", key)
    return s3.uri(key)


def objects(s3: S3Server, prefix: str) -> dict[str, bytes]:
    client = s3.client()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=prefix)
    keys = [found["Key"] for page in pages for found in page.get("Contents", [])]
    return {key.removeprefix(prefix): client.get_object(Bucket="bucket", Key=key)["Body"].read() for key in keys}


def command(dataset: str, out: str, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "jobs.infer", "engine=echo", f"dataset.path={dataset}", f"output.path={out}",
        "engine.kwargs.latency_s=0.02", "engine.max_concurrency=8", "run.flush_s=0.2",
        "dataset.chunk_bytes=20000", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_a_run_on_a_failing_store_equals_one_on_a_disk_byte_for_byte(
    s3: S3Server, tmp_path: Path, write_jsonl: Write, format: str
) -> None:
    data = write_jsonl([*(ask(f"question {i}", id=f"r{i}", n=i) for i in range(600)), "no json"])
    more = ["output.format=" + format]
    run = subprocess.run(command(str(data), str(tmp_path / "out"), *more), capture_output=True, text=True)
    assert run.returncode == 3, run.stderr
    dataset = put(s3, "in/in.jsonl", data)
    s3.failing = 0.15
    run = subprocess.run(command(dataset, s3.uri("out"), *more), capture_output=True, text=True, timeout=300)
    assert run.returncode == 3, run.stderr
    s3.failing = 0.0
    assert s3.refused.total() > 5
    there = objects(s3, "out/")
    for folder in ("data", "errors"):
        here = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out" / folder).iterdir()}
        assert here == {key: value for key, value in there.items() if key.startswith(folder)}
    assert b"601" in there["report.html"] and there["report.html"].endswith(b"</html>")
    manifest = json.loads(there["manifest.json"])
    assert manifest["rows"]["total"] == 601 and manifest["files"].keys() == {
        key for key in there if key.startswith(("data/", "errors/"))
    }


def test_a_killed_run_goes_on_from_the_store_and_leaves_nothing_half_done(
    s3: S3Server, tmp_path: Path, write_jsonl: Write
) -> None:
    dataset = put(s3, "in.jsonl", write_jsonl([ask(f"question {i}", id=f"r{i}") for i in range(600)]))
    # What a killed writer of a large part leaves, and what another's does beside it.
    for key in ("out/data/part-00000.parquet", "other/data/part-00000.parquet"):
        s3.client().create_multipart_upload(Bucket="bucket", Key=key)
    slow = ["engine.kwargs.latency_s=0.1"]
    run = subprocess.Popen(command(dataset, s3.uri("out"), *slow), stderr=subprocess.PIPE, text=True)
    fs, root = resolve(s3.uri("out"))
    deadline = time.monotonic() + 120
    while len(list_segments(fs, root)) < 4:
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.1)
    run.send_signal(signal.SIGKILL)
    run.wait()
    time.sleep(2)  # its workers notice, and commit what they have
    known = len(read_index(fs, root))
    assert 0 < known < 600
    for name in [name for name in objects(s3, "out/") if "_lock-" in name]:  # a minute later
        s3.client().delete_object(Bucket="bucket", Key=f"out/{name}")
    again = subprocess.run(command(dataset, s3.uri("out"), *slow), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    manifest = json.loads(objects(s3, "out/")["manifest.json"])
    assert manifest["rows"]["done"] == 600 and manifest["this_run"]["asked"] <= 600 - known
    left = s3.client().list_multipart_uploads(Bucket="bucket").get("Uploads", [])
    assert [upload["Key"] for upload in left] == ["other/data/part-00000.parquet"]
    assert not [name for name in objects(s3, "out/") if "_lock-" in name]


def test_of_runs_into_one_directory_on_a_store_at_most_one_goes_on(s3: S3Server) -> None:
    import threading

    fs, root = resolve(s3.uri("out"))
    inside: list[int] = []
    refused: list[str] = []
    start = threading.Barrier(6)

    def enter(number: int) -> None:
        start.wait()
        try:
            with run_lock(fs, root):
                inside.append(number)
                time.sleep(1)
        except ConfigError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inside) <= 1 and len(inside) + len(refused) == 6 and "another run is writing" in refused[0]
    with run_lock(fs, root), pytest.raises(ConfigError, match="another run is writing"), run_lock(fs, root):
        pass
    assert not any(objects(s3, "out/").values())


def test_a_store_that_is_away_for_a_while_is_waited_for(s3: S3Server) -> None:
    fs, root = resolve(s3.uri("out"))
    tries: list[Any] = []

    def work() -> str:
        tries.append(1)
        s3.failing = 1.0 if len(tries) == 1 else 0.0
        fs.get_file_info(f"{root}/x")
        return "there"

    assert patiently(work) == "there" and len(tries) == 2
    with pytest.raises(FileNotFoundError):
        patiently(lambda: fs.open_input_file(f"{root}/nothing"))
    s3.failing = 1.0
    with pytest.raises(OSError) as caught:
        patiently(lambda: fs.get_file_info(f"{root}/x"), 0.0)
    assert store_failed(caught.value)


def test_a_segment_of_a_store_that_fails_is_not_taken_for_torn(s3: S3Server) -> None:
    fs, root = resolve(s3.uri("out"))
    write_segment(fs, root, "w", [Record(b"k" * 32, "r", Completion(), 0.0)])
    write_atomic(fs, f"{root}/_segments/torn.parquet", b"PAR1 and no more")
    s3.failing = 0.5
    index = read_index(fs, root)
    assert len(index) == 1 and [path.rsplit("/", 1)[1] for path in index.torn] == ["torn.parquet"]


def test_small_objects_take_one_request(s3: S3Server) -> None:
    fs, root = resolve(s3.uri("out"))
    write_atomic(fs, f"{root}/manifest.json", b"{}")
    assert s3.asked == {"PUT": 1}


def test_uploads_are_left_alone_without_a_store(tmp_path: Path) -> None:
    abort_uploads(str(tmp_path))


def test_a_dataset_of_many_objects_is_listed_in_pages(s3: S3Server) -> None:
    client = s3.client()
    for i in range(1500):
        client.put_object(Bucket="bucket", Key=f"in/{i:05d}.jsonl", Body=b"{}\n")
    s3.asked.clear()
    chunks = list_chunks(s3.uri("in/*.jsonl"))
    assert [chunk.name for chunk in chunks] == [f"{i:05d}.jsonl" for i in range(1500)]
    assert s3.asked["GET list"] <= 4
