"""The journal of the rows inside an engine is read after its worker's process was killed, and nothing is left behind."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.config import EngineConfig
from engines.params import GenerationParams
from pipeline.executors.live.dispatcher import Dispatcher
from pipeline.executors.live.engine_journal import (
    EngineJournal,
    JournalPlace,
    JournalReading,
    journal_place,
    remove_journals,
    remove_orphans,
    take_journal,
)
from pipeline.executors.live.replicas import ReplicaActor, ReplicaPool
from pipeline.executors.live.scratch import Scratch, remove_leftovers
from pipeline.executors.live.worker import WorkerConfig
from tests.support.infer import Infer, ask
from tests.support.processes import until

Write = Callable[..., Path]


def killed() -> tuple[object, object, str]:
    """A killed worker, the reference to the place of its journal, and the journal's path."""
    import ray
    from ray.exceptions import RayActorError

    class Victim:  # inside the function: Ray sends it by value
        async def place(self) -> JournalPlace:
            return journal_place()

        async def work(self) -> None:
            journal = EngineJournal(journal_place().path, 4)
            for slot in range(4):
                journal.enter(slot, 2**39 + slot, 1000 + slot)
            journal.clear(1)
            os.kill(os.getpid(), signal.SIGKILL)

    actor = ray.remote(Victim).options(num_cpus=0, max_restarts=0).remote()
    place = actor.place.remote()
    path = ray.get(place).path
    with pytest.raises(RayActorError):
        ray.get(actor.work.remote())
    assert Path(path).exists()
    return actor, place, path


def test_the_rows_inside_a_killed_worker_are_read_on_its_node(local_ray: None) -> None:
    import ray

    _, place, path = killed()
    reading = JournalReading(place)
    ray.wait([reading.task])
    assert reading.ended and not reading.node_is_gone()
    assert reading.inside() == [(2**39, 1000), (2**39 + 2, 1002), (2**39 + 3, 1003)]
    assert not Path(path).exists()


def test_a_journal_of_a_worker_that_was_ended_is_removed(local_ray: None) -> None:
    import ray

    _, place, path = killed()
    ray.get(ray.remote(num_cpus=0)(take_journal).remote("none"))  # a process is ready for the task
    remove_journals([place])
    until(lambda: not Path(path).exists())  # on a busy machine the task ends later than the call


