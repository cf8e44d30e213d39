"""The counts of a run and of its replicas. docs/concepts.md ("Counts") defines the terms."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from engines.text import counted


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


# What can happen to replicas of a run that goes on, in words.
_HAPPENED = {
    "load": "could not be loaded",
    "died": "died again and again without finishing a row",
    "too_small": "had too little memory for single rows",
    "memory": "ran out of memory and now takes at most {at_once} at once",
}


@dataclass(slots=True)
class ReplicaProblem:
    """A problem of replicas that did not end the run. `count`: how often it happened."""

    entry: str  # of `hardware`: hardware, or hardware[1]
    kind: str  # of _HAPPENED
    reason: str
    count: int = 1
    at_once: int | None = None  # requests that the smallest of them takes now

    def sentence(self) -> str:
        where = f" of {self.entry}" if self.entry != "hardware" else ""
        times = f" ({self.count:,} times)" if self.count > 1 and self.kind != "memory" else ""
        happened = _HAPPENED[self.kind].format(at_once=counted(self.at_once or 0, "request"))
        return f"A replica{where} {happened}{times}: {self.reason}"


def merged_problems(*lists: list[ReplicaProblem]) -> list[ReplicaProblem]:
    """The problems of several lists, those with one reason as one."""
    found: dict[tuple[str, str, str], ReplicaProblem] = {}
    for each in (each for problems in lists for each in problems):
        key = each.entry, each.kind, each.reason
        if (same := found.get(key)) is None:
            found[key] = dataclasses.replace(each)
        else:
            same.count += each.count
            same.at_once = min(filter(None, (same.at_once, each.at_once)), default=None)
    return list(found.values())


class RowCounts(NamedTuple):
    """The rows of the whole output by result. `done + failed + open == read`."""

    read: int
    done: int
    failed: int
    open: int  # no result yet
    truncated: int  # done, with an answer that was cut at the maximum length
    invalid: int  # failed, because they cannot be read


def row_cells(rows: RowCounts, fed: bool = True) -> list[str]:
    """The counts of rows in words, the same on every surface. `fed`: the whole input is read."""
    cells = [
        f"{rows.done:,} of {counted(rows.read, 'row') if fed else f'{rows.read:,}+ rows'} done",
        f"{rows.failed:,} failed",
    ]
    cells += [f"{rows.open:,} open"] if rows.open else []
    return cells + ([f"{rows.truncated:,} truncated"] if rows.truncated else [])


# The counts of a run that are summed over its executors and passes.
SUMS = ("done", "failed", "sent", "crashes", "input_tokens", "output_tokens", "cost_usd", "cost_unknown")


@dataclass(slots=True)
class RunStatus:
    """The state of the run, or a part that a worker adds to it. `rows` has the rows of the whole output."""

    # Rows of the input
    read: int = 0
    invalid: int = 0
    answered: int = 0  # done before: by an earlier run, or an earlier pass of this one
    failed_before: int = 0  # failed before, and not sent again
    truncated_before: int = 0  # some of `answered`
    duplicates: int = 0  # rows to ask that share the request of another row
    rows_done: int = 0  # by this pass, duplicates included
    rows_failed: int = 0
    rows_truncated: int = 0  # some of `rows_done`
    # Requests of this pass. A request may serve several rows.
    done: int = 0
    failed: int = 0
    sent: int = 0  # requests sent, retries included
    submitted: int = 0  # in batches that have not ended
    finished_there: int = 0  # of these, finished by the provider
    leased: int = 0  # held by workers: in flight, or the next ones
    failures: list[tuple[int, int, str]] = field(default_factory=list)  # a worker's (lease, row, error type)
    truncations: list[tuple[int, int]] = field(default_factory=list)  # a worker's (lease, row)
    workers: int = 0  # workers that have asked for rows and have not left
    crashes: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0  # the known cost
    cost_unknown: int = 0  # requests of unknown cost
    unpriced: list[tuple[int, int]] = field(default_factory=list)  # (lease, row) of these requests, for the budget
    seen: UsageStats = field(default_factory=UsageStats)
    replicas: dict[str, ReplicaHeartbeat] = field(default_factory=dict)  # by name
    gone: ReplicaHeartbeat = field(default_factory=ReplicaHeartbeat)  # sums over the replicas that have left
    spent: float = 0.0  # US$ of the budget, by all runs; in a worker's counts, by its rows since its last report
    broke: bool = False  # the budget is too small for every remaining row
    errors: Counter[str] = field(default_factory=Counter)  # `rows_failed` by type
    first_errors: dict[str, str] = field(default_factory=dict)  # an example of each type
    fed: bool = False  # the whole input was read
    finished: bool = False
    broken: str | None = None  # why reading the input failed
    trouble: str = ""  # why the whole run is stalled at the moment
    problems: list[ReplicaProblem] = field(default_factory=list)  # of replicas; the run goes on
    refusal: tuple[str, str] | None = None  # why a server refuses all rows, with its error code

    @property
    def rows(self) -> RowCounts:
        """The rows of the whole output, as far as the input is read."""
        done = self.answered + self.rows_done
        failed = self.invalid + self.failed_before + self.rows_failed
        open = max(0, self.read - done - failed)
        return RowCounts(self.read, done, failed, open, self.truncated_before + self.rows_truncated, self.invalid)

    @property
    def in_flight(self) -> int:
        """Requests in the engines, or in batches at the provider."""
        return self.submitted + sum(heartbeat.busy for heartbeat in self.replicas.values())

    @property
    def asked(self) -> int:
        """The requests that got a result."""
        return self.done + self.failed

    def plus(self, earlier: RunStatus) -> RunStatus:
        """This status with the sums of earlier executors and passes of the run."""
        sums = {name: getattr(self, name) + getattr(earlier, name) for name in SUMS}
        return dataclasses.replace(self, **sums, problems=merged_problems(earlier.problems, self.problems))

    def add(self, other: RunStatus) -> None:
        """Adds the sums of another executor or pass."""
        for name in SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.problems = merged_problems(self.problems, other.problems)
