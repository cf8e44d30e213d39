"""`eagleray status`: shows the state of a run by its output directory."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.live import Live
from rich.text import Text

from engines.errors import ConfigError, ErrorCode
from engines.text import counted, visible
from jobs.reading import Arguments, Output, ago, open_output, print_json, steady
from pipeline.executors.cost_budget import higher
from pipeline.monitor.run_state import ASKING
from pipeline.monitor.status import ReplicaHeartbeat, ReplicaProblem, RowCounts, RunStatus, row_cells
from pipeline.output.summary import row_counts
from pipeline.storage.filesystem import exists, listing
from pipeline.storage.ledger import distinct_records, read_records
from pipeline.storage.ledger_index import split_keys
from pipeline.storage.output_files import BATCHES, SEGMENTS, is_segment

OK, WITH_FAILURES, NOT_COMPLETE = 0, 3, 4
WATCH_S = 5.0
# The values of `scope`: the runs that a sum covers.
THIS_RUN, ALL_RUNS = "this run", "all runs"
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


# -- the state --------------------------------------------------------------------------------------------------------


def look(out: Output) -> dict[str, Any]:
    """The state of the run, as `--json` prints it. `scope` says which runs `tokens`, costs and `requests_sent` are from."""
    engine = out.config.get("engine", {})
    summary: dict[str, Any] = {"output": out.path, "engine": engine.get("kind"), "model": engine.get("model")}
    if out.manifest is not None:
        return summary | _complete(out.path, out.manifest)
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


def _complete(path: str, manifest: dict[str, Any]) -> dict[str, Any]:
    names = ("rows", "errors", "tokens", "cost_usd", "started_at", "finished_at")
    if not (manifest.keys() >= set(names) and manifest["rows"].keys() >= {"total", "done", "failed"}):
        raise ConfigError(f"{path}/manifest.json was not written by Eagleray", code=ErrorCode.OUTPUT_NOT_OURS)
    rows = row_counts(manifest["rows"])
    return {
        "state": "complete",
        **{name: manifest[name] for name in names},
        "rows": manifest["rows"] | {"open": rows.open, "truncated": rows.truncated},
        "scope": ALL_RUNS,
        "replica_problems": manifest.get("replica_problems", []),
        "requests_sent": manifest.get("requests_sent"),  # older versions did not write these two
        "cost_known_usd": manifest.get("cost_known_usd", manifest["cost_usd"]),
        "last_activity_at": manifest["finished_at"],
    }


def _unfinished(out: Output) -> dict[str, Any]:
    run, scope = out.run, THIS_RUN
    status = _status_of(run) if run else RunStatus()
    at_least = status.duplicates > 0 and run is not None and "rows_done" not in run["status"]  # of an older version
    sums = status.plus(RunStatus(**_known(run.get("earlier", {})))) if run else status
    last = run["beat_at"] if run else None
    if not out.live and not (status.fed and run and run["ended"]):  # killed: the ledger is newer than the last report
        known = status.fed and run is not None  # else the number of rows that were done before is unknown
        scope = THIS_RUN if known else ALL_RUNS
        since = (run["started_at"], run["began_at"]) if run and known else (0.0, 0.0)
        found, at = steady(_ledger, out, *since)
        last = max(filter(None, (last, at)), default=None)
        at_least = status.duplicates > 0 or not known
        status, sums = _newer(status if known else RunStatus(invalid=status.invalid, read=status.read), found), found
    rows = status.rows
    state = "running" if out.live else "stopped" if rows.done or rows.failed or run else "empty"
    total = status.read if status.fed else None
    errors = {type: count for type, count in status.errors.items() if count}
    if rows.invalid:
        errors["invalid_input"] = errors.get("invalid_input", 0) + rows.invalid
    summary = {
        "state": state, "phase": run and run["phase"], "why": None,
        "rows": {"total": total, "read": status.read, "done": rows.done, "failed": rows.failed,
                 "open": rows.open if total is not None else None, "truncated": rows.truncated, "at_least": at_least},
        "errors": errors, "in_flight": status.in_flight, "workers": status.workers, "trouble": status.trouble or None,
        "replica_problems": run.get("replica_problems", []) if run else [],
        "scope": scope, "requests_sent": sums.sent,
        "tokens": {"input": sums.input_tokens, "output": sums.output_tokens},
        "cost_usd": None if sums.cost_unknown else sums.cost_usd, "cost_known_usd": sums.cost_usd, "last_activity_at": last,
    }  # fmt: skip
    if run is not None:
        summary |= {name: run[name] for name in ("pid", "host", "started_at")}
        if not out.live:
            summary["why"] = run["ended"] or "it was killed, or its machine was lost"
            return summary
        summary |= _rates(run, rows.open if total is not None else None)
    return summary


def _rates(run: dict[str, Any], open: int | None) -> dict[str, Any]:
    """The rates of the last minute, and the time until `open` rows have a result."""
    (began, *before), (now, *after) = run["recent"][0], run["recent"][-1]
    span = now - began
    rows, into, out_of = ((b - a) / span if span > 0 else None for a, b in zip(before, after, strict=True))
    lately = {"seconds": span, "rows_per_s": rows, "input_tokens_per_s": into, "output_tokens_per_s": out_of}
    return {"lately": lately, "seconds_left": open / rows if open is not None and rows else None}


def _known(values: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(RunStatus)}
    return {name: value for name, value in values.items() if name in names}


def _status_of(run: dict[str, Any]) -> RunStatus:
    values = _known(run["status"])
    if "rows_done" not in run["status"]:  # an older version, which counted requests only
        values |= {"rows_done": values.get("done", 0), "rows_failed": values.get("failed", 0)}
    replicas = {name: ReplicaHeartbeat(**heartbeat) for name, heartbeat in values.get("replicas", {}).items()}
    return RunStatus(**(values | {"errors": Counter(values.get("errors", {})), "replicas": replicas}))


def _newer(status: RunStatus, found: RunStatus) -> RunStatus:
    """The status of a killed run with the results that only the ledger has. Each serves at least one row."""
    more_done, more_failed = max(0, found.rows_done - status.done), max(0, found.rows_failed - status.failed)
    truncated = max(status.rows_truncated, found.rows_truncated)
    errors = status.errors if status.duplicates else found.errors
    return dataclasses.replace(
        status, rows_done=status.rows_done + more_done, rows_failed=status.rows_failed + more_failed,
        rows_truncated=truncated, errors=errors, replicas={}, submitted=0, workers=0,
    )  # fmt: skip


def _ledger(out: Output, started: float, began: float) -> tuple[RunStatus, float | None]:
    """The sums of the records since `started`, the requests that got a result since `began`, and the time of the last
    record. Times are seconds since the epoch."""
    tables = []
    for info in listing(out.fs, f"{out.root}/{SEGMENTS}"):
        if is_segment(info.base_name) and (info.mtime_ns or 0) / 1e9 >= int(started):
            if (table := read_records(out.fs, info.path, _LEDGER_COLUMNS)) is None:
                continue
            if "cost_usd" not in table.column_names:  # older versions did not write these columns
                unknown, no = pa.nulls(len(table), pa.float64()), pa.repeat(False, len(table))
                table = table.append_column("cost_usd", unknown).append_column("superseded", no)
            tables.append(table.filter(pc.greater_equal(table["done_at"].cast(pa.int64()), int(started * 1000))))
    if not tables:
        return RunStatus(), None
    table = pa.concat_tables(tables, promote_options="default")
    at, key = np.asarray(table["done_at"].cast(pa.int64())), split_keys(table["key"].cast(pa.binary(32)))[0]
    once = distinct_records(key, at, np.asarray(table["superseded"]))
    table, key, at = table.take(pa.array(once)), key[once], at[once]
    status = RunStatus(
        sent=pc.sum(table["attempts"]).as_py() or 0,
        input_tokens=pc.sum(pc.struct_field(table["usage"], "input")).as_py() or 0,
        output_tokens=pc.sum(pc.struct_field(table["usage"], "output")).as_py() or 0,
        cost_usd=pc.sum(table["cost_usd"]).as_py() or 0.0,
        cost_unknown=table["cost_usd"].null_count,
    )
    # Of several records of a request, an answer counts before a failure. A superseded try is not a result.
    results = ~np.asarray(table["superseded"]) & (at >= int(began * 1000))
    key, table = key[results], table.filter(pa.array(results))
    failed = pc.is_valid(pc.struct_field(table["error"], "type"))
    order = np.argsort(np.asarray(failed), kind="stable")
    table = table.take(pa.array(order[np.unique(key[order], return_index=True)[1]]))
    status.errors = Counter(pc.struct_field(table["error"], "type").drop_null().to_pylist())
    status.rows_failed = status.errors.total()
    status.rows_done = len(table) - status.rows_failed
    status.rows_truncated = pc.sum(pc.equal(table["finish_reason"], "length")).as_py() or 0
    return status, float(at.max()) / 1000 if len(at) else None


_LEDGER_COLUMNS = [
    "key", "error.type", "done_at", "usage.input", "usage.output", "cost_usd", "superseded", "attempts", "finish_reason",
]  # fmt: skip


# -- showing ----------------------------------------------------------------------------------------------------------


def _shown(summary: dict[str, Any]) -> Text:
    state, rows, now = summary["state"], summary["rows"], time.time()
    titles = {"running": f"running: {summary.get('phase') or 'starting'}", "stopped": "stopped, can be continued",
              "empty": "no results yet", "complete": "complete"}  # fmt: skip
    title, style = titles[state], STYLES[state]
    if state == "complete" and rows["failed"]:
        title += ", with failed rows"
    if state == "complete" and not rows["total"]:
        title, style = "complete: the input has no rows", STYLES["empty"]
    lines: list[tuple[str, str | None]] = [("why", summary.get("why"))]
    if summary.get("pid"):
        since = f" since {_clock(summary['started_at'])} ({ago(now - summary['started_at'])})" if state == "running" else ""
        lines.append(("run", f"process {summary['pid']} on {summary['host']}{since}"))
    lines.append(("engine", " ".join(dict.fromkeys(filter(None, (summary["engine"], summary["model"]))))))
    if state != "running" or rows["read"]:
        lines.append(("rows", rows_text(summary)))
    if rows["failed"]:
        types = sorted(summary["errors"].items(), key=lambda item: -item[1])
        rest = rows["failed"] - sum(summary["errors"].values())
        types += [("others, in earlier runs", rest)] if rest > 0 else []
        all = f"{rows['failed']:,}: " if len(types) != 1 else ""
        lines.append(("failed", all + ", ".join(f"{count:,} {name}" for name, count in types)))
    lines += [("replicas", f"{ReplicaProblem(**problem).sentence()}") for problem in summary["replica_problems"]]
    lines += [*_speed(summary), *_sums(summary)]
    if batches := summary.get("batches"):
        count = sum(batch["rows"] for batch in batches)
        where = f"{counted(count, 'request')} in {counted(len(batches), 'batch', 'batches')}"
        lines.append(("batches", f"{where}; eagleray batch status asks the provider"))
    if state == "complete":
        took = ago(summary["finished_at"] - summary["started_at"])
        lines.append(("finished", f"{_clock(summary['finished_at'])}, {ago(now - summary['finished_at'])} ago"))
        lines.append(("last run", f"took {took}"))
    elif last := summary["last_activity_at"]:
        lines.append(("last report", f"{_clock(last)}, {ago(now - last)} ago"))
    if state == "complete" and rows["failed"]:
        lines.append(("see", shlex.join(["eagleray", "errors", summary["output"]])))
    elif state in ("stopped", "empty"):
        lines.append(("continue", summary["command"] or "with the same command as before"))
    text = Text(f"{visible(summary['output'])}: ")
    text.append(title, style)
    for name, line in lines:
        if line:
            text.append(f"\n{name:<13}", "dim").append(visible(line))
    return text


def rows_text(summary: dict[str, Any]) -> str:
    """The counts of the rows in one line."""
    rows = summary["rows"]
    if rows.get("total") is None:
        read = f", {rows['read']:,} read so far" if rows.get("read") else ""
        least = "at least " if rows["at_least"] else ""
        return f"{least}{counted(rows['done'], 'row')} done, {rows['failed']:,} failed{read}"
    counts = RowCounts(rows["total"], rows["done"], rows["failed"], rows["open"], rows["truncated"], 0)
    share = f" ({100 * (counts.done + counts.failed) / counts.read:.0f}%)" if counts.open else ""
    return ("at least " if rows.get("at_least") else "") + ", ".join(row_cells(counts)) + share


def _speed(summary: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """The lines about a run that sends requests."""
    if summary["state"] == "running" and summary["phase"] == ASKING:
        lately = summary["lately"]
        if lately["rows_per_s"] is not None:
            per_s = (lately[f"{name}_tokens_per_s"] for name in ("input", "output"))
            rate = "{:,.1f} rows/s, {:,.0f} tokens/s in, {:,.0f} out".format(lately["rows_per_s"], *per_s)
            yield "rate", f"{rate} (over {ago(lately['seconds'])})"
        yield "in flight", counted(summary["in_flight"], "request") if summary["in_flight"] else None
        if not summary["workers"] and not summary.get("batches"):
            yield "", "no replica is ready yet: they may be loading the model"
        if (left := summary.get("seconds_left")) is not None:
            yield "left", f"about {ago(left)}"
    yield "trouble", summary.get("trouble") and f"retrying: {summary['trouble']}"


def _sums(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Requests, tokens and cost. Each line names the runs that it sums."""
    tokens, scope = summary["tokens"], f" ({summary['scope']})"
    if summary["requests_sent"]:
        yield "sent", f"{counted(summary['requests_sent'], 'request')}{scope}"
    if tokens["input"] or tokens["output"]:
        yield "tokens", f"{tokens['input']:,} in, {tokens['output']:,} out{scope}"
    if cost := summary["cost_usd"] or summary["cost_known_usd"]:
        rest = " and requests of unknown cost" if summary["cost_usd"] is None else ""
        yield "cost", (f"${cost:,.4f}" if cost < 1 else f"${cost:,.2f}") + rest + scope


def _clock(when: float) -> str:
    same_day = time.strftime("%F", time.localtime(when)) == time.strftime("%F")
    return time.strftime("%H:%M:%S" if same_day else "%Y-%m-%d %H:%M", time.localtime(when))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
