"""Messages between the dispatcher and its workers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Lease:
    """Rows lent to one worker until it reports them durable, or dies."""

    number: int
    keys: list[bytes]
    ids: list[str]
    requests: list[bytes]
    alone: bool = False  # on trial: no other row may be in the engine
    deaths: list[int] = field(default_factory=list)  # of engine processes, for each row; empty: none
    poison: str | None = None  # a poison row: it is recorded as failed, with this reason, and not asked
    last: bool = False  # the input is read, and no other row waits at the moment

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, slots=True)
class Departure:
    """How a worker ended whose process did not die."""

    replaced: bool = False  # its node goes away, or its engine must be loaded again: another worker takes its place
    at_once: int | None = None  # the most requests in the new worker's engine; None: as configured
    too_small: str = ""  # why no other worker takes its place: its memory is too small even for single rows
