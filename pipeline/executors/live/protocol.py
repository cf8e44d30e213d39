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
    last: bool = False  # the feed has nothing more at the moment

    def __len__(self) -> int:
        return len(self.keys)
