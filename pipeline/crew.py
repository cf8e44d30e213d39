"""The replicas of one run: placed, watched, replaced when they die."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engines.base import secret_variables
from engines.types import ConfigError, EaglerayError, EngineError, Outage
from pipeline.feed import Status
from pipeline.placement import Placement, end, start
from pipeline.traces import variables
from pipeline.worker import Secrets, WorkerConfig

# How long Ray may take to tell whether a replica that cannot be reached died with its node.
VERDICT_S = 90.0
# How often Ray is asked which nodes are about to go (a spot notice comes two minutes before, at most).
NOTICE_S = 2.0


class Stopped(EaglerayError):
    """The run stopped early; all that is done is committed. The same command, with `changes`, resumes (exit status 4)."""

    def __init__(self, message: str, changes: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.changes = dict(changes or {})


class EnginesDied(Stopped):
    """All that engines do is die; their last words are in Ray's logs."""


class Interrupted(EaglerayError):
    """Ctrl-C or SIGTERM (exit status 130); the same command resumes."""


@dataclass(slots=True)
class Replica:
    name: str
    actor: Any
    group: Any  # its placement group; None where it has but one node
    run: Any  # the reference of its `run`, or of a question whether it lives
    lost_at: float | None = None  # since when it cannot be reached
    leaving: frozenset[str] = frozenset()  # the nodes it was told are about to go


class Crew:
    """All replicas; `tend` is called every so often and does the rest."""

    def __init__(self, worker: Any, config: WorkerConfig, placed: Placement, dispatcher: Any, deaths: int) -> None:
        self.worker, self.config, self.placed = worker, config, placed
        self.dispatcher, self.allowed_deaths = dispatcher, deaths
        names = secret_variables(config.engine) | (variables() if config.trace else set())
        self.secrets = Secrets({name: os.environ[name] for name in names if name in os.environ})
        self.replicas: list[Replica] = []
        self.started = 0
        self.deaths = 0  # in a row, with no row finished between
        self.finished_at_death = 0
        self.looked = 0.0

    def start(self) -> None:
        """Asks for all replicas. Those that find no room yet wait for it, while the others work."""
        for _ in range(self.placed.high):
            self._add()

    def _add(self) -> None:
        self.started += 1
        name = f"w{self.started}"
        actor, group = start(self.worker, self.placed, self.config, name, self.dispatcher)
        self.replicas.append(Replica(name, actor, group, actor.run.remote(self.secrets)))

    def tend(self, status: Status) -> None:
        """Looks for replicas that ended. One that died is replaced; raises `Stopped` where all they do is die."""
        import ray
        from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

        self._clear_out()
        ended, _ = ray.wait([r.run for r in self.replicas], num_returns=len(self.replicas), timeout=0) \
            if self.replicas else ([], [])  # fmt: skip
        for replica in [r for r in self.replicas if r.run in ended]:
            self.replicas.remove(replica)
            try:
                moved = ray.get(replica.run)
                if replica.lost_at is not None:  # it lives, but the call that was its work is gone
                    self._lost(replica, status)
                    continue
                end(replica.actor, replica.group)
                if moved and not status.finished:
                    self._add()
            except ActorUnavailableError:
                # The connection broke. Its process died, which may be a row's fault, or its node; Ray knows which soon.
                replica.lost_at = replica.lost_at or time.monotonic()
                if time.monotonic() > replica.lost_at + VERDICT_S:
                    self._lost(replica, status)
                else:
                    replica.run = replica.actor.__ray_ready__.remote()
                    self.replicas.append(replica)
            except RayActorError as error:
                self._died(replica, str(error), status)
            except RayTaskError as error:
                if isinstance(error.cause, EngineError):  # raised while loading: another try may have more luck
                    self._died(replica, str(error.cause), status)
                    continue
                end(replica.actor, replica.group)
                ray.get(self.dispatcher.leave.remote(replica.name))
                if isinstance(error.cause, ConfigError):
                    raise ConfigError(str(error.cause)) from None
                if isinstance(error.cause, Outage):
                    raise Stopped(str(error.cause)) from None
                if isinstance(error.cause, OSError):
                    raise Stopped(f"a worker could not read or write: {error.cause}") from None
                raise
            except RayError as error:  # it can no longer be placed, say
                self._died(replica, str(error), status)

    def _clear_out(self) -> None:
        """Tells the replicas which nodes are about to go; those there finish what is in flight, and others take over."""
        from ray._private.state import state

        if time.monotonic() < self.looked + NOTICE_S:
            return
        self.looked = time.monotonic()
        nodes = frozenset(state.get_draining_nodes())
        for replica in self.replicas:
            if nodes - replica.leaving:
                replica.leaving |= nodes
                replica.actor.clear_out.remote(nodes)

    def _lost(self, replica: Replica, status: Status) -> None:
        self._died(replica, "node has died", status)

    def _died(self, replica: Replica, reason: str, status: Status) -> None:
        import ray

        end(replica.actor, replica.group)
        # Ray says no more structured word than this sentence about a lost node, which is not its rows' fault.
        node_lost = "node has died" in reason or "node was terminated" in reason
        reason = "its node was lost" if node_lost else " ".join(reason.split())[:300]
        ray.get(self.dispatcher.leave.remote(replica.name, None if node_lost else reason))
        finished = status.done + status.failed - status.errors["engine_crash"]
        if finished > self.finished_at_death:
            self.deaths = 0
        self.finished_at_death = finished
        self.deaths += not node_lost
        if self.deaths > self.allowed_deaths:
            raise EnginesDied(f"engines died {self.deaths} times in a row without finishing a row: {reason}")
        if not status.finished:
            self._add()

    def drain(self) -> None:
        """Lets all replicas finish what is in flight, and no more."""
        for replica in self.replicas:
            replica.actor.drain.remote()

    def dismiss(self) -> None:
        """Ends all replicas and gives their places back."""
        for replica in self.replicas:
            end(replica.actor, replica.group)
