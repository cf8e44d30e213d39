"""The money that an output's ledger records, by lane, engine, model and day. Costs are added, never computed here."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from pipeline.storage.ledger import distinct_records, is_batch_segment, list_segments, read_records
from pipeline.storage.ledger_index import split_keys

LIVE, BATCH = "live", "batch"
_COLUMNS = ["key", "done_at", "usage", "cost_usd", "model", "engine", "attempts", "superseded"]
_COUNTED = ("input", "cached_input", "output")  # token counts of `usage`
_MS_PER_DAY = 86_400_000


@dataclass(slots=True)
class Spent:
    """Sums over requests. `cost_usd` sums the known costs; each of the `unknown` requests may have cost more."""

    requests: int = 0
    attempts: int = 0  # with retries
    input: int = 0
    cached_input: int = 0
    output: int = 0
    cost_usd: float = 0.0
    unknown: int = 0  # requests whose cost, or a part of it, is unknown

    def add(self, other: Spent) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass(frozen=True, slots=True)
class Part:
    """The requests of an output that agree in these. None: not known."""

    lane: str | None  # LIVE or BATCH
    engine: str | None
    model: str | None
    day: str | None  # of the answer, in UTC, such as 2026-11-26


def read_spending(fs: pafs.FileSystem, root: str) -> dict[Part, Spent]:
    """The sums over all records of the ledger, also those of requests that the input no longer has.

    Raises `FileNotFoundError` if a run merges segments meanwhile: then the caller repeats the call.
    """
    names: dict[tuple[str, str | None, str | None], int] = {}  # lane, engine and model -> their number
    tables = [table for path in list_segments(fs, root) if (table := _read(fs, path, names)) is not None]
    if not tables:
        return {}
    columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    once = distinct_records(columns["key"], columns["done_at"], columns["superseded"])
    columns = {name: column[once] for name, column in columns.items()}
    day = columns["done_at"].astype(np.int64) // _MS_PER_DAY
    groups, which = np.unique(np.stack([columns["names"], day], axis=1), axis=0, return_inverse=True)
    sums = dict(_sums(columns, which.ravel(), len(groups)))
    known = list(names)
    found = {}
    for at, (number, when) in enumerate(groups.tolist()):
        lane, engine, model = known[number]
        found[Part(lane, engine, model, _iso(when))] = Spent(**{name: sum[at].item() for name, sum in sums.items()})
    return found


def _sums(columns: dict[str, Any], which: npt.NDArray[np.int64], groups: int) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    def total(values: Any) -> npt.NDArray[Any]:
        return np.bincount(which, values, groups)

    yield "requests", total(columns["superseded"] == 0).astype(np.int64)
    for name in ("attempts", *_COUNTED, "unknown"):
        yield name, total(columns[name]).astype(np.int64)
    yield "cost_usd", total(columns["cost_usd"])


def _read(fs: pafs.FileSystem, path: str, names: dict[Any, int]) -> dict[str, npt.NDArray[Any]] | None:
    """Arrays with a value for each record of a segment; None if the file is torn or another program's. Adds to `names`."""
    if (table := read_records(fs, path, _COLUMNS)) is None:
        return None
    rows, had = len(table), set(table.column_names)
    lane = BATCH if is_batch_segment(path) else LIVE
    texts = [table[name].to_pylist() if name in had else [None] * rows for name in ("engine", "model")]
    found: dict[str, npt.NDArray[Any]] = {
        "key": split_keys(table["key"].cast(pa.binary(32)))[0],
        "done_at": np.asarray(table["done_at"].cast(pa.int64())).astype(np.uint64),
        "names": np.array([names.setdefault((lane, *pair), len(names)) for pair in zip(*texts, strict=True)], np.int64),
        "attempts": _numbers(table["attempts"], 1) if "attempts" in had else np.ones(rows, np.int64),
    }
    for name in _COUNTED:
        found[name] = _numbers(pc.struct_field(table["usage"], name), 0)
    if "cost_usd" in had:
        found["cost_usd"] = np.asarray(pc.fill_null(table["cost_usd"], 0.0))
        found["unknown"] = np.asarray(pc.is_null(table["cost_usd"])).astype(np.int64)
        found["superseded"] = np.asarray(pc.fill_null(table["superseded"], False)).astype(np.uint64)
    else:  # older versions did not record costs
        found["cost_usd"], found["superseded"] = np.zeros(rows), np.zeros(rows, np.uint64)
        found["unknown"] = (found["input"] + found["output"] > 0).astype(np.int64)
    return found


def _numbers(column: pa.ChunkedArray, instead: int) -> npt.NDArray[np.int64]:
    return np.asarray(pc.fill_null(column, instead)).astype(np.int64)


def _iso(day: int) -> str:
    return (datetime.date(1970, 1, 1) + datetime.timedelta(days=day)).isoformat()


def of_manifest(manifest: dict[str, Any]) -> dict[Part, Spent]:
    """The sums in a manifest, for an output without its ledger."""
    tokens, engine = manifest["tokens"], manifest["engine"]
    spent = Spent(manifest["rows"]["requests"], manifest.get("requests_sent") or manifest["rows"]["requests"])
    spent.input, spent.cached_input, spent.output = (tokens.get(name) or 0 for name in _COUNTED)
    cost = manifest.get("cost_usd")
    spent.cost_usd = manifest.get("cost_known_usd", cost) or 0.0
    spent.unknown = manifest.get("cost_unknown_requests", 0 if cost is not None else spent.requests)
    day = datetime.datetime.fromtimestamp(manifest["finished_at"], datetime.UTC).date().isoformat()
    return {Part(None, engine["kind"], engine["model"], day): spent}


def grouped(parts: Sequence[tuple[str, Part, Spent]], by: Sequence[str]) -> dict[tuple[str | None, ...], Spent]:
    """The sums by some of run, lane, engine, model and day. `parts`: each with its run."""
    found: dict[tuple[str | None, ...], Spent] = {}
    for run, part, spent in parts:
        key = tuple(run if name == "run" else getattr(part, name) for name in by)
        found.setdefault(key, Spent()).add(spent)
    return found
