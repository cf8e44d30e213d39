"""`RayCluster`: starts Ray when a run first needs it (`ray_session.py`), reads large ledgers, runs tasks on all nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console

from engines.config import EngineConfig
from engines.text import one_line
from pipeline.errors import Interrupted, Stopped
from pipeline.executors.live.background_start import BackgroundStart
from pipeline.executors.live.placement import ReplicaGroup
from pipeline.executors.live.ray_session import here, look_for_room, running_ray, starts_here
from pipeline.executors.live.remote_index import IndexActor, RemoteIndex, reference_to
from pipeline.garbage import collect_rarely
from pipeline.output.cost import old_costs
from pipeline.signals import Interrupts, note_signals
from pipeline.storage.claim import claim_of, join_claim
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger_index import Index, KeyLookup, read_index
from pipeline.storage.ledger_snapshot import LedgerSnapshot

# If the cluster has several nodes, an index of more requests than this stays on the driver's node, in an actor.
REMOTE_INDEX_ROWS = 100_000
# An index of at most this many requests (about 40 bytes each) is sent to the dispatcher as it is.
SMALL_INDEX_ROWS = 1_000

Item = TypeVar("Item")
Result = TypeVar("Result")


class RayCluster:
    """A `TaskRunner` (see pipeline/tasks.py), and the place of a large ledger's index."""

    def __init__(self, output_path: str, engine: EngineConfig, stack: contextlib.ExitStack, interrupts: Interrupts) -> None:
        self.output_path, self.engine = output_path, engine
        self.stack, self.interrupts = stack, interrupts
        self.starting: BackgroundStart | None = None
        self.started = False
        self.own = False  # Ray was started by this run, on this machine

    def begin(self) -> None:
        """Begins to start Ray in the background, if this run starts its own. `start` waits for it."""
        if starts_here():
            self.starting = BackgroundStart(running_ray)
            self.stack.callback(self.starting.give_up)

    def start(self) -> None:
        """Joins or starts Ray, until the end of the run. Later calls do nothing."""
        if not self.started:
            self.own = self.stack.enter_context(self.starting or running_ray())
            self.stack.enter_context(note_signals(self.interrupts))  # after Ray, which sets handlers of its own
            self.started = True

    def check_room(self, groups: Sequence[ReplicaGroup], console: Console) -> None:
        """Warns if replicas have no room. Raises `ConfigError` if none has room and no node can join."""
        self.start()
        look_for_room(groups, self.own, console)

    def read_ledger(self, failed_count_as_answered: bool) -> tuple[Index, Any]:
        """Reads the ledger in a task on the driver's node. The arrays of the index lie in shared memory, so that the
        driver stays small. Also returns the reference of the index."""
        import ray

        self.start()
        read = ray.remote(num_cpus=0, max_retries=3, scheduling_strategy=here())(_read_ledger)
        reference = read.remote(self.output_path, failed_count_as_answered, self.engine)
        return ray.get(reference), reference

    def share(self, snapshot: LedgerSnapshot) -> Any:
        """A reference to the index or, if it is large and there are several nodes, to a lookup service. If the index is
        small, the index itself: if Ray's store ends, Ray ends the processes whose objects were in it."""
        import ray

        self.start()
        index, reference = snapshot.index, snapshot.reference
        if isinstance(reference, _Shared):
            return reference.lookup
        if reference is None:
            reference = index if len(index) <= SMALL_INDEX_ROWS else ray.put(index)
        lookup = reference
        if len(index) > REMOTE_INDEX_ROWS and len(ray.nodes()) > 1:
            actor = ray.remote(IndexActor).options(num_cpus=0, scheduling_strategy=here())
            # In a list, so that the actor gets the reference and not the index.
            lookup = ray.put(RemoteIndex(actor.remote([reference]), index.paths, index.row_bytes, index.old_until_ms))
        snapshot.reference = _Shared(reference, lookup)
        return lookup

    def map(
        self, work: Callable[[Item, KeyLookup], Result], items: Sequence[Item], snapshot: LedgerSnapshot
    ) -> Iterator[Result]:
        """As `TaskRunner.map`, in tasks on all nodes. Raises `Interrupted` after Ctrl-C or SIGTERM."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        lookup = reference_to(self.share(snapshot))
        shared = ray.put(work)
        # "SPREAD": by default, Ray fills half of a node before it takes the next one, so a few nodes would do all the work.
        options = {"num_cpus": 1, "max_retries": 3, "retry_exceptions": [OSError], "scheduling_strategy": "SPREAD"}
        run = ray.remote(**options)(_run_task)
        claim = claim_of(resolve(self.output_path)[1])
        output = (self.output_path, claim.path if claim else None)
        waiting = [run.remote(shared, item, lookup, *output) for item in items]
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0.5)
            if self.interrupts:
                raise Interrupted("interrupted while writing the output; the same command writes it again")
            try:
                results: list[Result] = ray.get(done)
            except RayTaskError as error:
                if isinstance(error.cause, OSError):
                    raise OSError(one_line(error.cause)) from None
                if isinstance(error.cause, Stopped):
                    raise Stopped(str(error.cause), code=error.cause.code) from None
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


def _run_task(
    work: Callable[[Item, KeyLookup], Result], item: Item, lookup: KeyLookup, output_path: str, claim: str | None
) -> Result:
    collect_rarely()
    if claim is not None:
        join_claim(*resolve(output_path), claim)
    return work(item, lookup)
