"""Finds the beginnings and endings that texts share, so that the report shows them once and then only what differs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

# Shorter shared texts are not worth a mark.
LEAST_BEFORE, LEAST_AFTER = 40, 20
_END_OF_WORD = re.compile(r"[\s.,:;!?\"'(\[{]")


@dataclass(slots=True)
class Alike:
    """Texts that begin, and perhaps end, alike. `before` and `after` are empty for a text that is like no other."""

    before: str
    after: str
    at: list[int] = field(default_factory=list)  # the places of the texts

    def differing(self, text: str) -> str:
        """The part of a text of this group that its other texts do not share."""
        return text[len(self.before) : len(text) - len(self.after)] if self.before or self.after else text


def alike(texts: Sequence[str]) -> list[Alike]:
    """Groups the texts by their beginnings. Equal texts have nothing that differs, so they share nothing."""
    order = sorted(range(len(texts)), key=lambda at: texts[at])
    groups: list[list[int]] = []
    shared = ""
    for at in order:
        common = _whole_words(common_prefix([shared, texts[at]]))
        if len(common) >= LEAST_BEFORE:
            groups[-1].append(at)
            shared = common
        else:
            groups.append([at])
            shared = texts[at]
    return [_group(texts, sorted(group)) for group in groups]


def _group(texts: Sequence[str], at: list[int]) -> Alike:
    mine = [texts[n] for n in at]
    if len(set(mine)) == 1:
        return Alike("", "", at)
    before = _whole_words(common_prefix(mine))
    ends = common_prefix([text[len(before) :][::-1] for text in mine])[::-1]
    start = re.search(r"\s", ends)
    after = ends[start.start() :] if start else ""
    return Alike(before, after if len(after) >= LEAST_AFTER else "", at)


def common_prefix(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # the others are between them
    same = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:same]


def _whole_words(text: str) -> str:
    """The text without its last word, which may go on differently in each text."""
    ends = [found.end() for found in _END_OF_WORD.finditer(text)]
    return text[: ends[-1]] if ends else ""
