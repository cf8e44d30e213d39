"""The counts of a run and of its replicas."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class UsageStats:
    """Measured usage that improves later estimates."""

    answers: int = 0
    tokens_a_byte: float = 0.0  # maximum over the prompts
    output: int = 0  # maximum number of tokens of one answer

    def add(self, other: UsageStats) -> None:
        self.answers += other.answers
        self.tokens_a_byte = max(self.tokens_a_byte, other.tokens_a_byte)
        self.output = max(self.output, other.output)


@dataclass(slots=True)
class ReplicaHeartbeat:
    """The state of a replica, sent with the calls that it makes to the dispatcher."""

    state: str = "loading"  # then "working"; "leaving" when it takes no more rows
    busy: int = 0  # rows in the engine
    done: int = 0  # rows that the engine finished, failed ones included
    admitted: float | None = None  # current limit of requests in flight
    most: int = 0  # upper bound of `admitted`
    retried: int = 0
    throttled: int = 0
    waited_s: float = 0.0  # waiting time for the limits per minute
    trouble: str = ""


@dataclass(slots=True)
class RunStatus:
    """The state of the run. Counts are rows unless stated otherwise."""

    read: int = 0
    invalid: int = 0
    answered: int = 0  # by earlier runs
    duplicates: int = 0  # not asked, because an equal request is already being asked
    done: int = 0
    failed: int = 0
    in_flight: int = 0
    workers: int = 0  # workers that have asked for rows and have not left
    crashes: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0  # known cost of this run
    cost_unknown: int = 0  # rows of unknown cost
    unpriced: list[tuple[int, int]] = field(default_factory=list)  # (lease, row) of these rows, for the budget
    seen: UsageStats = field(default_factory=UsageStats)
    replicas: dict[str, ReplicaHeartbeat] = field(default_factory=dict)  # by name
    gone: ReplicaHeartbeat = field(default_factory=ReplicaHeartbeat)  # sums over the replicas that have left
    spent: float = 0.0  # US$ of the budget, by all runs; in a worker's counts, by its rows since its last report
    broke: bool = False  # the budget is too small for every remaining row
    left: int = 0  # rows that were read and that no worker has
    errors: Counter[str] = field(default_factory=Counter)  # failures by type
    first_errors: dict[str, str] = field(default_factory=dict)  # an example of each type
    fed: bool = False  # the whole input was read
    finished: bool = False
    broken: str | None = None  # why reading the input failed
    trouble: str = ""  # why the whole run is stalled at the moment
