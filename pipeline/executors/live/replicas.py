"""The replicas of one run: placed, watched, replaced when they die."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from engines.errors import ConfigError, EngineError, ErrorCode, Outage
from engines.registry import secret_variables
from pipeline.errors import EnginesDied, Stopped
from pipeline.executors.live.engine_journal import JournalReading, remove_journals
from pipeline.executors.live.placement import Placement, end, start
from pipeline.executors.live.secrets import Secrets
from pipeline.executors.live.worker import WorkerConfig
from pipeline.monitor.status import RunStatus
from pipeline.monitor.traces import variables

# The time Ray gets to report if an unreachable replica died with its node.
VERDICT_S = 90.0
# Seconds between two questions to Ray which nodes are about to go. A spot notice comes at most two minutes before.
NOTICE_S = 2.0
# The time the dispatcher gets at the end to say which workers have left.
LEFT_S = 1.0


@dataclass(slots=True)
class ReplicaActor:
    name: str
    actor: Any
    group: Any  # its placement group; None if it is on one node
    run: Any  # the reference of its `run`, or of a call that checks if it lives
    lost_at: float | None = None  # since then it cannot be reached
    journal: Any = None  # a reference to the place of its journal
    leaving: frozenset[str] = frozenset()  # nodes that it was told are about to go


@dataclass(slots=True)
class _Death:
    """A replica whose process died, while its journal is read."""

    replica: ReplicaActor
    reason: str
    reading: JournalReading


def says_node_died(text: str) -> bool:
    """True if Ray's message says that an actor's node was lost. Ray has no error class or field for it."""
    return "node has died" in text or "node was terminated" in text


class ReplicaPool:
    """All replicas. The caller calls `maintain` a few times a second."""

    def __init__(self, worker: Any, config: WorkerConfig, placed: Placement, dispatcher: Any, deaths: int) -> None:
        self.worker, self.config, self.placed = worker, config, placed
        self.dispatcher, self.allowed_deaths = dispatcher, deaths
        names = secret_variables(config.engine) | (variables() if config.trace else set())
        self.secrets = Secrets({name: os.environ[name] for name in names if name in os.environ})
        self.replicas: list[ReplicaActor] = []
        self.started = 0
        self.deaths: list[_Death] = []
        self.looked = 0.0

    def start(self) -> None:
        """Starts all replicas. Those without room wait for it while the others work."""
        for _ in range(self.placed.high):
            self._add()

    def _add(self) -> None:
        self.started += 1
        name = f"w{self.started}"
        actor, group = start(self.worker, self.placed, self.config, name, self.dispatcher)
        run = actor.run.remote(self.secrets)
        self.replicas.append(ReplicaActor(name, actor, group, run, journal=actor.place.remote()))

    def maintain(self, status: RunStatus) -> None:
        """Looks for replicas that ended, and replaces those that died. Raises `Stopped` if they die again and again."""
        import ray
        from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

        self._announce_draining()
        self._conclude(status)
        ended, _ = ray.wait([r.run for r in self.replicas], num_returns=len(self.replicas), timeout=0) \
            if self.replicas else ([], [])  # fmt: skip
        for replica in [r for r in self.replicas if r.run in ended]:
            self.replicas.remove(replica)
            try:
                moved = ray.get(replica.run)
                if replica.lost_at is not None:  # it lives, but its call of `run` is lost
                    self._lost(replica, status)
                    continue
                end(replica.actor, replica.group)
                if moved and not status.finished:
                    self._add()
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
                if isinstance(error.cause, EngineError):  # raised while loading: another try may succeed
                    self._died(replica, str(error.cause), status)
                    continue
                end(replica.actor, replica.group)
                ray.get(self.dispatcher.leave.remote(replica.name))
                if isinstance(error.cause, ConfigError):
                    raise ConfigError(str(error.cause), code=error.cause.code, key=error.cause.key) from None
                if isinstance(error.cause, Outage):
                    raise Stopped(str(error.cause), code=error.cause.code) from None
                if isinstance(error.cause, OSError):
                    text = f"a worker could not read or write: {error.cause}"
                    raise Stopped(text, code=ErrorCode.STORE_FAILED) from None
                raise
            except RayError as error:  # it can no longer be placed, say
                self._died(replica, str(error), status)

    def _announce_draining(self) -> None:
        """Tells the replicas which nodes are about to go. Replicas there finish what is in flight."""
        from ray._private.state import state

        if time.monotonic() < self.looked + NOTICE_S:
            return
        self.looked = time.monotonic()
        nodes = frozenset(state.get_draining_nodes())
        for replica in self.replicas:
            if nodes - replica.leaving:
                replica.leaving |= nodes
                replica.actor.leave_nodes.remote(nodes)

    def _lost(self, replica: ReplicaActor, status: RunStatus) -> None:
        self._died(replica, "", status, node_lost=True)

    def _died(self, replica: ReplicaActor, reason: str, status: RunStatus, *, node_lost: bool = False) -> None:
        end(replica.actor, replica.group)
        if node_lost or says_node_died(reason):  # which is not the fault of its rows
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

        deaths: int = ray.get(self.dispatcher.leave.remote(replica.name, crash, inside))
        if crash is not None and deaths > self.allowed_deaths:
            raise EnginesDied(f"engines died {deaths} times in a row without finishing a row: {crash}")
        if not status.finished:
            self._add()

    def drain(self) -> None:
        """Lets all replicas finish what is in flight, and no more."""
        for replica in self.replicas:
            replica.actor.drain.remote()

    def stop_all(self) -> None:
        """Ends all replicas, frees their places, and removes their journals."""
        import ray
        from ray.exceptions import RayError

        try:
            left: set[str] = ray.get(self.dispatcher.left.remote(), timeout=LEFT_S)
        except RayError:  # the dispatcher died
            left = set()
        # A worker that has left has no journal. A process whose place is not known yet has not come as far as its journal.
        places = [replica.journal for replica in self.replicas if replica.name not in left]
        known = ray.wait(places, num_returns=len(places), timeout=0)[0] if places else []
        for replica in self.replicas:
            end(replica.actor, replica.group)
        remove_journals(known)
