"""The rows that are inside a worker's engine, in a file that outlives the worker's process.

The file has 8 bytes for each slot of the engine and is mapped into memory (shared), so a slot costs one store and no
system call, and the kernel keeps what was stored when the process is killed. It lies in Ray's session directory of the
worker's node. A worker removes its file when it ends. The reader removes the file of a killed worker.
"""

from __future__ import annotations

import mmap
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A slot holds lease << OFFSET_BITS | offset. Leases count from 1, so 0 is an empty slot.
OFFSET_BITS = 24
OFFSET_MASK = (1 << OFFSET_BITS) - 1
_NAME = re.compile(r"eagleray-[0-9a-f]{32}\.journal")
# The maximum time of a read. Most of it is the start of a process.
READ_S = 15.0
# The maximum time for the removal of the files of ended workers.
REMOVE_S = 3.0


@dataclass(frozen=True, slots=True)
class JournalPlace:
    node: str  # Ray's id
    path: str


def journal_place() -> JournalPlace:
    """The place of this actor's journal."""
    import ray

    context = ray.get_runtime_context()
    folder = Path(context.get_temp_dir()) / context.get_session_name()
    return JournalPlace(context.get_node_id(), str(folder / f"eagleray-{context.get_actor_id()}.journal"))


def remove_orphans(own: str) -> None:
    """Removes the journals beside `own` that belong to runs that have ended: the driver of a killed run does not
    read them."""
    from ray._private.state import state

    others = [
        path for path in Path(own).parent.glob("eagleray-*.journal") if str(path) != own and _NAME.fullmatch(path.name)
    ]
    if not others:
        return
    ended = {job["JobID"] for job in state.job_table() if job["IsDead"]}
    for path in others:
        # The last 8 digits of an actor's id are its job's. Jobs of one Ray session have different ids.
        if path.name.removesuffix(".journal")[-8:] in ended:
            path.unlink(missing_ok=True)


class EngineJournal:
    """The writing side, in the worker."""

    def __init__(self, path: str, slots: int) -> None:
        self.path = path
        size = 8 * max(1, slots)
        with Path(path).open("w+b") as file:
            file.write(bytes(size))  # takes the disk space now: a store into a full disk would kill the process
            file.flush()
            self.map = mmap.mmap(file.fileno(), size)
        self.slots = memoryview(self.map).cast("Q")

    def enter(self, slot: int, lease: int, offset: int) -> None:
        self.slots[slot] = lease << OFFSET_BITS | offset

    def clear(self, slot: int) -> None:
        self.slots[slot] = 0

    def close(self) -> None:
        """Removes the file."""
        self.slots.release()
        self.map.close()
        Path(self.path).unlink(missing_ok=True)


def take_journal(path: str) -> list[tuple[int, int]] | None:
    """The (lease, offset) of the rows that were inside the engine; removes the file. None if there is no file."""
    try:
        data = Path(path).read_bytes()
    except OSError:
        return None
    Path(path).unlink(missing_ok=True)
    return [(value >> OFFSET_BITS, value & OFFSET_MASK) for value in memoryview(data).cast("Q") if value]


class JournalReading:
    """The reading side, in the driver: a task on the worker's node, which may be gone.

    `place` is a reference to the worker's `JournalPlace`.
    """

    def __init__(self, place: Any) -> None:
        import ray
        from ray.exceptions import RayError

        self.node: str | None = None
        self.task: Any = None
        self.until = time.monotonic() + READ_S
        try:
            found: JournalPlace = ray.get(place, timeout=1)
        except RayError:  # the worker died before it was ready: it had no row
            return
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.node = found.node
        there = NodeAffinitySchedulingStrategy(found.node, soft=False)
        read = ray.remote(num_cpus=0, max_retries=2, scheduling_strategy=there)(take_journal)
        self.task = read.remote(found.path)

    @property
    def ended(self) -> bool:
        import ray

        return self.task is None or time.monotonic() > self.until or bool(ray.wait([self.task], timeout=0)[0])

    def inside(self) -> list[tuple[int, int]] | None:
        """The rows that were inside the engine; None if they are not known."""
        import ray
        from ray.exceptions import RayError

        if self.task is None:
            return None
        try:
            found: list[tuple[int, int]] | None = ray.get(self.task, timeout=0)
            return found
        except RayError:
            return None

    def node_is_gone(self) -> bool:
        import ray

        return self.node is not None and not any(node["Alive"] and node["NodeID"] == self.node for node in ray.nodes())


def remove_journals(places: list[Any]) -> None:
    """Removes the files of workers that were ended. `places` are references to their `JournalPlace`."""
    import ray

    tasks = [reading.task for reading in map(JournalReading, places) if reading.task is not None]
    if tasks:
        ray.wait(tasks, num_returns=len(tasks), timeout=REMOVE_S)
