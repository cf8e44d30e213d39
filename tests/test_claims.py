"""The claim of a run on an object store or a network file system: one run at a time, also if one was suspended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import psutil
import pyarrow.fs as pafs
import pytest

from engines.errors import ConfigError, ErrorCode
from pipeline.errors import Stopped
from pipeline.storage import claim, lock
from pipeline.storage.claim import ClaimHolder, claim_of, join_claim
from pipeline.storage.filesystem import exists, listing, remove, resolve, write_atomic
from pipeline.storage.ledger import list_segments
from pipeline.storage.lock import held, is_shared, run_lock
from pipeline.storage.output_files import is_claim
from tests.support.infer import ask
from tests.support.marks import slow
from tests.support.processes import PATIENCE_S, family, finish, own_ray, until
from tests.support.s3_server import S3Server


def claims(s3: S3Server) -> list[str]:
    return [key for key in s3.objects("out/") if "_lock-" in key]


def files(s3: S3Server) -> dict[str, bytes]:
    """The objects of the output, without the markers of directories."""
    return {key: data for key, data in s3.objects("out/").items() if data}


# -- whole runs -------------------------------------------------------------------------------------------------------


def start(s3: S3Server, latency_s: float) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "jobs.infer", "engine=echo", f"dataset.path={s3.uri('in.jsonl')}",
        f"output.path={s3.uri('out')}", f"engine.kwargs.latency_s={latency_s}", "engine.max_concurrency=4",
        "run.flush_s=0.2",
    ]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=own_ray(), start_new_session=True)


def send(number: signal.Signals, processes: list[psutil.Process]) -> None:
    for process in processes:
        process.send_signal(number)


def take_over(s3: S3Server) -> dict[str, bytes]:
    """Another run, a minute later, that answers all rows. Returns the objects of the output."""
    (name,) = claims(s3)
    s3.age(f"out/{name}", 61)
    finish(start(s3, 0.0))
    found = files(s3)
    assert json.loads(found["manifest.json"])["rows"] == {**json.loads(found["manifest.json"])["rows"], "done": 60}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("everything", [True, slow(False)], ids=["machine", "driver"])
def test_a_run_that_was_suspended_while_it_asked_stops_and_leaves_the_newer_run_alone(
    s3: S3Server, everything: bool
) -> None:
    s3.put("in.jsonl", "\n".join(json.dumps(ask(f"q{i}", id=f"r{i}")) for i in range(60)).encode())
    first = start(s3, 2.0)
    fs, root = resolve(s3.uri("out"))
    until(lambda: list_segments(fs, root), first)
    stopped = [psutil.Process(first.pid), *(family(first.pid) if everything else [])]
    send(signal.SIGSTOP, stopped)
    before = take_over(s3)
    send(signal.SIGCONT, stopped)
    text = finish(first, 4)
    assert "another run has taken over" in text and "a-run-that-lost-its-output" in text
    after = files(s3)
    assert {key: after[key] for key in before} == before
    # A request that was on its way when the run was suspended may still arrive.
    assert len(after.keys() - before.keys()) <= 2 and not after.keys() - before.keys() & {"manifest.json"}
    assert claims(s3) == []


@pytest.mark.slow
def test_a_run_that_was_suspended_while_it_wrote_the_output_does_not_commit_it(s3: S3Server) -> None:
    s3.put("in.jsonl", "\n".join(json.dumps(ask(f"q{i}", id=f"r{i}")) for i in range(60)).encode())
    stopped: list[psutil.Process] = []
    suspended = threading.Event()

    def suspend(method: str, key: str) -> None:
        if (method, key) == ("PUT", "out/data/part-00000.parquet") and not stopped:
            stopped.extend([psutil.Process(first.pid), *family(first.pid)])
            send(signal.SIGSTOP, stopped)
            suspended.set()

    s3.after = suspend
    first = start(s3, 0.0)
    until(suspended.is_set, first)
    before = take_over(s3)
    send(signal.SIGCONT, stopped)
    assert "another run has taken over" in finish(first, 4)
    assert files(s3) == before


# -- claims -----------------------------------------------------------------------------------------------------------


def test_a_claim_that_was_replaced_is_noticed_before_the_next_write(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "WAIT_S", 0.0)
    monkeypatch.setattr(claim, "BEAT_S", 3600.0)
    fs, root = resolve(s3.uri("out"))
    with run_lock(fs, root):
        old = claim_of(root)
        assert isinstance(old, ClaimHolder)
        write_atomic(fs, f"{root}/manifest.json", b"old")
        s3.age(f"out/_segments/{old.name}", 20)
        new = ClaimHolder(fs, root, "")
        with pytest.raises(BlockingIOError):
            new.acquire()
        s3.age(f"out/_segments/{old.name}", 41)
        new.acquire()
        for change in (
            lambda: write_atomic(fs, f"{root}/manifest.json", b"x"),
            lambda: remove(fs, f"{root}/manifest.json"),
        ):
            with pytest.raises(Stopped) as caught:
                change()
            assert caught.value.code == ErrorCode.OUTPUT_TAKEN
        assert s3.objects("out/")["manifest.json"] == b"old"
        write_atomic(fs, f"{root}-2/manifest.json", b"elsewhere")
        old.lost = False  # as in another process of the run, which has not looked yet
        with pytest.raises(Stopped):
            old.check()
    assert claims(s3) == [f"_segments/{new.name}"]
    write_atomic(fs, f"{root}/manifest.json", b"the run has ended: nothing is checked any more")


def test_a_suspended_run_that_nobody_replaced_goes_on(s3: S3Server) -> None:
    fs, root = resolve(s3.uri("out"))
    with run_lock(fs, root):
        mine = claim_of(root)
        assert isinstance(mine, ClaimHolder)
        for _ in range(2):
            s3.age(f"out/_segments/{mine.name}", 3600)
            mine.renew()
        assert not mine.lost and held(fs, root)


def test_a_run_that_wakes_while_it_is_replaced_goes_on_or_stops_but_never_do_both_go_on(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old run wakes at each point of the new run's take-over."""
    monkeypatch.setattr(claim, "WAIT_S", 0.2)
    fs, root = resolve(s3.uri("out"))

    def race(pause: str) -> tuple[bool, bool]:
        """Whether the old and the new run go on, where the old one renews its claim after the new one's request `pause`."""
        old, new = ClaimHolder(fs, root, ""), ClaimHolder(fs, root, "")
        old.acquire()
        s3.age(f"out/_segments/{old.name}", 61)
        left = [int(pause[-1])]
        method = pause[:-1]

        def wake(seen: str, key: str) -> None:
            if threading.current_thread().name != "old" and seen == method and (seen == "GET" or new.name in key):
                left[0] -= 1
                if not left[0]:
                    thread = threading.Thread(target=old.renew, name="renewal")
                    thread.start()
                    waker.append(thread)

        waker: list[threading.Thread] = []
        s3.after = wake
        taken = True
        try:
            new.acquire()
        except BlockingIOError:
            taken = False
        s3.after = lambda method, key: None
        for thread in waker:
            thread.join()
        if not waker:
            old.renew()
        for one in (old, new):
            if exists(fs, one.path):
                fs.delete_file(one.path)
        return not old.lost, taken

    results = {pause: race(pause) for pause in ("PUT1", "GET1", "PUT2", "GET2", "GET3")}
    assert (True, True) not in results.values(), results


