"""The cost of ledger records of earlier versions, which did not write it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engines.config import EngineConfig
from engines.remote.provider import Provider
from pipeline.storage.ledger import is_batch_segment
from pipeline.storage.ledger_index import OldCosts


def old_costs(engine: EngineConfig) -> OldCosts:
    """Returns a function that computes the cost of such records from today's `engine.price`.

    The name of a segment shows whether its answers came from provider batches.
    """

    def costs(tokens: npt.NDArray[np.int64], path: str) -> npt.NDArray[np.float64] | None:
        if engine.provider and not engine.price.known:
            return None
        price = engine.price
        if is_batch_segment(path):
            price = price.in_batch(Provider.of(engine).batch_share(engine.model))
        rates = np.array([price.of(*one) for one in ((1, 0, 0), (1, 1, 0), (0, 0, 1))])
        read, cached, written = tokens.T
        return np.asarray(np.stack([read - cached, cached, written], axis=1) @ rates)

    return costs
