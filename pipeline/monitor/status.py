"""The figures of a run and of its replicas."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class UsageStats:
    """What answers told about estimates."""

    answers: int = 0
    tokens_a_byte: float = 0.0  # of a prompt, the most
    output: int = 0  # tokens, the most of a single answer

    def add(self, other: UsageStats) -> None:
        self.answers += other.answers
        self.tokens_a_byte = max(self.tokens_a_byte, other.tokens_a_byte)
        self.output = max(self.output, other.output)


@dataclass(slots=True)
class ReplicaHeartbeat:
    """How a replica fares, as it tells with the calls it makes anyway."""

    state: str = "loading"  # then "working", and "leaving" when it takes no more rows
    busy: int = 0  # rows in the engine
    done: int = 0  # rows that came out of it, failed ones included
    admitted: float | None = None  # requests that may be in flight just now
    most: int = 0  # and at most
    retried: int = 0
    throttled: int = 0
    waited_s: float = 0.0  # for the limits a minute
    trouble: str = ""


@dataclass(slots=True)
class RunStatus:
    """How the run stands; rows."""

    read: int = 0
    invalid: int = 0
    answered: int = 0  # by earlier runs
    duplicates: int = 0  # held back, because an equal request is asked already
    done: int = 0
    failed: int = 0
    in_flight: int = 0
    workers: int = 0  # that have asked for rows and not left
    crashes: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0  # of this run, as far as it is known
    cost_unknown: int = 0  # rows whose cost is not known
    unpriced: list[tuple[int, int]] = field(default_factory=list)  # (lease, row) of these, for the budget
    seen: UsageStats = field(default_factory=UsageStats)
    replicas: dict[str, ReplicaHeartbeat] = field(default_factory=dict)  # by name
    gone: ReplicaHeartbeat = field(default_factory=ReplicaHeartbeat)  # sums over the replicas that have left
    spent: float = 0.0  # of the budget, by all runs; in a worker's counts, by its rows since the last ones
    broke: bool = False  # the budget has no room for any row that is left
    left: int = 0  # rows at hand that nobody has
    errors: Counter[str] = field(default_factory=Counter)  # failures by type
    first_errors: dict[str, str] = field(default_factory=dict)  # an example of each type
    fed: bool = False  # everything is read
    finished: bool = False
    broken: str | None = None  # why reading the input failed
    trouble: str = ""  # what keeps all of it from going on, for now
