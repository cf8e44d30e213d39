"""Token counts of an answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Usage:
    """Tokens of one request, or of all tries of a row.

    Always cached_input + cache_write <= input, cache_write_1h <= cache_write and reasoning <= output: a provider that
    reports more has its parts cut. `known` is False where an answer came without its usage; the counts then hold only
    what other tries reported.
    """

    input: int = 0
    cached_input: int = 0  # part of `input` that was read from a prompt cache
    output: int = 0
    cache_write: int = 0  # part of `input` that was written to a prompt cache
    reasoning: int = 0  # part of `output`
    cache_write_1h: int = 0  # part of `cache_write` that is kept for an hour, which costs more; not in the ledger
    known: bool = True

    def __post_init__(self) -> None:
        self.cached_input = min(self.cached_input, self.input)
        self.cache_write = min(self.cache_write, self.input - self.cached_input)
        self.cache_write_1h = min(self.cache_write_1h, self.cache_write)
        self.reasoning = min(self.reasoning, self.output)

    def add(self, other: Usage) -> None:
        """Adds the tokens of another try; the sum is known if both are."""
        self.input += other.input
        self.cached_input += other.cached_input
        self.output += other.output
        self.cache_write += other.cache_write
        self.reasoning += other.reasoning
        self.cache_write_1h += other.cache_write_1h
        self.known = self.known and other.known