def test_a_claim_counts_that_is_missing_while_its_run_rewrites_it(s3: S3Server) -> None:
    fs, root = resolve(s3.uri("out"))
    old, new = ClaimHolder(fs, root, ""), ClaimHolder(fs, root, "")
    old.acquire()
    new.replaced = [old.name]
    new._write()
    key = f"out/_segments/{new.name}"
    content = s3.objects(key)[""]
    steps = ["hide", "show"]  # around the first request for the claim

    def hide(method: str, asked: str) -> None:
        if asked == key and method in ("HEAD", "GET") and steps[:1] == ["hide"]:
            del steps[0]
            s3.delete(key)

    def show(method: str, asked: str) -> None:
        if asked == key and method in ("HEAD", "GET") and steps[:1] == ["show"]:
            del steps[0]
            s3.put(key, content)

    s3.before, s3.after = hide, show
    try:
        old.renew()
    finally:
        s3.before = s3.after = lambda method, key: None
    assert steps == [] and old.lost


@pytest.mark.parametrize("count", [2, 3])
def test_of_runs_that_begin_at_the_same_instant_one_goes_on(s3: S3Server, count: int) -> None:
    fs, root = resolve(s3.uri("out"))
    inside: list[int] = []
    refused: list[str] = []
    # All write their claims before any of them looks.
    written = threading.Barrier(count)
    waited: set[str] = set()

    def after(method: str, key: str) -> None:
        if method == "PUT" and "_lock-" in key and key not in waited:
            waited.add(key)
            written.wait(30)

    s3.after = after

    def enter(number: int) -> None:
        try:
            with run_lock(fs, root):
                inside.append(number)
                until(lambda: len(inside) + len(refused) == count)
        except ConfigError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inside) == 1 and all("another run is writing" in text for text in refused)


