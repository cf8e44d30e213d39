"""`manifest.json`: what a run came to, written last, by which it counts as complete."""

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

from pipeline.config import Config, without_secrets
from pipeline.dataset.reader import ReadSplit, SplitSummary
from pipeline.executors.batch.store import BatchStore
from pipeline.monitor.status import RunStatus
from pipeline.output.cost import batch_share
from pipeline.output.finalize import JobResult
from pipeline.storage.exact_json import canonical
from pipeline.storage.filesystem import exists, info_of, listing, resolve
from pipeline.storage.ledger import TOKENS
from pipeline.storage.ledger_index import REPRICED, UNKNOWN, Index
from pipeline.storage.output_files import DATA, ERRORS, MANIFEST, REPORT


def make_manifest(
    config: Config,
    splits: list[ReadSplit],
    fs: pafs.FileSystem,
    summaries: dict[int, SplitSummary],
    result: JobResult,
    index: Index,
    totals: RunStatus,
    started: float,
) -> dict[str, Any]:
    (used,) = result.used
    tokens = dict(zip(TOKENS, index.tokens.sum(axis=0, dtype=np.int64, where=used[:, None]).tolist(), strict=True))
    return {
        "status": "complete",
        "rows": {
            "total": result.rows,
            "done": result.rows - result.failed,
            "failed": result.failed,
            "invalid": sum(s.invalid for s in summaries.values()),
            "requests": int(used.sum()),  # distinct ones; equal deterministic requests are asked once
        },
        "errors": dict(result.errors),
        "this_run": {"asked": totals.done + totals.failed, "failed": totals.failed, "engine_deaths": totals.crashes},
        "requests_sent": int(index.attempts[used].sum(dtype=np.int64)),  # all tries of them
        "tokens": tokens,  # of all tries
        **_cost(config, index, used, tokens),
        "price_as_of": config.engine.price.as_of,
        "batches": BatchStore(fs, resolve(str(config.output.path))[1]).summary(),
        "engine": {"kind": config.engine.kind, "model": config.engine.model, "adapter": config.engine.adapter},
        "config": without_secrets(config),
        "input": _fingerprint(config, splits),
        "ledger": _ledger(index),
        "files": dict(sorted(result.files.items())),
        "versions": _versions(),
        "started_at": started,
        "finished_at": time.time(),
    }


def _cost(config: Config, index: Index, used: npt.NDArray[np.bool_], tokens: dict[str, int]) -> dict[str, Any]:
    """What the records of the requests in this output cost, superseded ones included; null where one is not known."""
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
    """The cost by kind of token; None where tokens had more than one price, so that one price does not add up to it."""
    parts = config.engine.price.parts(*(tokens[name] for name in ("input", "cached_input", "output", "cache_write")))
    shares = (1.0, batch_share(config.engine)) if config.engine.provider else (1.0,)
    for share in shares:
        if math.isclose(share * sum(parts.values()), cost, rel_tol=1e-9, abs_tol=1e-12):
            return {name: share * part for name, part in parts.items()}
    return None


def _fingerprint(config: Config, splits: list[ReadSplit]) -> dict[str, Any]:
    """The input files as they are now, and a digest over them and all that shapes the output."""
    names = list(dict.fromkeys(split.file_split.file for split in splits))
    with ThreadPoolExecutor(16) as pool:  # a store answers one at a time in tens of milliseconds
        found = pool.map(lambda name: info_of(*resolve(name)), names)
        files = [{"path": name, "bytes": i.size, "modified_ns": i.mtime_ns} for name, i in zip(names, found, strict=True)]
    output = {name: value for name, value in asdict(config.output).items() if name != "overwrite"}
    shape = [files, asdict(config.dataset), output, config.engine.identity(), config.params().given()]
    return {"files": files, "digest": hashlib.sha256(canonical(shape)).hexdigest()}


def _ledger(index: Index) -> dict[str, int]:
    """By which an output tells how far the ledger was when it was put together."""
    return {"requests": len(index), "failed": int(index.failed.sum())}


def unchanged(
    config: Config, fs: pafs.FileSystem, root: str, splits: list[ReadSplit], index: Index
) -> dict[str, Any] | None:
    """The manifest, where it stands for exactly this input and configuration and its files are all there."""
    try:
        with fs.open_input_stream(f"{root}/{MANIFEST}") as stream:
            manifest: dict[str, Any] = orjson.loads(stream.read())
        # An older one, where a run was killed between its last answer and the output.
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
