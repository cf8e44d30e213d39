"""Ray for one run: started when something first needs it. Reads large ledgers and runs tasks on all nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console

from engines.config import EngineConfig
from engines.text import one_line
from pipeline.errors import Interrupted
from pipeline.executors.live.placement import Placement
from pipeline.executors.live.ray_session import here, look_for_room, running_ray
from pipeline.executors.live.remote_index import IndexActor, RemoteIndex
from pipeline.output.cost import old_costs
from pipeline.signals import note_signals
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger_index import Index, KeyLookup, read_index
from pipeline.storage.ledger_snapshot import LedgerSnapshot

# With more nodes than one, an index of more requests than this stays on the driver's node, in an actor.
FAR_ROWS = 100_000

Item = TypeVar("Item")
Result = TypeVar("Result")


class RayCluster:
    """A `TaskRunner` (see pipeline/tasks.py), and the place of a large ledger's index."""

    def __init__(self, output_path: str, engine: EngineConfig, stack: contextlib.ExitStack, interrupts: list[int]) -> None:
        self.output_path, self.engine = output_path, engine
        self.stack, self.interrupts = stack, interrupts
        self.started = False
        self.own = False  # Ray was started by this run, on this machine

    def start(self) -> None:
        """Joins or starts Ray, until the end of the run. Later calls do nothing."""
        if not self.started:
            self.own = self.stack.enter_context(running_ray())
            self.stack.enter_context(note_signals(self.interrupts))  # after Ray, which sets handlers of its own
            self.started = True

    def check_room(self, placement: Placement, console: Console) -> None:
        """Warns if replicas have no room. Raises `ConfigError` if none has room and no node can join."""
        self.start()
        look_for_room(placement, self.own, console)

    def read_ledger(self, failed_count_as_answered: bool) -> tuple[Index, Any]:
        """Reads the ledger in a task on the driver's node. The arrays of the index lie in shared memory, so that the
        driver stays small. Also returns the reference of the index."""
        import ray

        self.start()
        read = ray.remote(num_cpus=0, max_retries=3, scheduling_strategy=here())(_read_ledger)
        reference = read.remote(self.output_path, failed_count_as_answered, self.engine)
        return ray.get(reference), reference

    def share(self, snapshot: LedgerSnapshot) -> Any:
        """A reference to the index or, if it is large and there are several nodes, to a lookup service."""
        import ray

        self.start()
        index, reference = snapshot.index, snapshot.reference
        if isinstance(reference, _Shared):
            return reference.lookup
        if reference is None:
            reference = ray.put(index)
        lookup = reference
        if len(index) > FAR_ROWS and len(ray.nodes()) > 1:
            actor = ray.remote(IndexActor).options(num_cpus=0, scheduling_strategy=here())
            # In a list, so that the actor gets the reference itself.
            lookup = ray.put(RemoteIndex(actor.remote([reference]), index.paths))
        snapshot.reference = _Shared(reference, lookup)
        return lookup

    def map(
        self, work: Callable[[Item, KeyLookup], Result], items: Sequence[Item], snapshot: LedgerSnapshot
    ) -> Iterator[Result]:
        """As `TaskRunner.map`, in tasks on all nodes. Raises `Interrupted` after Ctrl-C or SIGTERM."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        lookup = self.share(snapshot)
        shared = ray.put(work)
        run = ray.remote(num_cpus=1, max_retries=3, retry_exceptions=[OSError])(_run_task)
        waiting = [run.remote(shared, item, lookup) for item in items]
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0.5)
            if self.interrupts:
                raise Interrupted("interrupted while putting the output together; the same command does it again")
            try:
                results: list[Result] = ray.get(done)
            except RayTaskError as error:
                if isinstance(error.cause, OSError):
                    raise OSError(one_line(error.cause)) from None
                raise
            except RayError as error:  # Ray ended a process, for example because memory ran out
                raise OSError(one_line(error)) from None
            yield from results


class _Shared:
    """The references that keep a shared index alive."""

    def __init__(self, index: Any, lookup: Any) -> None:
        self.index, self.lookup = index, lookup


def _read_ledger(path: str, failed_count_as_answered: bool, engine: EngineConfig) -> Index:
    return read_index(*resolve(path), old_costs(engine)).only(failed_count_as_answered=failed_count_as_answered)


def _run_task(work: Callable[[Item, KeyLookup], Result], item: Item, lookup: KeyLookup) -> Result:
    return work(item, lookup)
