"""An index of the ledger in one actor, which other nodes query. A copy on each node would take 56 bytes per request."""

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
    row_bytes: npt.NDArray[np.int64]
    old_until_ms: int

    def find(self, keys: Sequence[bytes] | pa.Array) -> npt.NDArray[np.int64]:
        """As `Index.find`."""
        return self.locate(keys)[0]

    def results(self, keys: Sequence[bytes] | pa.Array) -> npt.NDArray[np.int8]:
        """As `Index.results`."""
        found: npt.NDArray[np.int8] = _answer(self.actor.results.remote(_as_array(keys)))
        return found

    def locate(self, keys: Sequence[bytes] | pa.Array) -> Located:
        """As `Index.locate`."""
        found: Located = _answer(self.actor.locate.remote(_as_array(keys)))
        return found


def _answer(reference: Any) -> Any:
    """The result of a call. A task that waits in `ray.get` gives its CPU back, and its node starts one more process: all
    tasks would run at once."""
    return reference.future().result()


def _as_array(keys: Sequence[bytes] | pa.Array) -> pa.Array:
    return keys if isinstance(keys, (pa.Array, pa.ChunkedArray)) else pa.array(keys, pa.binary(32))


class IndexActor:
    """The actor behind `RemoteIndex`, on the node that has the index in shared memory."""

    def __init__(self, index: list[Any]) -> None:
        import ray

        self.index: Index = ray.get(index[0])

    def results(self, keys: pa.Array) -> npt.NDArray[np.int8]:
        return self.index.results(keys)

    def locate(self, keys: pa.Array) -> Located:
        return self.index.locate(keys)


def reference_to(index: Any) -> Any:
    """The index itself if it is a reference to an object in Ray's store; otherwise a reference to it."""
    import ray

    return index if isinstance(index, ray.ObjectRef) else ray.put(index)
