"""The replicas of one run: placed, watched, replaced when they die.

A replica that cannot be loaded, and a hardware entry whose replicas die again and again, are given up. The run goes on with
the others, and ends if none is left.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from engines.errors import ConfigError, EaglerayError, EngineError, ErrorCode, Outage
from engines.registry import secret_variables
from engines.text import counted
from pipeline.errors import EnginesDied, Stopped
from pipeline.executors.live.engine_journal import JournalReading, remove_journals
from pipeline.executors.live.placement import ReplicaGroup, end, room, start
from pipeline.executors.live.protocol import Departure
from pipeline.executors.live.secrets import Secrets
from pipeline.executors.live.worker import WorkerConfig
from pipeline.monitor.status import ReplicaProblem, RunStatus
from pipeline.monitor.traces import variables

# The time Ray gets to report if an unreachable replica died with its node.
VERDICT_S = 90.0
# Seconds between two checks for nodes that are about to go. The notice of a spot instance comes at most two minutes before.
NOTICE_S = 2.0
# The time the dispatcher gets at the end to name the workers that have left.
LEFT_S = 1.0
# A replica whose memory is too small for the model is loaded this number of times: another process may free memory.
MEMORY_LOADS = 2


@dataclass(slots=True)
class GroupState:
    """The replicas of one hardware entry."""

    group: ReplicaGroup
    config: WorkerConfig
    has_loaded: bool = False  # one of its replicas
    failed_loads: int = 0  # in succession
    held_back: int = 0  # replicas that are started only if another one can be loaded
    is_lost: bool = False  # no replica is left


@dataclass(slots=True)
class ReplicaActor:
    name: str
    actor: Any
    group: Any  # its placement group; None if it is on one node
    run: Any  # the reference of its `run`, or of a call that checks if it lives
    state: GroupState
    loads: int = 1  # how often a replica was loaded in this place, without success
    lost_at: float | None = None  # since then it cannot be reached
    journal: Any = None  # a reference to the place of its journal
    leaving: frozenset[str] = frozenset()  # nodes that are about to go and were announced to it


@dataclass(slots=True)
class _Death:
    """A replica whose process died, while its journal is read."""

    replica: ReplicaActor
    reason: str
    reading: JournalReading


def says_node_died(text: str) -> bool:
    """True if Ray's message says that an actor's node was lost. Ray has no error class or field for it."""
    return "node has died" in text or "node was terminated" in text


def _died_in_a_row(times: int, reason: str, code: str | None = None) -> EnginesDied:
    return EnginesDied(f"engines died {counted(times, 'time')} in a row without finishing a row: {reason}", code=code)


class ReplicaPool:
    """All replicas. The caller calls `maintain` a few times a second."""

    def __init__(
        self,
        worker: Any,
        config: WorkerConfig,
        groups: Sequence[ReplicaGroup],
        dispatcher: Any,
        deaths: int,
        own: bool = False,
    ) -> None:
        """`own`: the run has its own Ray, which no node joins."""
        self.worker, self.own = worker, own
        self.groups = [
            GroupState(group, replace(config, engine=group.engine, cpus=group.cpus, group=group.name)) for group in groups
        ]
        self.dispatcher, self.allowed_deaths = dispatcher, deaths
        names = secret_variables(config.engine) | (variables() if config.trace else set())
        self.secrets = Secrets({name: os.environ[name] for name in names if name in os.environ})
        self.replicas: list[ReplicaActor] = []
        self.started = 0
        self.deaths: list[_Death] = []
        self.drain_checked_at = 0.0

    def start(self) -> None:
        """Starts all replicas. Those without room wait for it while the others work, unless they could wait for ever."""
        import ray

        nodes = ray.nodes() if self.own else []
        for state in self.groups:
            if self.own and not room(state.group.placement, nodes):
                state.is_lost = True
                continue
            for _ in range(state.group.placement.high):
                self._add(state)

    def _add(self, state: GroupState, loads: int = 1, at_once: int | None = None) -> None:
        """Starts a replica, which has at most `at_once` requests in its engine, for lack of memory."""
        self.started += 1
        name, config = f"w{self.started}", state.config
        if at_once is not None:
            config = replace(config, engine=replace(config.engine, max_concurrency=at_once))
        actor, group = start(self.worker, state.group.placement, config, name, self.dispatcher)
        run = actor.run.remote(self.secrets)
        self.replicas.append(ReplicaActor(name, actor, group, run, state, loads, journal=actor.place.remote()))

    def maintain(self, status: RunStatus) -> None:
        """Replaces the replicas that ended too early. Raises `Stopped` or `ConfigError` if all are lost."""
        import ray
        from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

        self._announce_draining()
        self._note_loaded(status)
        self._conclude(status)
        ended, _ = ray.wait([r.run for r in self.replicas], num_returns=len(self.replicas), timeout=0) \
            if self.replicas else ([], [])  # fmt: skip
        for replica in [r for r in self.replicas if r.run in ended]:
            if replica not in self.replicas:  # its group is given up
                continue
            self.replicas.remove(replica)
            try:
                departure: Departure = ray.get(replica.run)
                if replica.lost_at is not None:  # it lives, but its call of `run` is lost
                    self._lost(replica, status)
                    continue
                end(replica.actor, replica.group)
                if departure.replaced and not status.finished:
                    self._add(replica.state, at_once=departure.at_once)
                elif departure.too_small:
                    problem = ReplicaProblem(replica.state.group.name, "too_small", departure.too_small)
                    died = EnginesDied(problem.sentence(), code=ErrorCode.OUT_OF_MEMORY)
                    self._give_up_place(replica.state, problem, died, status)
            except ActorUnavailableError:
                # The connection broke: its process died, perhaps because of a row, or its node. Ray knows soon.
                replica.lost_at = replica.lost_at or time.monotonic()
                if time.monotonic() > replica.lost_at + VERDICT_S:
                    self._lost(replica, status)
                else:
                    replica.run = replica.actor.__ray_ready__.remote()
                    self.replicas.append(replica)
            except RayActorError as error:
                self._died(replica, str(error), status)
            except RayTaskError as error:
                end(replica.actor, replica.group)
                ray.get(self.dispatcher.leave.remote(replica.name))
                if isinstance(error.cause, (ConfigError, EngineError)):  # raised while loading
                    self._not_loaded(replica, error.cause, status)
                    continue
                if isinstance(error.cause, (Outage, Stopped)):
                    raise Stopped(str(error.cause), code=error.cause.code) from None
                if isinstance(error.cause, OSError):
                    text = f"a worker could not read or write: {error.cause}"
                    raise Stopped(text, code=ErrorCode.STORE_FAILED) from None
                raise
            except RayError as error:  # for example, it can no longer be placed
                self._died(replica, str(error), status)

    def wait(self, seconds: float) -> None:
        """Waits for this time, or until all replicas have ended."""
        import ray

        if runs := [replica.run for replica in self.replicas]:
            ray.wait(runs, num_returns=len(runs), timeout=seconds)
        else:
            time.sleep(seconds)

    def _announce_draining(self) -> None:
        """Tells the replicas which nodes are about to go. Replicas there finish what is in flight."""
        from ray._private.state import state

        if time.monotonic() < self.drain_checked_at + NOTICE_S:
            return
        self.drain_checked_at = time.monotonic()
        nodes = frozenset(state.get_draining_nodes())
        for replica in self.replicas:
            if nodes - replica.leaving:
                replica.leaving |= nodes
                replica.actor.leave_nodes.remote(nodes)

    def _lost(self, replica: ReplicaActor, status: RunStatus) -> None:
        self._died(replica, "", status, node_lost=True)

    def _died(self, replica: ReplicaActor, reason: str, status: RunStatus, *, node_lost: bool = False) -> None:
        end(replica.actor, replica.group)
        if node_lost or says_node_died(reason):  # its rows are not the cause
            self._leave(replica, None, None, status)
        else:
            self.deaths.append(_Death(replica, " ".join(reason.split())[:300], JournalReading(replica.journal)))
            self._conclude(status)

    def _conclude(self, status: RunStatus) -> None:
        """Reports deaths to the dispatcher once their journals are read, and replaces the replicas."""
        for death in [death for death in self.deaths if death.reading.ended]:
            self.deaths.remove(death)
            inside = death.reading.inside()
            if inside is None and death.reading.node_is_gone():
                self._leave(death.replica, None, None, status)
            else:
                self._leave(death.replica, death.reason, inside, status)

    def _leave(
        self, replica: ReplicaActor, crash: str | None, inside: list[tuple[int, int]] | None, status: RunStatus
    ) -> None:
        import ray

        deaths: int | None = ray.get(self.dispatcher.leave.remote(replica.name, crash, inside))
        if crash is not None and deaths is None:
            self._not_loaded(replica, EngineError("engine_crash", crash), status)
        elif crash is not None and (deaths or 0) > self.allowed_deaths:
            for other in [other for other in self.replicas if other.state is replica.state]:
                self._end(other)
            problem = ReplicaProblem(replica.state.group.name, "died", crash)
            self._give_up_place(replica.state, problem, _died_in_a_row(deaths or 0, crash), status)
        elif not status.finished:
            self._add(replica.state)

    # -- replicas that are given up ------------------------------------------------------------------------------------

    def _note_loaded(self, status: RunStatus) -> None:
        """Notes which groups have loaded a replica."""
        for replica in [*self.replicas]:
            heartbeat, state = status.replicas.get(replica.name), replica.state
            if heartbeat is not None and heartbeat.state != "loading":
                state.has_loaded, state.failed_loads, replica.loads = True, 0, 1
                held_back, state.held_back = state.held_back, 0
                for _ in range(held_back):
                    self._add(state)

    def _not_loaded(self, replica: ReplicaActor, error: EaglerayError, status: RunStatus) -> None:
        """A replica could not be loaded. Another try may succeed, unless the configuration is wrong."""
        import ray

        state, problem = replica.state, ReplicaProblem(replica.state.group.name, "load", str(error))
        state.failed_loads += 1
        loads = MEMORY_LOADS if error.code == ErrorCode.OUT_OF_MEMORY else self.allowed_deaths + 1
        again = not isinstance(error, ConfigError) and replica.loads < loads and state.failed_loads <= self.allowed_deaths
        if again and not status.finished:
            ray.get(self.dispatcher.report_problem.remote(problem))
            self._add(state, replica.loads + 1)
            return
        if not state.has_loaded:  # replicas that wait for room would fail in the same way, one after the other
            for other in [*self.replicas]:
                if other.state is state and other.name not in status.replicas:
                    self._end(other)
                    state.held_back += 1
        if isinstance(error, ConfigError):
            final: EaglerayError = ConfigError(str(error), code=error.code, key=error.key)
        else:
            code = error.code if error.code == ErrorCode.OUT_OF_MEMORY else None
            final = _died_in_a_row(state.failed_loads, str(error), code)
        self._give_up_place(state, problem, final, status)

    def _give_up_place(self, state: GroupState, problem: ReplicaProblem, final: EaglerayError, status: RunStatus) -> None:
        """No replica takes the place of one that is lost. Raises `final` if no replica of any group is left."""
        import ray

        dying = [death.replica for death in self.deaths]
        state.is_lost = not any(replica.state is state for replica in (*self.replicas, *dying))
        if all(each.is_lost for each in self.groups) and not status.finished:
            raise final
        ray.get(self.dispatcher.report_problem.remote(problem))

    def _end(self, replica: ReplicaActor) -> None:
        """Ends a replica. Others get its rows."""
        import ray

        self.replicas.remove(replica)
        end(replica.actor, replica.group)
        ray.get(self.dispatcher.leave.remote(replica.name))

    def drain(self) -> None:
        """Lets all replicas finish the requests in flight, and starts no more."""
        for replica in self.replicas:
            replica.actor.drain.remote()

    def stop_all(self) -> None:
        """Ends all replicas, frees their places, and removes their journals."""
        import ray
        from ray.exceptions import RayError

        try:
            left: set[str] = ray.get(self.dispatcher.workers_gone.remote(), timeout=LEFT_S)
        except RayError:  # the dispatcher died
            left = set()
        # A worker that has left has no journal, nor has one without rows, such as one whose place is not known yet.
        places = [replica.journal for replica in self.replicas if replica.name not in left]
        known = ray.wait(places, num_returns=len(places), timeout=0)[0] if places else []
        for replica in self.replicas:
            end(replica.actor, replica.group)
        remove_journals(known)