@pytest.mark.parametrize("dispatcher_lives", [True, False])
def test_no_journal_is_looked_for_of_a_worker_that_has_left(
    local_ray: None, tmp_path: Path, dispatcher_lives: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.exceptions import RayActorError

    monkeypatch.setattr("pipeline.executors.live.replicas.LEFT_S", 60.0)

    dispatcher = ray.remote(Dispatcher).options(num_cpus=0).remote([], None, [None], False)
    worker = WorkerConfig(EngineConfig(kind="echo"), GenerationParams(), str(tmp_path), 1.0, 1.0, 1.0, 0)
    pool = ReplicaPool(None, worker, [], dispatcher, 1)  # it starts no replica
    paths = []
    for name in ("w1", "w2"):
        actor, place, path = killed()
        paths.append(Path(path))
        pool.replicas.append(ReplicaActor(name, actor, None, None, None, journal=place))  # type: ignore[arg-type]
        ray.get(dispatcher.join.remote(name))
    ray.get(dispatcher.leave.remote("w1"))
    if not dispatcher_lives:
        ray.kill(dispatcher)  # returns before the actor is dead
        with pytest.raises(RayActorError):
            while True:
                ray.get(dispatcher.workers_gone.remote())
    pool.stop_all()
    deadline = time.monotonic() + 60  # on a busy machine the tasks end later than `stop_all`
    while (paths[1].exists() or paths[0].exists() != dispatcher_lives) and time.monotonic() < deadline:
        time.sleep(0.05)
    # The file of the first is no longer looked for: that worker said that it has removed it.
    assert [path.exists() for path in paths] == [dispatcher_lives, False]
    paths[0].unlink(missing_ok=True)


@pytest.mark.slow
def test_a_worker_without_rows_has_no_journal(infer: Infer, write_jsonl: Write) -> None:
    import ray

    session = Path(ray.get_runtime_context().get_temp_dir()) / ray.get_runtime_context().get_session_name()
    seen: set[Path] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            seen.update(session.glob("*.journal"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    infer(write_jsonl([ask("only")]), "engine.kwargs.latency_s=5", "hardware.replicas=2", "hardware.cpus=0.1")
    ended.set()
    watcher.join()
    assert len(seen) == 1  # two replicas, one row


def test_a_worker_on_a_node_that_is_gone_is_known_to_be_there(local_ray: None, tmp_path: Path) -> None:
    import ray

    reading = JournalReading(ray.put(JournalPlace("ab" * 28, str(tmp_path / "none"))))
    ray.wait([reading.task], timeout=60)
    assert reading.ended and reading.inside() is None and reading.node_is_gone()


def test_a_journal_holds_what_is_inside_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "w.journal"
    journal = EngineJournal(str(path), 3)
    journal.enter(2, 7, 9)
    journal.enter(0, 1, 0)
    journal.clear(2)
    assert path.stat().st_size == 24
    assert take_journal(str(path)) == [(1, 0)] and not path.exists()
    journal.close()
    assert take_journal(str(path)) is None


# A driver on a cluster that stands. It makes a journal in a worker, and is killed.
DRIVER = """
import os, signal, ray
from pipeline.executors.live.engine_journal import EngineJournal, journal_place
ray.init(log_to_driver=False, logging_level="ERROR")
class Worker:
    def begin(self):
        self.journal = EngineJournal(journal_place().path, 4)
        return self.journal.path
worker = ray.remote(Worker).options(num_cpus=0).remote()
print(ray.get(worker.begin.remote()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_journals_that_a_killed_driver_left_are_removed_by_the_next_worker_and_no_others(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray._private.state import state

    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": address}
    printed = subprocess.run([sys.executable, "-c", DRIVER], env=environment, capture_output=True, text=True, check=False)
    left = Path(printed.stdout.strip())
    assert left.exists()
    job = left.name.removesuffix(".journal")[-8:]
    until(lambda: any(found["JobID"] == job and found["IsDead"] for found in state.job_table()))
    # A journal of a run that goes on, of a job that Ray does not know, and files of others.
    ours = ray.get_runtime_context().get_job_id()
    kept = [
        f"eagleray-{'a' * 24}{ours}.journal",
        f"eagleray-{'a' * 24}ffffffff.journal",
        f"eagleray-x{job}.journal",
        "notes",
    ]
    for name in kept:
        (left.parent / name).write_text("")
    try:
        remove_orphans(str(left.parent / kept[0]))
        assert not left.exists() and all((left.parent / name).exists() for name in kept)
    finally:
        for name in kept:
            (left.parent / name).unlink()


def test_the_files_of_ray_that_a_killed_driver_left_are_removed_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import os; from pipeline.executors.live.scratch import Scratch; Scratch(); os.kill(os.getpid(), 9)"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    (left,) = tmp_path.iterdir()
    (tmp_path / "eagleray-mine").mkdir()  # without the driver's file
    running, kept = Scratch(), Scratch()
    kept.keep()
    # Some process of that Ray still works.
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", str(left)])
    try:
        # `Popen` returns before the kernel shows the new command line.
        until(lambda: os.fsencode(left) in Path(f"/proc/{process.pid}/cmdline").read_bytes())
        remove_leftovers()
        assert left.exists()
    finally:
        process.kill()
        process.wait()
    remove_leftovers()
    assert not left.exists()
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {"eagleray-mine", Path(running.path).name, Path(kept.path).name}
    running.remove()
    assert not Path(running.path).exists()


def test_a_new_scratch_directory_is_locked_before_another_run_can_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lock = fcntl.flock

    def late(file: Any, how: int) -> None:
        if how == fcntl.LOCK_EX:  # at this moment another run starts
            remove_leftovers()
        lock(file, how)

    monkeypatch.setattr("pipeline.executors.live.scratch.fcntl.flock", late)
    scratch = Scratch()
    remove_leftovers()
    assert Path(scratch.path).is_dir()
    scratch.remove()
    assert not any(tmp_path.iterdir())
