"""The cost of answers in the ledger, in US dollars."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engines.config import EngineConfig
from engines.remote.provider import Provider
from pipeline.storage.ledger_index import OldCosts

# Names of segments with answers from provider batches begin with this word.
WRITER = "batch"


def old_costs(engine: EngineConfig) -> OldCosts:
    """Prices, by today's `engine.price`, records of versions that wrote no cost. The name of a segment tells if its answers
    came from provider batches."""

    def costs(tokens: npt.NDArray[np.int64], path: str) -> npt.NDArray[np.float64] | None:
        if engine.provider and not engine.price.known:
            return None
        share = Provider.of(engine).batch_share(engine.model) if path.rsplit("/", 1)[1].startswith(f"{WRITER}-") else 1.0
        rates = np.array([engine.price.of(*one) for one in ((1, 0, 0), (1, 1, 0), (0, 0, 1))])
        read, cached, written = tokens.T
        return share * (np.stack([read - cached, cached, written], axis=1) @ rates)

    return costs
