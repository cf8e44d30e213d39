"""The batch price of estimates, and the cost of ledger records of earlier versions, which have none."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engines.config import EngineConfig
from engines.remote.provider import Provider
from pipeline.storage.ledger_index import OldCosts

# Names of segments with answers from provider batches begin with this word.
BATCH_SEGMENT_PREFIX = "batch"


def old_costs(engine: EngineConfig) -> OldCosts:
    """Computes the cost of records of earlier versions, which wrote none, from today's `engine.price`.

    The name of a segment tells if its answers came from provider batches.
    """

    def costs(tokens: npt.NDArray[np.int64], path: str) -> npt.NDArray[np.float64] | None:
        if engine.provider and not engine.price.known:
            return None
        is_batch = path.rsplit("/", 1)[1].startswith(f"{BATCH_SEGMENT_PREFIX}-")
        share = Provider.of(engine).batch_share(engine.model) if is_batch else 1.0
        rates = np.array([engine.price.of(*one) for one in ((1, 0, 0), (1, 1, 0), (0, 0, 1))])
        read, cached, written = tokens.T
        return share * (np.stack([read - cached, cached, written], axis=1) @ rates)

    return costs
