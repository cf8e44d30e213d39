"""Token counts of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


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
    longest: int = field(default=0, compare=False)  # input of the largest single request, which decides the rates

    def __post_init__(self) -> None:
        if self.cached_input or self.cache_write:
            self.cached_input = min(self.cached_input, self.input)
            self.cache_write = min(self.cache_write, self.input - self.cached_input)
        if self.cache_write_1h or self.reasoning:
            self.cache_write_1h = min(self.cache_write_1h, self.cache_write)
            self.reasoning = min(self.reasoning, self.output)
        self.longest = self.longest or self.input

    def add(self, other: Usage) -> None:
        """Adds the tokens of another try; the sum is known if both are."""
        self.input += other.input
        self.cached_input += other.cached_input
        self.output += other.output
        self.cache_write += other.cache_write
        self.reasoning += other.reasoning
        self.cache_write_1h += other.cache_write_1h
        self.known = self.known and other.known
        self.longest = max(self.longest, other.longest)

    def divided(self, weights: Sequence[int]) -> list[Usage]:
        """The usage of a request with several inputs as parts of whole tokens. Their sums are exactly these counts."""
        if len(weights) == 1:
            return [self]
        read, written = _shares(self.input, weights), _shares(self.output, weights)
        if not (self.cached_input or self.cache_write or self.reasoning):  # no other part of tokens has a count
            return [Usage(i, 0, o, known=self.known) for i, o in zip(read, written, strict=True)]
        cached, reasoning = _shares(self.cached_input, read), _shares(self.reasoning, written)
        rest = [whole - part for whole, part in zip(read, cached, strict=True)]
        written_cache = _shares(self.cache_write, rest)
        for_an_hour = _shares(self.cache_write_1h, written_cache)
        rows = zip(read, cached, written, written_cache, reasoning, for_an_hour, strict=True)
        return [Usage(i, c, o, w, r, h, self.known) for i, c, o, w, r, h in rows]


def _shares(total: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to the weights, whose sum is `total`.

    None is above its weight if `total` is not above the sum of the weights.
    """
    whole = sum(weights)
    if not whole:
        weights, whole = [1] * len(weights), len(weights)
    shares, running, given = [], 0, 0
    for weight in weights:
        running += weight
        until = total * running // whole
        shares.append(until - given)
        given = until
    return shares
