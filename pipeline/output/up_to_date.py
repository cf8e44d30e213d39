"""Finds out if an output is up to date: complete, for this input and configuration, and as the run has written it.

`finished` compares stamps of files and reads no row. `unchanged` is for a run that has read the input and has sent nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import orjson
import pyarrow.fs as pafs

from engines.identity import identity
from engines.tasks import CHAT
from engines.url_secrets import without_url_secrets
from pipeline.config import Config
from pipeline.dataset.keys import RequestHasher
from pipeline.dataset.reader import ReadSplit
from pipeline.storage.exact_json import canonical
from pipeline.storage.filesystem import FileStamp, exists, info_of, listing
from pipeline.storage.ledger import KEY_VERSION, list_segments
from pipeline.storage.ledger_index import Index
from pipeline.storage.output_files import DATA, ERRORS, MANIFEST, REPORT, SEGMENTS


def input_entry(config: Config, splits: list[ReadSplit]) -> dict[str, Any]:
    """The manifest's entry of the input: the files as they were before they were read, and a digest of them and of every
    setting that changes the output."""
    stamps = _input_stamps(splits)
    files = [{"path": name, "bytes": stamp.size, "modified_ns": stamp.modified_ns} for name, stamp in stamps.items()]
    later = ("overwrite", "table", "embedding")
    output = {name: value for name, value in asdict(config.output).items() if name not in later}
    # Keys that earlier versions did not have count only if they are set.
    output |= {"table": config.output.table} if config.output.table is not None else {}
    output |= {"embedding": config.output.embedding} if config.output.embedding != "float32" else {}
    output |= {"task": config.task} if config.task != CHAT else {}
    shape = [files, asdict(config.dataset), output, identity(config.engine).values, config.params().given()]
    entry: dict[str, Any] = {"files": files, "digest": _digest(shape)}
    if config.dataset.sample is not None:
        entry["sample"] = {
            "rows": config.dataset.sample,
            "seed": config.dataset.sample_seed,
            "of_first": config.dataset.limit,
        }
    return entry


def ledger_entry(index: Index) -> dict[str, int]:
    """The manifest's entry of the ledger: its size when the output was put together."""
    return {"requests": len(index), "failed": int(np.count_nonzero(index.failed))}


def stamps_entry(
    fs: pafs.FileSystem,
    root: str,
    hasher: RequestHasher,
    splits: list[ReadSplit],
    files: Iterable[str],
    segments: Iterable[str],
) -> dict[str, Any]:
    """The manifest's stamps of what a run over this output depends on. `files`: the parts, as paths below the output.
    `segments`: the paths of the ledger's segments. A stamp is None if it cannot tell a changed file."""
    inputs = _input_stamps(splits)
    told = all(stamp.size is not None and stamp.modified_ns is not None for stamp in inputs.values())
    return {
        "eagleray": _eagleray(),
        "keys": f"{next(iter(KEY_VERSION.values())).decode()}:{hasher.shared_digest}",
        "input": _digest([[name, *stamp] for name, stamp in inputs.items()]) if told else None,
        "ledger": _stamp_of(fs, root, (SEGMENTS,), {f"{SEGMENTS}/{path.rpartition('/')[2]}" for path in segments}),
        "output": _stamp_of(fs, root, (DATA, ERRORS), {*files, REPORT}),
    }


def finished(
    config: Config, fs: pafs.FileSystem, root: str, splits: list[ReadSplit], hasher: RequestHasher
) -> dict[str, Any] | None:
    """The manifest if a run would send nothing and change nothing, as far as the stamps of all files tell; else None.

    None as well if rows name local files, whose content only a reader of the rows knows, or if failed rows are to be sent.
    """
    if (manifest := _read(fs, root)) is None:
        return None
    try:
        stamps, ledger = manifest["stamps"], manifest["ledger"]
        if manifest["input"]["contents"] or (ledger["failed"] and config.run.retry_failed):
            return None
        if None in stamps.values() or manifest["input"]["digest"] != input_entry(config, splits)["digest"]:
            return None
        now = stamps_entry(fs, root, hasher, splits, manifest["files"], list_segments(fs, root))
        return manifest if now == stamps else None
    except (KeyError, TypeError, AttributeError):  # of an earlier version
        return None


def unchanged(
    config: Config, fs: pafs.FileSystem, root: str, splits: list[ReadSplit], index: Index, contents: int | None = None
) -> dict[str, Any] | None:
    """The manifest, if it is for exactly this input and configuration and all its files are as they were written; else
    None. `contents`: the sum of `SplitSummary.contents`, if the input was read."""
    if (manifest := _read(fs, root)) is None:
        return None
    try:
        # They differ if a run was killed after its last answer and before it wrote its output.
        if manifest["ledger"] != ledger_entry(index):
            return None
        same = manifest["input"]["digest"] == input_entry(config, splits)["digest"]
        same = same and contents in (None, manifest["input"].get("contents", 0))
        return manifest if same and _is_whole(fs, root, manifest) else None
    except (KeyError, TypeError, AttributeError):
        return None


def _read(fs: pafs.FileSystem, root: str) -> dict[str, Any] | None:
    try:
        with fs.open_input_stream(f"{root}/{MANIFEST}") as stream:
            found = orjson.loads(stream.read())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _is_whole(fs: pafs.FileSystem, root: str, manifest: dict[str, Any]) -> bool:
    """True if the files of an output are there, and have the stamp of the manifest if it has one."""
    if (stamp := manifest.get("stamps", {}).get("output")) is not None:
        return bool(stamp == _stamp_of(fs, root, (DATA, ERRORS), {*manifest["files"], REPORT}))
    there = {f"{folder}/{info.base_name}" for folder in (DATA, ERRORS) for info in listing(fs, f"{root}/{folder}")}
    return there.issuperset(manifest["files"]) and exists(fs, f"{root}/{REPORT}")


def _stamp_of(fs: pafs.FileSystem, root: str, folders: Iterable[str], names: Collection[str]) -> str | None:
    """A digest of the sizes and times of these files below the output; None if one is missing or has no time."""
    infos = {f"{folder}/{info.base_name}": info for folder in folders for info in listing(fs, f"{root}/{folder}")}
    if REPORT in names:
        infos[REPORT] = info_of(fs, f"{root}/{REPORT}")
    if not infos.keys() >= set(names):
        return None
    stamps = [[name, infos[name].size, infos[name].mtime_ns] for name in sorted(names)]
    return None if any(None in stamp for stamp in stamps) else _digest(stamps)


def _input_stamps(splits: list[ReadSplit]) -> dict[str, FileStamp]:
    return {without_url_secrets(split.file_split.file): split.file_split.stamp for split in splits}


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def _eagleray() -> str:
    try:
        return version("eagleray")
    except PackageNotFoundError:
        return ""
