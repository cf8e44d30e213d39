"""`manifest.json`: what a run came to, written last, by which it counts as complete."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import orjson
import pyarrow.fs as pafs

from pipeline.batches import Book
from pipeline.budget import cost_of
from pipeline.config import Config, without_secrets
from pipeline.feed import Piece, Status, Summary
from pipeline.finalize import JobResult
from pipeline.fs import exists, info_of, listing, resolve
from pipeline.ledger import Index
from pipeline.lossless import canonical
from pipeline.recognise import DATA, ERRORS, MANIFEST, REPORT


def make_manifest(
    config: Config,
    pieces: list[Piece],
    fs: pafs.FileSystem,
    summaries: dict[int, Summary],
    result: JobResult,
    index: Index,
    asked: Status,
    started: float,
) -> dict[str, Any]:
    (used,) = result.used
    tokens = index.tokens.sum(axis=0, dtype=np.int64, where=used[:, None])
    cost = cost_of(config.engine, index, used)
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
        "this_run": {"asked": asked.done + asked.failed, "failed": asked.failed, "engine_deaths": asked.crashes},
        "tokens": {"input": int(tokens[0]), "cached_input": int(tokens[1]), "output": int(tokens[2])},
        "cost_usd": None if cost is None else sum(cost.values()),  # null: the price is not known
        "cost_parts_usd": cost,
        "price_as_of": config.engine.price.as_of,
        "batches": Book(fs, resolve(str(config.output.path))[1]).told(),
        "engine": {"kind": config.engine.kind, "model": config.engine.model, "adapter": config.engine.adapter},
        "config": without_secrets(config),
        "input": _fingerprint(config, pieces),
        "ledger": _ledger(index),
        "files": dict(sorted(result.files.items())),
        "versions": _versions(),
        "started_at": started,
        "finished_at": time.time(),
    }


def _fingerprint(config: Config, pieces: list[Piece]) -> dict[str, Any]:
    """The input files as they are now, and a digest over them and all that shapes the output."""
    names = list(dict.fromkeys(piece.chunk.file for piece in pieces))
    with ThreadPoolExecutor(16) as pool:  # a store answers one at a time in tens of milliseconds
        found = pool.map(lambda name: info_of(*resolve(name)), names)
        files = [{"path": name, "bytes": i.size, "modified_ns": i.mtime_ns} for name, i in zip(names, found, strict=True)]
    output = {name: value for name, value in asdict(config.output).items() if name != "overwrite"}
    shape = [files, asdict(config.dataset), output, config.engine.identity(), config.params().given()]
    return {"files": files, "digest": hashlib.sha256(canonical(shape)).hexdigest()}


def _ledger(index: Index) -> dict[str, int]:
    """By which an output tells how far the ledger was when it was put together."""
    return {"requests": len(index), "failed": int(index.failed.sum())}


def unchanged(config: Config, fs: pafs.FileSystem, root: str, pieces: list[Piece], index: Index) -> dict[str, Any] | None:
    """The manifest, where it stands for exactly this input and configuration and its files are all there."""
    try:
        with fs.open_input_stream(f"{root}/{MANIFEST}") as stream:
            manifest: dict[str, Any] = orjson.loads(stream.read())
        # An older one, where a run was killed between its last answer and the output.
        if manifest["ledger"] != _ledger(index):
            return None
        same = manifest["input"]["digest"] == _fingerprint(config, pieces)["digest"]
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
