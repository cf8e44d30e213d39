"""`manifest.json`: the result of a run in figures. It is written last: an output with a manifest is complete."""

from __future__ import annotations

import contextlib
import hashlib
import math
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow.fs as pafs

from engines.remote.provider import Provider
from pipeline.config import Config, without_secrets
from pipeline.context import RunContext
from pipeline.dataset.reader import ReadSplit, SplitSummary
from pipeline.monitor.status import RunStatus
from pipeline.output.finalize import WrittenOutput
from pipeline.storage.exact_json import canonical
from pipeline.storage.filesystem import exists, info_of, listing, resolve
from pipeline.storage.ledger import TOKENS
from pipeline.storage.ledger_index import REPRICED, UNKNOWN, Index
from pipeline.storage.output_files import DATA, ERRORS, MANIFEST, REPORT


def make_manifest(
    context: RunContext,
    splits: list[ReadSplit],
    summaries: dict[int, SplitSummary],
    written: WrittenOutput,
    index: Index,
    totals: RunStatus,
    more: dict[str, Any],
) -> dict[str, Any]:
    """The manifest of a run. `totals` counts this run's own requests. `more` are the executors' entries."""
    config, used = context.config, written.used
    tokens = dict(zip(TOKENS, index.tokens.sum(axis=0, dtype=np.int64, where=used[:, None]).tolist(), strict=True))
    return {
        "status": "complete",
        "rows": {
            "total": written.rows,
            "done": written.rows - written.failed,
            "failed": written.failed,
            "invalid": sum(s.invalid for s in summaries.values()),
            "requests": int(used.sum()),  # distinct ones; equal deterministic requests are asked once
        },
        "errors": dict(written.errors),
        "this_run": {"asked": totals.done + totals.failed, "failed": totals.failed, "engine_deaths": totals.crashes},
        "requests_sent": int(index.attempts[used].sum(dtype=np.int64)),  # all tries of them
        "tokens": tokens,  # of all tries
        **_cost(config, index, used, tokens),
        "price_as_of": config.engine.price.as_of,
        **more,
        "engine": {"kind": config.engine.kind, "model": config.engine.model, "adapter": config.engine.adapter},
        "config": without_secrets(config),
        "input": _fingerprint(config, splits),
        "ledger": _ledger(index),
        "files": dict(sorted(written.files.items())),
        "versions": _versions(),
        "started_at": context.started,
        "finished_at": time.time(),
    }


def _cost(config: Config, index: Index, used: npt.NDArray[np.bool_], tokens: dict[str, int]) -> dict[str, Any]:
    """The cost of all tries of the requests in this output. `cost_usd` is null if the cost of one is not known."""
    flags, known = index.flags[used], float(index.cost_usd[used].sum())
    unknown, parts = int(np.count_nonzero(flags & UNKNOWN)), None
    if not unknown:
        parts = _parts(config, tokens, known)
        known = sum(parts.values()) if parts else known  # the same but for rounding
    return {
        "cost_usd": None if unknown else known,
        "cost_known_usd": known,
        "cost_unknown_requests": unknown,
        "cost_repriced_requests": int(np.count_nonzero(flags & REPRICED)),  # of an older version, by today's price
        "cost_parts_usd": parts,
        "spent_usd": index.spent()[0],  # known cost of everything in the ledger, whether this output uses it or not
    }


def _parts(config: Config, tokens: dict[str, int], cost: float) -> dict[str, float] | None:
    """The cost by kind of token. None if tokens had more than one price: then no single price adds up to the cost."""
    parts = config.engine.price.parts(*(tokens[name] for name in ("input", "cached_input", "output", "cache_write")))
    shares = (1.0, Provider.of(config.engine).batch_share(config.engine.model)) if config.engine.provider else (1.0,)
    for share in shares:
        if math.isclose(share * sum(parts.values()), cost, rel_tol=1e-9, abs_tol=1e-12):
            return {name: share * part for name, part in parts.items()}
    return None


def _fingerprint(config: Config, splits: list[ReadSplit]) -> dict[str, Any]:
    """The input files as they are now, and a digest of them and of every setting that changes the output."""
    names = list(dict.fromkeys(split.file_split.file for split in splits))
    with ThreadPoolExecutor(16) as pool:  # an object store takes tens of milliseconds for each
        found = pool.map(lambda name: info_of(*resolve(name)), names)
        files = [{"path": name, "bytes": i.size, "modified_ns": i.mtime_ns} for name, i in zip(names, found, strict=True)]
    output = {name: value for name, value in asdict(config.output).items() if name != "overwrite"}
    shape = [files, asdict(config.dataset), output, config.engine.identity(), config.params().given()]
    return {"files": files, "digest": hashlib.sha256(canonical(shape)).hexdigest()}


def _ledger(index: Index) -> dict[str, int]:
    """The size of the ledger when the output was put together."""
    return {"requests": len(index), "failed": int(index.failed.sum())}


def unchanged(
    config: Config, fs: pafs.FileSystem, root: str, splits: list[ReadSplit], index: Index
) -> dict[str, Any] | None:
    """The manifest, if it is for exactly this input and configuration and all its files exist; else None."""
    try:
        with fs.open_input_stream(f"{root}/{MANIFEST}") as stream:
            manifest: dict[str, Any] = orjson.loads(stream.read())
        # Different if a run was killed after its last answer and before its output.
        if manifest["ledger"] != _ledger(index):
            return None
        same = manifest["input"]["digest"] == _fingerprint(config, splits)["digest"]
        there = {f"{folder}/{info.base_name}" for folder in (DATA, ERRORS) for info in listing(fs, f"{root}/{folder}")}
        whole = there.issuperset(manifest["files"]) and exists(fs, f"{root}/{REPORT}")
        return manifest if same and whole else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("eagleray", "ray", "pyarrow", "llama-cpp-python", "transformers", "torch", "vllm"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
