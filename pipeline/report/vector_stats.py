"""Statistics of embeddings: their norms, and the nearest and farthest pairs of a sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.report.value_stats import Locate, Shown, ValueStats, lowest

Floats = npt.NDArray[np.float64]

# Embeddings in the sample, and pairs of each kind that the report shows.
SAMPLED, PAIRS = 128, 5


class Vector(NamedTuple):
    """An embedding of the sample. Those with the lowest `rank` are kept."""

    rank: float
    at: int  # index of the row
    numbers: npt.NDArray[np.float32]
    shown: Shown


class Pair(NamedTuple):
    cosine: float
    one: Shown
    two: Shown


@dataclass(slots=True)
class VectorStats:
    """Can be merged. An embedding that serves several rows is in the sample once."""

    norms: ValueStats = field(default_factory=lambda: ValueStats("number"))
    lengths: set[int] = field(default_factory=set)
    sample: list[Vector] = field(default_factory=list)

    def add(self, column: pa.Array, ranks: Floats, first: npt.NDArray[np.bool_], show: Locate) -> None:
        """Adds the embeddings of done rows. `first`: the rows whose answer no earlier row has."""
        filled = pc.fill_null(pc.greater(pc.list_value_length(column), 0), False)
        rows, column = np.flatnonzero(np.asarray(filled)), column.filter(filled)
        lengths = np.asarray(pc.list_value_length(column), np.int64)
        self.lengths.update(np.unique(lengths).tolist())
        numbers = np.asarray(pc.list_flatten(column), np.float32)
        ends = np.cumsum(lengths)
        squares = np.add.reduceat(numbers.astype(np.float64) ** 2, ends - lengths) if len(numbers) else np.zeros(len(rows))
        # Rounded, so that the norms of normalised embeddings are one value.
        self.norms.add(pa.array(np.round(np.sqrt(squares), 4)), ranks[rows], lambda row: show(int(rows[row])))
        for at in np.argsort(ranks[rows], kind="stable").tolist():
            rank = float(ranks[rows[at]])
            if len(self.sample) >= SAMPLED and rank >= self.sample[-1].rank:
                break
            if first[rows[at]]:
                shown = show(int(rows[at]))
                mine = numbers[ends[at] - lengths[at] : ends[at]].copy()
                self.sample = lowest([*self.sample, Vector(rank, shown.at, mine, shown)], SAMPLED)

    def merge(self, other: VectorStats) -> None:
        self.norms.merge(other.norms)
        self.lengths |= other.lengths
        self.sample = lowest([*self.sample, *other.sample], SAMPLED)

    def pairs(self) -> tuple[Floats, list[Pair], list[Pair]]:
        """The cosines of all pairs of the sample, the nearest pairs, and the farthest ones."""
        length = max(self.lengths, default=0)
        some = [vector for vector in self.sample if len(vector.numbers) == length and np.isfinite(vector.numbers).all()]
        if len(some) < 2:
            return np.empty(0), [], []
        matrix = np.stack([vector.numbers for vector in some]).astype(np.float64)
        matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-30)
        one, two = np.triu_indices(len(some), 1)
        cosines = np.einsum("ij,ij->i", matrix[one], matrix[two])
        order = np.argsort(-cosines, kind="stable")

        def shown(places: npt.NDArray[np.int64]) -> list[Pair]:
            return [Pair(float(cosines[at]), some[one[at]].shown, some[two[at]].shown) for at in places]

        return cosines, shown(order[:PAIRS]), shown(order[::-1][:PAIRS])
