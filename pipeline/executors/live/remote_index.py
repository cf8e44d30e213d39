"""An index of the ledger that stays in one actor: a copy on every node would take 56 bytes a request there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.storage.ledger_index import Index, Located


@dataclass(frozen=True, slots=True)
class RemoteIndex:
    """Looks keys up in an `IndexActor`."""

    actor: Any
    paths: list[str]

    def find(self, keys: Sequence[bytes] | pa.Array) -> npt.NDArray[np.int64]:
        """As `Index.find`."""
        return self.locate(keys)[0]

    def locate(self, keys: Sequence[bytes] | pa.Array) -> Located:
        """As `Index.locate`."""
        import ray

        keys = keys if isinstance(keys, (pa.Array, pa.ChunkedArray)) else pa.array(keys, pa.binary(32))
        found: Located = ray.get(self.actor.locate.remote(keys))
        return found


class IndexActor:
    """The actor behind `RemoteIndex`, on the node that has the index in shared memory."""

    def __init__(self, index: list[Any]) -> None:
        import ray

        self.index: Index = ray.get(index[0])

    def locate(self, keys: pa.Array) -> Located:
        return self.index.locate(keys)
