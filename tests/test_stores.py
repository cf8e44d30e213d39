"""Whole runs against object stores: real requests to servers on loopback that throttle and fail in passing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from engines.errors import ConfigError
from engines.types import Completion
from pipeline.dataset.source import list_file_splits
from pipeline.storage.filesystem import exists, listing, resolve, write_atomic
from pipeline.storage.ledger import Record, list_segments, write_segment
from pipeline.storage.ledger_index import read_index
from pipeline.storage.lock import run_lock
from pipeline.storage.retry import patiently, store_failed
from tests.support.infer import ask
from tests.support.marks import slow
from tests.support.processes import replicas, until, wait_gone
from tests.support.s3_server import S3Server
from tests.support.store_server import AzureServer, GcsServer

Write = Callable[..., Path]
Store = S3Server | GcsServer | AzureServer


@pytest.fixture(params=[S3Server, GcsServer, AzureServer], ids=["s3", "gs", "az"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with request.param() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server
        assert server.asked["PUT copy"] == 0  # a rename is a copy there


def put(store: Store, key: str, path: Path) -> str:
    store.put(key, path.read_bytes())
    return store.uri(key)


def command(dataset: str, out: str, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "jobs.infer", "engine=echo", f"dataset.path={dataset}", f"output.path={out}",
        "engine.kwargs.latency_s=0.02", "engine.max_concurrency=8", "run.flush_s=0.2",
        "dataset.chunk_bytes=20000", *more,
    ]  # fmt: skip


WHOLE_RUNS = [
    slow(S3Server, "parquet", id="s3"), slow(S3Server, "jsonl", id="s3-jsonl"), slow(GcsServer, "parquet", id="gs"),
    slow(AzureServer, "jsonl", id="az-jsonl"),
]  # fmt: skip
KILLED_RUNS = [pytest.param(S3Server, id="s3"), slow(GcsServer, id="gs"), slow(AzureServer, id="az")]


@pytest.mark.parametrize(("store", "format"), WHOLE_RUNS, indirect=["store"])
def test_a_run_on_a_failing_store_equals_one_on_a_disk_byte_for_byte(
    store: Store, tmp_path: Path, write_jsonl: Write, format: str
) -> None:
    data = write_jsonl([*(ask(f"question {i}", id=f"r{i}", n=i) for i in range(600)), "no json"])
    more = ["output.format=" + format]
    run = subprocess.run(command(str(data), str(tmp_path / "out"), *more), capture_output=True, text=True)
    assert run.returncode == 3, run.stderr
    dataset = put(store, "in/in.jsonl", data)
    store.failing = 0.15
    run = subprocess.run(command(dataset, store.uri("out"), *more), capture_output=True, text=True, timeout=300)
    assert run.returncode == 3, run.stderr
    store.failing = 0.0
    assert store.refused.total() >= 3
    there = store.objects("out/")
    for folder in ("data", "errors"):
        here = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out" / folder).iterdir()}
        assert here == {key: value for key, value in there.items() if key.startswith(folder)}
    assert b"601" in there["report.html"] and there["report.html"].endswith(b"</html>")
    manifest = json.loads(there["manifest.json"])
    assert manifest["rows"]["total"] == 601 and manifest["files"].keys() == {
        key for key in there if key.startswith(("data/", "errors/"))
    }


@pytest.mark.slow
@pytest.mark.parametrize("store", KILLED_RUNS, indirect=True)
def test_a_killed_run_goes_on_from_the_store_and_leaves_nothing_half_done(
    store: Store, tmp_path: Path, write_jsonl: Write
) -> None:
    dataset = put(store, "in.jsonl", write_jsonl([ask(f"question {i}", id=f"r{i}") for i in range(600)]))
    # What a killed writer of a large part leaves, and what another's does beside it.
    for key in ("out/data/part-00000.parquet", "other/data/part-00000.parquet"):
        store.begin(key)
    slow = "engine.kwargs.latency_s=1"  # more than a minute in all: it must still run when it is killed
    run = subprocess.Popen(command(dataset, store.uri("out"), slow), stderr=subprocess.PIPE, text=True)
    fs, root = resolve(store.uri("out"))
    until(lambda: len(list_segments(fs, root)) >= 4, run)
    workers = replicas(run.pid)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    wait_gone(workers)  # they commit what they have
    known = len(read_index(fs, root))
    assert 0 < known < 600
    for name in [name for name in store.objects("out/") if "_lock-" in name]:  # a minute later
        store.delete(f"out/{name}")
    again = subprocess.run(command(dataset, store.uri("out")), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    manifest = json.loads(store.objects("out/")["manifest.json"])
    assert manifest["rows"]["done"] == 600 and manifest["this_run"]["asked"] <= 600 - known
    if isinstance(store, S3Server):  # elsewhere the store itself forgets them after a week
        assert store.uploads() == ["other/data/part-00000.parquet"]
    assert not [name for name in store.objects("out/") if "_lock-" in name]


def test_of_runs_into_one_directory_on_a_store_at_most_one_goes_on(store: Store) -> None:
    fs, root = resolve(store.uri("out"))
    inside: list[int] = []
    refused: list[str] = []
    start = threading.Barrier(6)

    def enter(number: int) -> None:
        start.wait()
        try:
            with run_lock(fs, root):
                inside.append(number)
                until(lambda: len(inside) + len(refused) == 6)
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
    assert not any(store.objects("out/").values())


@pytest.mark.slow
@pytest.mark.parametrize("store", KILLED_RUNS, indirect=True)
def test_a_store_that_is_away_for_a_while_is_waited_for(store: Store) -> None:
    fs, root = resolve(store.uri("out"))
    tries: list[Any] = []

    def work() -> str:
        tries.append(1)
        store.failing = 1.0 if len(tries) == 1 else 0.0
        fs.get_file_info(f"{root}/x")
        return "there"

    assert patiently(work) == "there" and len(tries) == 2
    with pytest.raises(FileNotFoundError):
        patiently(lambda: fs.open_input_file(f"{root}/nothing"))
    store.failing = 1.0
    with pytest.raises(OSError) as caught:
        patiently(lambda: fs.get_file_info(f"{root}/x"), 0.0)
    assert store_failed(caught.value)


@pytest.mark.parametrize("store", KILLED_RUNS, indirect=True)
def test_a_segment_of_a_store_that_fails_is_not_taken_for_torn(store: Store) -> None:
    fs, root = resolve(store.uri("out"))
    write_segment(fs, root, "w", [Record(b"k" * 32, "r", Completion(), 0.0)])
    write_atomic(fs, f"{root}/_segments/torn-0123456789ab.parquet", b"PAR1 and no more")
    store.failing = 0.5
    index = read_index(fs, root)
    assert len(index) == 1 and [path.rsplit("/", 1)[1] for path in index.torn] == ["torn-0123456789ab.parquet"]


def test_files_and_directories_are_told_apart(store: Store) -> None:
    fs, root = resolve(store.uri("a/out"))
    for key in ("a/out-1/x.jsonl", "a/out.txt", "a/out/_segments/y.jsonl", "a/out/two words.jsonl"):
        store.put(key, b"{}\n" * 3)
    write_atomic(fs, root + "/empty", b"")
    kinds = [fs.get_file_info(root + below).type for below in ("", "/empty", "/none", "/two words.jsonl")]
    assert kinds == [pafs.FileType.Directory, pafs.FileType.File, pafs.FileType.NotFound, pafs.FileType.File]
    there = {info.base_name: info.type.name for info in listing(fs, root)}
    if isinstance(store, GcsServer):  # pyarrow's client tells the files only
        there["_segments"] = "Directory"
    assert there == {"_segments": "Directory", "empty": "File", "two words.jsonl": "File"}
    assert listing(fs, root + "/none") == [] and not exists(fs, root + "/none")
    assert [chunk.name for chunk in list_file_splits(store.uri("a/out*/*.jsonl"))] == [
        "out-1/x.jsonl",
        "out/two words.jsonl",
    ]
    with fs.open_input_file(root + "/two words.jsonl") as file:
        assert file.size() == 9 and file.read() == b"{}\n" * 3 and file.read_at(2, 3) == b"{}"
    fs.delete_file(root + "/_segments/y.jsonl")
    assert not exists(fs, root + "/_segments/y.jsonl")
    with pytest.raises(FileNotFoundError):
        fs.open_input_file(root + "/none")


def test_an_object_appears_whole_or_not_at_all(store: Store) -> None:
    fs, root = resolve(store.uri("out"))
    write_atomic(fs, f"{root}/manifest.json", b"old")
    with fs.open_output_stream(f"{root}/manifest.json", compression=None) as stream:
        stream.write(b"new")
        assert store.objects("out/") == {"manifest.json": b"old"}
    large = bytes(range(256)) * (72 << 12)  # 72 MiB: in several requests
    store.failing = 0.1
    write_atomic(fs, f"{root}/large", large)
    with fs.open_input_file(f"{root}/large") as file:
        assert file.read() == large
    store.failing = 0.0
    assert store.objects("out/") == {"large": large, "manifest.json": b"new"}
