"""The journal of the rows inside an engine is read after its worker's process was killed, and nothing is left behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pipeline.executors.live.engine_journal import (
    EngineJournal,
    JournalPlace,
    JournalReading,
    journal_place,
    remove_journals,
    take_journal,
)


def killed() -> tuple[object, str]:
    """The reference to the place of a killed worker's journal, and its path."""
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
    return place, path


def test_the_rows_inside_a_killed_worker_are_read_on_its_node(local_ray: None) -> None:
    import ray

    place, path = killed()
    reading = JournalReading(place)
    ray.wait([reading.task])
    assert reading.ended and not reading.node_is_gone()
    assert reading.inside() == [(2**39, 1000), (2**39 + 2, 1002), (2**39 + 3, 1003)]
    assert not Path(path).exists()


def test_a_journal_of_a_worker_that_was_ended_is_removed(local_ray: None) -> None:
    import ray

    place, path = killed()
    ray.get(ray.remote(num_cpus=0)(take_journal).remote("none"))  # a process is ready for the task
    remove_journals([place])
    assert not Path(path).exists()


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
