"""Numbers the rows whose sampled requests have equal keys, such as several rows with one id.

The number of a row is its position among the rows with its key, in the order of the input. It is part of the final key, so
each row gets an answer, and an inserted or appended row changes no other row's number unless it has the same key.

A reader of the whole input counts as it reads. A reader of one split needs to know the rows before it: `Earlier`. At first
nothing is known of other splits. If finalize finds that rows of two splits got the same final key, `RepeatCounter`
(`repeats.py`) counts such rows in each split, and another pass reads the splits with the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.storage.ledger_index import DedupFilter, split_keys

# The first 64 bits of keys, and the number of rows with each key in earlier splits.
Earlier = tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]
NONE_EARLIER: Earlier = (np.empty(0, np.uint64), np.empty(0, np.uint32))


class Occurrences:
    """Counts rows by key: 8 bytes for each key, and more only for keys of several rows.

    Two different keys may agree in 64 bits. Then the second row gets the number 1, which changes its key and nothing else.
    """

    def __init__(self, earlier: Earlier = NONE_EARLIER) -> None:
        self._all, self._here = DedupFilter(), DedupFilter()
        self._counts: dict[int, int] = dict(zip(earlier[0].tolist(), earlier[1].tolist(), strict=True))
        self._all.add_hashes(earlier[0])
        self._earlier: dict[int, int] = {}

    def begin_split(self) -> None:
        """The next rows belong to another split."""
        self._here, self._earlier = DedupFilter(), {}

    def number(self, keys: Sequence[bytes]) -> list[int]:
        """The number of each row, from 0, among all rows with its key."""
        hashes, _ = split_keys(keys)
        new, new_here = self._all.add_hashes(hashes), self._here.add_hashes(hashes)
        numbers = [0] * len(keys)
        for at in np.flatnonzero(~new).tolist():
            key = int(hashes[at])
            numbers[at] = self._counts.get(key, 1)
            self._counts[key] = numbers[at] + 1
            if new_here[at]:
                self._earlier[key] = numbers[at]
        return numbers

    def earlier(self) -> Earlier:
        """The keys of this split that rows of earlier splits have too, with the number of these rows."""
        found = self._earlier
        return np.fromiter(found, np.uint64, len(found)), np.fromiter(found.values(), np.uint32, len(found))
