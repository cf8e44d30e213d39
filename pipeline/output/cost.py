"""The cost of answers in the ledger, in US dollars."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engines.config import EngineConfig
from pipeline.storage.ledger_index import Index

# The names of segments made of batches begin so, and what all providers ask for a row in one, as a share of the live price.
WRITER, BATCH_PRICE = "batch", 0.5


def batch_share(engine: EngineConfig) -> float:
    return float((engine.provider.get("batch") or {}).get("price", BATCH_PRICE))


def cost_of(engine: EngineConfig, index: Index, used: npt.NDArray[np.bool_] | None = None) -> dict[str, float] | None:
    """What input, cached input and output of a ledger's answers cost, or of those that are `used`; None where the price is
    not known."""
    price = engine.price
    if not price.known and engine.provider:
        return None
    counted = np.ones(len(index), np.bool_) if used is None else used
    batched = np.array([path.rsplit("/", 1)[1].startswith(f"{WRITER}-") for path in index.paths], np.bool_)
    cheap = counted & batched[index.segment] if batched.any() else np.zeros_like(counted)
    live, halved = (index.tokens.sum(axis=0, dtype=np.int64, where=rows[:, None]) for rows in (counted & ~cheap, cheap))
    read, cached, written = (live + batch_share(engine) * halved).tolist()
    return {
        "input": price.of(read - cached, 0, 0),
        "cached_input": price.of(cached, cached, 0),
        "output": price.of(0, 0, written),
    }