def test_the_claim_of_a_run_that_ends_while_the_store_is_away_is_removed(s3: S3Server) -> None:
    fs, root = resolve(s3.uri("out"))
    inside, leave = threading.Event(), threading.Event()

    def run() -> None:
        with run_lock(fs, root):
            inside.set()
            leave.wait(PATIENCE_S)

    thread = threading.Thread(target=run)
    thread.start()
    inside.wait(PATIENCE_S)
    assert len(claims(s3)) == 1
    s3.failing = 1.0
    leave.set()
    until(lambda: s3.refused["DELETE"] + s3.refused["HEAD"] >= 20)  # more than the store's client tries
    s3.failing = 0.0
    thread.join(PATIENCE_S)
    assert claims(s3) == []


def test_a_store_that_tells_no_times_has_one_run_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "WAIT_S", 0.0)
    fs, root = pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem("memory"))), "/claims/out"
    with run_lock(fs, root):
        first = claim_of(root)
        assert isinstance(first, ClaimHolder) and listing(fs, f"{root}/_segments")[0].mtime is None
        with pytest.raises(ConfigError, match="another run is writing"), run_lock(fs, root):
            pass
        content = json.loads(fs.open_input_file(first.path).read())
        claim.put(fs, first.path, json.dumps({**content, "at": content["at"] - 61}).encode())
        with run_lock(fs, root), pytest.raises(Stopped):
            first.check()


# -- disks and network file systems -----------------------------------------------------------------------------------

MOUNTS = r"""
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 0:31 / /home rw,relatime shared:2 - nfs4 server:/home rw
41 22 0:32 / /mnt/a\040b rw - fuse.gcsfuse bucket rw
42 40 0:33 / /home/scratch rw - tmpfs tmpfs rw
43 22 0:34 / /mnt/usb rw - fuseblk /dev/sdb1 rw
"""


@pytest.mark.parametrize(
    ("path", "shared"),
    [("/var/out", False), ("/home/me/out", True), ("/mnt/a b/out", True), ("/home/scratch/x", False), ("/mnt/usb", False)],
)
def test_a_network_file_system_is_recognised(tmp_path: Path, path: str, shared: bool) -> None:
    (tmp_path / "mounts").write_text(MOUNTS.lstrip())
    assert is_shared(path, str(tmp_path / "mounts")) is shared
    assert is_shared(path, str(tmp_path / "none")) is False


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose file system counts as one of the network."""
    kinds = {line.split(" - ")[1].split()[0] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    monkeypatch.setattr(lock, "_SHARED", frozenset(kinds))
    return tmp_path / "out"


def test_a_run_on_a_network_file_system_has_a_lock_and_a_claim(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "WAIT_S", 0.0)
    fs, root = resolve(str(shared))
    with run_lock(fs, root):
        assert held(fs, root) and [path for path in shared.rglob("*") if is_claim(path.name)]
        with pytest.raises(ConfigError, match="another run is writing"), run_lock(fs, root):
            pass
        # Another machine, which does not see the lock of this one.
        other = ClaimHolder(fs, root, "")
        with pytest.raises(BlockingIOError):
            other.acquire()
        mine = claim_of(root)
        assert mine is not None
        os.utime(mine.path, (0, 0))
        other.acquire()
        with pytest.raises(Stopped):
            write_atomic(fs, f"{root}/manifest.json", b"x")
    assert [path.name for path in shared.rglob("*") if is_claim(path.name)] == [other.name]


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.storage import lock
from pipeline.storage.filesystem import resolve
lock._SHARED = frozenset(line.split(" - ")[1].split()[0] for line in Path("/proc/self/mountinfo").read_text().splitlines())
with lock.run_lock(*resolve(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_claim_of_a_process_of_this_machine_that_was_killed_is_replaced_at_once(shared: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(shared)], check=False)
    left = [path.name for path in shared.rglob("*") if is_claim(path.name)]
    assert len(left) == 1
    fs, root = resolve(str(shared))
    with run_lock(fs, root):
        now = [path.name for path in shared.rglob("*") if is_claim(path.name)]
        assert len(now) == 1 and now != left


def test_a_run_on_a_disk_of_this_machine_has_no_claim(tmp_path: Path) -> None:
    fs, root = resolve(str(tmp_path / "out"))
    with run_lock(fs, root):
        assert claim_of(root) is None
        assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == [".lock"]


def test_other_processes_of_a_run_check_its_claim(tmp_path: Path) -> None:
    fs, root = resolve(str(tmp_path))
    (tmp_path / "claim").write_text("{}")
    join_claim(fs, root, str(tmp_path / "claim"))
    try:
        write_atomic(fs, f"{root}/a/b", b"1")
        (tmp_path / "claim").unlink()
        with pytest.raises(Stopped, match="another run has taken over"):
            write_atomic(fs, f"{root}/a/b", b"2")
        assert (tmp_path / "a" / "b").read_bytes() == b"1"
    finally:
        join_claim(fs, root, None)
