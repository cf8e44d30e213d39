"""`manifest.json`: the result of a run in figures. It is written last: an output with a manifest is complete."""

from __future__ import annotations

import contextlib
import math
import platform
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.remote.provider import Provider
from pipeline.config import Config, hidden_keys, without_secrets
from pipeline.context import RunContext
from pipeline.dataset.reader import ReadSplit, SplitSummary
from pipeline.monitor.status import RunStatus
from pipeline.output.finalize import WrittenOutput
from pipeline.output.up_to_date import input_entry, ledger_entry
from pipeline.storage.ledger import TOKENS
from pipeline.storage.ledger_index import REPRICED, UNKNOWN, Index


def make_manifest(
    context: RunContext,
    splits: list[ReadSplit],
    summaries: dict[int, SplitSummary],
    written: WrittenOutput,
    index: Index,
    more: dict[str, Any],
) -> dict[str, Any]:
    """The manifest of a run. `more` are the executors' entries. docs/concepts.md ("Counts") defines the terms."""
    config, used, requests = context.config, written.used, int(written.used.sum())
    invalid = sum(summary.invalid for summary in summaries.values())
    tokens = dict(zip(TOKENS, index.tokens.sum(axis=0, dtype=np.int64, where=used[:, None]).tolist(), strict=True))
    return {
        "status": "complete",
        "rows": {
            "total": written.rows,
            "done": written.rows - written.failed,
            "failed": written.failed,
            "invalid": invalid,
            "truncated": written.truncated,
            "requests": requests,
            "duplicates": written.rows - invalid - requests,
        },
        "errors": dict(written.errors),
        "this_run": this_run(context.state.now),
        "replica_problems": [asdict(problem) for problem in context.state.now.problems],
        # Of all runs, with all retries:
        "requests_sent": int(index.attempts.sum(dtype=np.int64, where=used)),
        "tokens": tokens,
        **_cost(config, index, used, tokens),
        "costs": _costs(index, written),
        "price_as_of": config.engine.price.as_of,
        **more,
        "engine": {"kind": config.engine.kind, "model": config.engine.model, "adapter": config.engine.adapter},
        "config": without_secrets(config),
        "hidden_keys": hidden_keys(config),
        **context.origin.entries(),
        "input": input_entry(config, splits) | {"contents": sum(s.contents for s in summaries.values())},
        "ledger": ledger_entry(index),
        "files": dict(sorted(written.files.items())),
        "versions": _versions(),
        "started_at": context.started,
        "finished_at": time.time(),
    }


def this_run(status: RunStatus) -> dict[str, int]:
    """The entry for the requests of one run."""
    return {
        "asked": status.asked,
        "failed": status.failed,
        "requests_sent": status.sent,
        "engine_deaths": status.crashes,
    }


def _cost(config: Config, index: Index, used: npt.NDArray[np.bool_], tokens: dict[str, int]) -> dict[str, Any]:
    """The cost of the requests in this output, of all runs and with all retries. `cost_usd` is null if the cost of one
    request is unknown."""
    flags, known = index.flags[used], float(index.cost_usd.sum(where=used))
    unknown, parts = int(np.count_nonzero(flags & UNKNOWN)), None
    if not unknown:
        parts = _parts(config, tokens, known)
        known = sum(parts.values()) if parts else known  # equal except for rounding
    return {
        "cost_usd": None if unknown else known,
        "cost_known_usd": known,
        "cost_unknown_requests": unknown,
        "cost_repriced_requests": int(np.count_nonzero(flags & REPRICED)),  # of an older version, by today's price
        "cost_parts_usd": parts,
        "spent_usd": index.spent()[0],  # known cost of all records in the ledger, used by this output or not
    }


def _costs(index: Index, written: WrittenOutput) -> list[dict[str, Any]]:
    """The cost by lane and model, the highest first. A request counts with the lane and model of its result, and with all
    its tries."""
    found: list[dict[str, Any]] = []
    for number, (lane, model) in enumerate(written.groups):
        taken = written.group == number
        # `where` instead of a selection: no copy of the index in the driver.
        unknown, known = int(np.count_nonzero(index.flags[taken] & UNKNOWN)), float(index.cost_usd.sum(where=taken))
        tokens = index.tokens.sum(axis=0, dtype=np.int64, where=taken[:, None])
        entry: dict[str, Any] = {"lane": lane, "model": model or None, "requests": int(np.count_nonzero(taken))}
        entry |= {f"{name}_tokens": int(tokens[TOKENS.index(name)]) for name in ("input", "output")}
        entry |= {"cost_usd": None if unknown else known, "cost_known_usd": known, "cost_unknown_requests": unknown}
        found.append(entry)
    return sorted(found, key=lambda entry: (-entry["cost_known_usd"], -entry["requests"]))


def _parts(config: Config, tokens: dict[str, int], cost: float) -> dict[str, float] | None:
    """The cost by kind of token. None if tokens had more than one price: then no single price adds up to the cost."""
    engine = config.engine
    prices = [engine.price]
    if engine.provider:
        prices.append(engine.price.in_batch(Provider.of(engine).batch_share(engine.model)))
    for price in prices:
        parts = price.parts(*(tokens[name] for name in ("input", "cached_input", "output", "cache_write")))
        if math.isclose(sum(parts.values()), cost, rel_tol=1e-9, abs_tol=1e-12):
            return parts
    return None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("eagleray", "ray", "pyarrow", "llama-cpp-python", "transformers", "torch", "vllm", "sglang"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
