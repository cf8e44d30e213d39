"""The tables of docs/scale.md, from `bench/costs.json`. It imports nothing of what it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COSTS = Path(__file__).parent / "costs.json"

# A part of a row's way -> its processes, and whether they are many (each on its own cores) or one.
PARTS = {
    "read_parse_us": ("read a line and parse its JSON", "read tasks", "many"),
    "read_key_us": ("parse the row, compute its key", "read tasks", "many"),
    "read_request_us": ("make the request", "read tasks", "many"),
    "dispatch_us": ("queue, lease, count (without Ray's part of the calls)", "dispatcher", "one"),
    "ask_us": ("ask: a replica's slots and its records, with engine=echo", "replicas", "many"),
    "segment_us": ("write the answer into a segment", "replicas", "many"),
    "merge_us": ("merge segments, each time", "replicas", "many"),
    "index_read_us": ("read the ledger into the index", "a task on the driver's node", "one"),
    "lookup_us": ("find the key in the index", "the index actor", "one"),
    "finalize_us": ("read the row again, find its answer, write the part", "finalize tasks", "many"),
    "driver_us": ("add up the results, write the manifest", "driver", "one"),
    "skip_us": ("in a later run: read the row, find that it is done", "read tasks", "many"),
}
BYTES = {
    "input_bytes": "the row in the input of this measurement",
    "segment_bytes": "its answer in the ledger, on disk",
    "part_bytes": "the row in the output, on disk",
    "index_bytes": "the index, in shared memory of the driver's node",
    "index_peak_bytes": "the task that reads the index, at most",
    "dedup_bytes": "the dispatcher's set of keys",
    "result_bytes": "what finalize sends to the driver, which frees it again",
}
# Kinds of processes of which a run has one. All others are as many as there are nodes or replicas. The time of ONCE is the
# same for any number of rows.
ONE = ("driver", "dispatcher", "index", "Ray's server")
ONCE = ("start of processes",)
CORES = (2, 64)
# A run on GPUs: this many, each with so many answers a second, in so many replicas.
GPUS, ANSWERS_PER_S, GPUS_PER_REPLICA = 1000, 20, 1
FLUSHES = (2, 10)
SIZES = (10_000_000, 100_000_000, 1_000_000_000)
GIB = 2**30


def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(COSTS.read_text())
    return found


def _about(one: dict[str, Any]) -> str:
    return f"commit {one['commit']}, {one['date']}, {one['cpus']} cores"


def costs() -> str:
    """Each part of a row's way, alone in one process."""
    found = results()["costs"]
    parts = found["parts"]
    lines = ["| a row's | processes | how many | µs of processor time |", "|---|---|---|---|"]
    lines += [f"| {what} | {where} | {many} | {parts[name]:.1f} |" for name, (what, where, many) in PARTS.items()]
    lines += ["", "| bytes of a row | |", "|---|---|"]
    lines += [f"| {what} | {parts[name]:.0f} |" for name, what in BYTES.items()]
    return "\n".join([*lines, "", f"Measured: {_about(found)}, {found['rows']:,} rows, `python -m bench.costs`."])


def cores() -> str:
    """The processor time of a whole run by kind of process, and the rates that it allows."""
    found = results()["run"]
    us = {kind: value for kind, value in found["cpu_us_per_row"].items() if value}
    total = sum(us.values())
    lines = ["| processes | how many | seconds | share | µs a row |", "|---|---|---|---|---|"]
    for kind, value in us.items():
        many = "one" if kind in ONE else "many, once each" if kind in ONCE else "many"
        lines.append(f"| {kind} | {many} | {found['cpu_s'][kind]:,.0f} | {value / total:.0%} | {value:.1f} |")
    lines += [f"| all | | {sum(found['cpu_s'].values()):,.0f} | | {total:.1f} |", ""]
    lines += [
        "| cores | rows/s if all cores work | rows/s of the busiest single process | so, rows/s |",
        "|---|---|---|---|",
    ]
    serial = 1e6 / max(value for kind, value in us.items() if kind in ONE)
    each = sum(value for kind, value in us.items() if kind not in ONCE)
    for count in CORES:
        even = count * 1e6 / each
        lines.append(f"| {count} | {even:,.0f} | {serial:,.0f} | {min(even, serial):,.0f} |")
    run = f"{found['rows']:,} rows, {found['files']:,} files, {found['nodes']} nodes, {found['replicas']} replicas"
    measured = f"Measured: {_about(found)}, {run}: {found['rows_per_s']:,} rows/s end to end on {found['cpus']} cores."
    computed = "The second table is computed: without the start, and as if all processes shared the cores evenly."
    return "\n".join([*lines, "", f"{measured} {computed}"])


def sizes() -> str:
    """What runs of several sizes take, on many GPUs."""
    found, run = results(), results()["run"]
    parts, us = found["costs"]["parts"], run["cpu_us_per_row"]
    read = sum(parts[name] for name in ("read_parse_us", "read_key_us", "read_request_us"))
    rate = GPUS * ANSWERS_PER_S

    def hours(each: float) -> list[str]:
        return [_time(rows * each * 1e-6) for rows in SIZES]

    def gib(each: float) -> list[str]:
        return [f"{rows * each / GIB:,.1f} GiB" for rows in SIZES]

    lines = [f"| rows | {' | '.join(f'{rows:,}' for rows in SIZES)} |", f"|---|{'---|' * len(SIZES)}"]
    rows = {
        f"answers, {GPUS:,} GPUs × {ANSWERS_PER_S}/s": [_time(size / rate) for size in SIZES],
        "reading, all cores together": hours(read),
        "the dispatcher (with its start)": hours(us["dispatcher"]),
        "reading the ledger (one task)": hours(parts["index_read_us"]),
        "finding keys (one actor, with its start)": hours(max(parts["lookup_us"], us.get("index", 0.0))),
        "finalize, all cores together": hours(parts["finalize_us"]),
        "the driver, at the end": hours(parts["driver_us"]),
        "memory of the index": gib(parts["index_bytes"]),
        "… of the task that reads it": gib(parts["index_peak_bytes"]),
        "memory of the dispatcher's keys": gib(parts["dedup_bytes"]),
        "ledger on disk": gib(parts["segment_bytes"]),
    }
    return "\n".join([*lines, *(f"| {what} | {' | '.join(values)} |" for what, values in rows.items())])


def store() -> str:
    """The requests to an object store, and their price."""
    found = results()["costs"]
    taken, replicas = found["store"], GPUS // GPUS_PER_REPLICA
    names = {
        "segment": "a segment: written, merged with others, removed",
        "index": "a merged segment, read for the index",
        "answers": "the answers of one part in one segment",
        "part": "a part of the output",
        "input": "an input file of one split, listed and read",
    }
    lines = ["| for | requests | US$ for a million |", "|---|---|---|"]
    for name, what in names.items():
        requests = ", ".join(f"{n:g} {method}" for method, n in taken[name]["requests"].items())
        lines.append(f"| {what} | {requests} | {taken[name]['usd'] * 1e6:,.2f} |")
    lines += ["", f"| {replicas:,} replicas, `run.flush_s` | segments/s | US$ an hour |", "|---|---|---|"]
    for every in FLUSHES:
        lines.append(f"| {every} | {replicas / every:,.0f} | {replicas / every * 3600 * taken['segment']['usd']:,.2f} |")
    return "\n".join(
        [*lines, "", f"Measured: {_about(found)}, S3 on loopback. Prices: S3 Standard, us-east-1, November 2026."]
    )


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


TABLES = {"costs": costs, "cores": cores, "sizes": sizes, "store": store}
