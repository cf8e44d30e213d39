"""The journal of the rows inside an engine is read after its worker's process was killed, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

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
    take_journal,
)
from pipeline.executors.live.replicas import ReplicaActor, ReplicaPool
from pipeline.executors.live.worker import WorkerConfig


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
    assert not Path(path).exists()


@pytest.mark.parametrize("dispatcher_lives", [True, False])
def test_no_journal_is_looked_for_of_a_worker_that_has_left(
    local_ray: None, tmp_path: Path, dispatcher_lives: bool
) -> None:
    import ray

    dispatcher = ray.remote(Dispatcher).options(num_cpus=0).remote([], None, [None], False)
    worker = WorkerConfig(EngineConfig(kind="echo"), GenerationParams(), str(tmp_path), 1.0, 1.0, 1.0, 0)
    pool = ReplicaPool(None, worker, None, dispatcher, 1)  # type: ignore[arg-type]  # it starts no replica
    paths = []
    for name in ("w1", "w2"):
        actor, place, path = killed()
        paths.append(Path(path))
        pool.replicas.append(ReplicaActor(name, actor, None, None, journal=place))
        ray.get(dispatcher.join.remote(name))
    ray.get(dispatcher.leave.remote("w1"))
    if not dispatcher_lives:
        ray.kill(dispatcher)
    pool.stop_all()
    deadline = time.monotonic() + 60  # on a busy machine the tasks end later than `stop_all`
    while (paths[1].exists() or paths[0].exists() != dispatcher_lives) and time.monotonic() < deadline:
        time.sleep(0.05)
    # The file of the first is no longer looked for: that worker said that it has removed it.
    assert [path.exists() for path in paths] == [dispatcher_lives, False]
    paths[0].unlink(missing_ok=True)


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
