"""`eagleray status`: shows the state of a run by its output directory."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.live import Live
from rich.text import Text

from engines.errors import ConfigError
from engines.text import visible
from jobs.reading import Arguments, Output, ago, open_output, print_json, steady
from pipeline.executors.cost_budget import higher
from pipeline.storage.filesystem import exists, listing
from pipeline.storage.ledger_index import split_keys
from pipeline.storage.output_files import BATCHES, SEGMENTS, is_segment

OK, WITH_FAILURES, NOT_COMPLETE = 0, 3, 4
WATCH_S = 5.0
STYLES = {"running": "bold cyan", "stopped": "bold yellow", "empty": "bold yellow", "complete": "bold green"}


def main(argv: list[str]) -> int:
    """Shows the state. The exit status is 0 for complete, 3 for complete with failed rows, 4 for anything else."""
    what = "The state of a run: in progress, stopped or complete. Starts nothing and changes nothing."
    parser = Arguments("status", what, "out\ns3://bucket/out --json\nout --watch")
    parser.add_argument("--watch", action="store_true", help=f"show it again every {WATCH_S:.0f} s until the run ends")
    return parser.run(argv, _run)


def _run(args: argparse.Namespace, console: Console) -> int:
    summary = look(open_output(args.OUT))
    if args.watch and not args.json:
        with Live(_shown(summary), console=console, auto_refresh=False) as live:
            while summary["state"] == "running":
                time.sleep(WATCH_S)
                summary = look(open_output(args.OUT))
                live.update(_shown(summary), refresh=True)
    elif args.json:
        print_json(summary)
    else:
        console.print(_shown(summary), soft_wrap=True)
    if summary["state"] == "complete":
        return WITH_FAILURES if summary["rows"]["failed"] else OK
    return NOT_COMPLETE


# -- finding out ------------------------------------------------------------------------------------------------------


def look(out: Output) -> dict[str, Any]:
    """The state of the run, as `--json` prints it."""
    engine = out.config.get("engine", {})
    summary: dict[str, Any] = {"output": out.path, "engine": engine.get("kind"), "model": engine.get("model")}
    if (done := out.manifest) is not None:
        names = ("rows", "errors", "tokens", "cost_usd", "started_at", "finished_at")
        if not (done.keys() >= set(names) and done["rows"].keys() >= {"total", "done", "failed"}):
            raise ConfigError(f"{out.path}/manifest.json is not one of eagleray's")
        known = done.get("cost_known_usd", done["cost_usd"])  # older versions did not write it
        return summary | {
            "state": "complete",
            **{k: done[k] for k in names},
            "cost_known_usd": known,
            "last_activity_at": done["finished_at"],
        }
    summary |= _unfinished(out)
    if exists(out.fs, f"{out.root}/{BATCHES}"):
        from pipeline.executors.batch.store import BatchStore

        summary["batches"] = [
            {"id": batch.id or batch.name, "state": batch.state, "rows": batch.rows}
            for batch in steady(BatchStore, out.fs, out.root).open
        ]
    if not out.live:
        broke = out.run is not None and out.run["status"].get("broke") and out.config["run"]["budget_usd"]
        summary["command"] = out.command(budget_usd=higher(broke)) if broke else out.command()
    return summary


def _unfinished(out: Output) -> dict[str, Any]:
    run = out.run
    counts: dict[str, Any] = dict(run["status"]) if run else {}
    last = run["beat_at"] if run else None
    fed = counts.get("fed", False)  # until the input is read, the earlier answers that count are not known
    if not out.live and not (fed and run and run["ended"]):  # killed before its last state was written: the ledger is newer
        found = steady(_ledger, out, run["began_at"] if run and fed else 0.0)
        last = max(filter(None, (last, found.pop("last_at"))), default=None)
        counts |= found if fed else {**found, "answered": 0, "duplicates": 0}
    errors = {k: v for k, v in counts.get("errors", {}).items() if v}
    if counts.get("invalid"):
        errors["invalid_input"] = errors.get("invalid_input", 0) + counts["invalid"]
    done = counts.get("done", 0) + counts.get("answered", 0) + counts.get("duplicates", 0)
    failed = counts.get("failed", 0) + counts.get("invalid", 0)
    total = counts.get("read") if fed else None
    state = "running" if out.live else "stopped" if done or failed or run else "empty"
    summary = {
        "state": state, "phase": run and run["phase"], "why": None,
        "rows": {"total": total, "read": counts.get("read"), "done": done, "failed": failed},
        "errors": errors, "workers": counts.get("workers"), "trouble": counts.get("trouble") or None,
        "tokens": {"input": counts.get("input_tokens", 0), "output": counts.get("output_tokens", 0)},
        "cost_usd": counts.get("cost_usd", 0.0) if not counts.get("cost_unknown") else None,
        "cost_known_usd": counts.get("cost_usd", 0.0), "last_activity_at": last,
    }  # fmt: skip
    if run is not None:
        summary |= {name: run[name] for name in ("pid", "host", "started_at")}
        if not out.live:
            summary["why"] = run["ended"] or "killed, or its machine went away"
            return summary
        (began, *before), (now, *after) = run["recent"][0], run["recent"][-1]
        span = now - began
        rows, into, out_of = ((b - a) / span if span > 0 else None for a, b in zip(before, after, strict=True))
        summary["lately"] = {"seconds": span, "rows_per_s": rows, "input_tokens_per_s": into, "output_tokens_per_s": out_of}
        left = total - done - failed if total is not None else None
        summary["seconds_left"] = left / rows if left is not None and rows else None
    return summary


def _ledger(out: Output, since: float) -> dict[str, Any]:
    """Counts of the records in the segments since this time, in seconds of the epoch."""
    done, keys = [], []
    for info in listing(out.fs, f"{out.root}/{SEGMENTS}"):
        if is_segment(info.base_name) and (info.mtime_ns or 0) / 1e9 >= int(since):
            with out.fs.open_input_file(info.path) as file:
                names = ["key", "error.type", "done_at", "usage.input", "usage.output", "cost_usd", "superseded"]
                try:
                    table = pq.ParquetFile(file).read(columns=names)
                except pa.ArrowInvalid:  # a crash cut the file off: its rows will be sent again
                    continue
            if not {"key", "error", "done_at", "usage"} <= set(table.column_names):  # a file of another program
                continue
            if "cost_usd" not in table.column_names:  # older versions did not write the column
                unknown, no = pa.nulls(len(table), pa.float64()), pa.repeat(False, len(table))
                table = table.append_column("cost_usd", unknown).append_column("superseded", no)
            table = table.filter(pc.greater_equal(table["done_at"].cast(pa.int64()), int(since * 1000)))
            keys.append(split_keys(table["key"].cast(pa.binary(32)))[0])
            done.append(table.drop_columns(["key"]))
    if not done:
        return {"last_at": None}
    table = pa.concat_tables(done)
    at, key = np.asarray(table["done_at"].cast(pa.int64())), np.concatenate(keys)
    # A record can exist twice while its segment is merged.
    once = np.unique(np.stack([key, at.astype(np.uint64)], axis=1), axis=0, return_index=True)[1]
    table, key = table.take(pa.array(once)), key[once]
    tokens = {name: pc.sum(pc.struct_field(table["usage"], name)).as_py() or 0 for name in ("input", "output")}
    cost, unknown = pc.sum(table["cost_usd"]).as_py() or 0.0, table["cost_usd"].null_count
    # Of several records of a row, an answer counts before a failure. A superseded attempt does not count.
    key, table = key[~np.asarray(table["superseded"])], table.filter(pc.invert(table["superseded"]))
    order = np.argsort(np.asarray(pc.is_valid(pc.struct_field(table["error"], "type"))), kind="stable")
    table = table.take(pa.array(order[np.unique(key[order], return_index=True)[1]]))
    types = Counter(pc.struct_field(table["error"], "type").drop_null().to_pylist())
    return {
        "done": len(table) - types.total(), "failed": types.total(), "errors": dict(types),
        "input_tokens": tokens["input"], "output_tokens": tokens["output"], "cost_usd": cost, "cost_unknown": unknown,
        "last_at": float(at.max()) / 1000 if len(at) else None,
    }  # fmt: skip


# -- showing ----------------------------------------------------------------------------------------------------------


def _shown(summary: dict[str, Any]) -> Text:
    state, rows, tokens, now = summary["state"], summary["rows"], summary["tokens"], time.time()
    titles = {"running": f"running: {summary.get('phase') or 'starting'}", "stopped": "stopped, resumable",
              "empty": "nothing yet", "complete": "complete"}  # fmt: skip
    lines: list[tuple[str, str | None]] = [("why", summary.get("why"))]
    if summary.get("pid"):
        since = f" since {_clock(summary['started_at'])} ({ago(now - summary['started_at'])})" if state == "running" else ""
        lines.append(("run", f"process {summary['pid']} on {summary['host']}{since}"))
    lines.append(("engine", " ".join(dict.fromkeys(filter(None, (summary["engine"], summary["model"]))))))
    if state != "running" or rows["read"]:
        lines.append(("rows", _rows(summary)))
    if rows["failed"]:
        types = sorted(summary["errors"].items(), key=lambda item: -item[1])
        all = f"{rows['failed']:,}: " if len(types) != 1 else ""
        lines.append(("failed", all + ", ".join(f"{count:,} {name}" for name, count in types)))
    if (lately := summary.get("lately")) and lately["rows_per_s"] is not None and summary["phase"] == "asking":
        per_s = (lately[f"{name}_tokens_per_s"] for name in ("input", "output"))
        rate = "{:,.1f} rows/s, {:,.0f} tokens/s in, {:,.0f} out".format(lately["rows_per_s"], *per_s)
        lines.append(("lately", f"{rate} (over {ago(lately['seconds'])})"))
    if state == "running" and summary["phase"] == "asking" and not summary["workers"] and not summary.get("batches"):
        lines.append(("", "no replica is ready yet: they may be loading the model"))
    if (left := summary.get("seconds_left")) is not None:
        lines.append(("left", f"about {ago(left)}"))
    lines.append(("trouble", summary.get("trouble") and f"trying again: {summary['trouble']}"))
    if tokens["input"] or tokens["output"]:
        by = ", by this run" if state != "complete" and rows["total"] else ""
        lines.append(("tokens", f"{tokens['input']:,} in, {tokens['output']:,} out{by}"))
    if cost := summary["cost_usd"] or summary.get("cost_known_usd"):
        rest = ", and requests whose cost is not known" if summary["cost_usd"] is None else ""
        lines.append(("cost", (f"${cost:,.4f}" if cost < 1 else f"${cost:,.2f}") + rest))
    if batches := summary.get("batches"):
        count = sum(batch["rows"] for batch in batches)
        lines.append(("batches", f"{count:,} rows under way in {len(batches)}; eagleray batch status asks the provider"))
    if last := summary["last_activity_at"]:
        took = f", after {ago(last - summary['started_at'])}" if state == "complete" else ""
        lines.append(("last word" if not took else "finished", f"{_clock(last)}, {ago(now - last)} ago{took}"))
    if state == "complete" and rows["failed"]:
        lines.append(("see", f"eagleray errors {summary['output']}"))
    elif state in ("stopped", "empty"):
        lines.append(("go on", summary["command"] or "with the same command as before"))
    text = Text(f"{visible(summary['output'])}: ")
    text.append(titles[state] + (", with failed rows" if state == "complete" and rows["failed"] else ""), STYLES[state])
    for name, line in lines:
        if line:
            text.append(f"\n{name:<11}", "dim").append(visible(line))
    return text


def _rows(summary: dict[str, Any]) -> str:
    rows = summary["rows"]
    settled = rows["done"] + rows["failed"]
    if not rows.get("total"):
        read = f", {rows['read']:,} read so far" if rows.get("read") else ""
        return f"{rows['done']:,} answered{read}"
    share = f" ({100 * settled / rows['total']:.0f}% settled)" if settled < rows["total"] else ""
    return f"{rows['done']:,} of {rows['total']:,} answered{share}"


def _clock(when: float) -> str:
    same_day = time.strftime("%F", time.localtime(when)) == time.strftime("%F")
    return time.strftime("%H:%M:%S" if same_day else "%Y-%m-%d %H:%M", time.localtime(when))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
