"""Messages between the dispatcher and its workers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Lease:
    """Rows lent to one worker until it reports them durable, or dies."""

    number: int
    keys: list[bytes]
    ids: list[str]
    requests: list[bytes]
    alone: bool = False  # a suspect: nothing else may be in the engine beside it
    deaths: int = 0  # engine processes that died with these rows in them
    poison: str | None = None  # not to be asked at all: why
    last: bool = False  # the feed has nothing more at the moment

    def __len__(self) -> int:
        return len(self.keys)
