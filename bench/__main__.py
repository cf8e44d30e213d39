"""`make bench`: every figure the project claims, measured here and now, as JSON and as a Markdown table.

    python -m bench [--out bench/results] [--only llamacpp,transformers,vllm,pipeline,remote,batch]
                    [--only remote.faults] [--only pipeline.cold]
                    [--only scale]      (or scale.ledger) ten million rows, fifty nodes: an hour, only when asked for
                    [--only rooms]      only counts the lines of the core
                    [--sizes 100000,1000000]

The GSM8K questions are taken from $EAGLERAY_GSM8K or ../shared/data/gsm8k_test.jsonl, where they are; a small set of
the bench's own otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from bench import rooms


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--only", default="llamacpp,transformers,vllm,pipeline,remote,batch")
    parser.add_argument("--sizes", default="100000,1000000")
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
    path = args.out.with_suffix(".json")
    if path.exists():  # what is not measured this time stays
        before = json.loads(path.read_text())
        results = {**before, **results, "date": before["date"] if args.only == "rooms" else results["date"]}
    if "llamacpp" in args.only:
        from bench import llamacpp

        results["llamacpp"] = llamacpp.run(gsm8k(), rows=64, tokens=128, repeats=3)
    if "transformers" in args.only:
        from bench import transformers

        results["transformers"] = transformers.run(gsm8k(), rows=256, tokens=64, repeats=3)
    if "pipeline" in args.only:
        from bench import pipeline

        step = args.only.partition("pipeline.")[2].partition(",")[0]
        sizes = [int(size) for size in args.sizes.split(",")]
        results["pipeline"] = {**results.get("pipeline", {}), **pipeline.run(sizes, step)}
    if found := {"scale", "scale.ledger"} & set(args.only.split(",")):
        from bench import scale

        whole = scale.run() if "scale" in found else {**results["scale"], "ledger": scale.ledger()}
        results["scale"] = whole
    if "remote" in args.only:
        from bench import remote

        step = args.only.partition("remote.")[2].partition(",")[0]
        results["remote"] = {**results.get("remote", {}), **remote.run(step)}
    if "vllm" in args.only:
        from bench import vllm

        step = args.only.partition("vllm.")[2].partition(",")[0]
        results["vllm"] = {**results.get("vllm", {}), **vllm.run(gsm8k(), step)}
    if "batch" in args.only:
        from bench import batch

        results["batch"] = batch.run()
    results["rooms"] = rooms.run()
    path.write_text(json.dumps(results, indent=2) + "\n")
    table = markdown(results)
    args.out.with_suffix(".md").write_text(table)
    print(table)


def gsm8k() -> Path | None:
    path = Path(os.environ.get("EAGLERAY_GSM8K", "../shared/data/gsm8k_test.jsonl"))
    return path if path.exists() else None


def machine() -> dict[str, Any]:
    return {"cpus": os.cpu_count(), "python": platform.python_version(), "processor": platform.machine()}


def markdown(results: dict[str, Any]) -> str:
    """The claims, their figures and their goals."""
    rows: list[tuple[str, str, str]] = []
    if found := results.get("llamacpp"):
        rows += [
            ("llama.cpp: tokens/s, this engine", f"{found['engine']:.0f}", ""),
            ("… against one `create_chat_completion` at a time", f"{found['engine_over_sequential']:.2f}", "≥ 1.9"),
            ("… against a bare low-level batch loop", f"{found['engine_over_bare']:.2f}", "≥ 0.95"),
        ]
    if found := results.get("transformers"):
        rows.append(("transformers: tokens/s, this engine", f"{found['tokens_per_s']:.0f}", ""))
        rows.append(("… against a hand-tuned `generate` loop on sorted batches", f"{found['ratio']:.3f}", "≥ 0.9"))
    if found := results.get("pipeline"):
        scale = found["scale"]
        for size in (key for key in scale if key.isdigit()):
            figures = scale[size]
            rows.append((f"echo, {int(size):,} rows: rows/s end to end", f"{figures['rows_per_s']:,}", ""))
            rows.append(("… while asking", f"{figures['asking_rows_per_s']:,}", "≥ 10,000"))
            memory = ", ".join(f"{kind} {mib}" for kind, mib in sorted(figures["peak_mib"].items()))
            rows.append(("… peak MiB", memory, "flat"))
        rows += [
            ("echo: rows/s at the largest size against the smallest", f"{scale['ratio']:.2f}", "≥ 0.9"),
            ("echo: resume over the largest, finished run, s", f"{scale['resume_s']}", "< 30"),
            ("stragglers: share of the possible rate", f"{found['stragglers']['ratio']:.3f}", "≥ 0.95"),
            ("`eagleray --help`, s", f"{found['cold_start']['help_s']}", "< 0.5"),
            ("ten echo rows end to end, s", f"{found['cold_start']['ten_rows_s']}", "< 10"),
        ]
        if cpu := found["cold_start"].get("ten_rows_cpu_s"):
            rows.append(("… processor time of all its processes, s", f"{cpu}", ""))
    if found := results.get("scale"):
        what = f"{found['rows']:,} rows, {found['files']:,} files, {found['nodes']} raylets, {found['replicas']} replicas"
        memory = ", ".join(f"{kind} {mib}" for kind, mib in found["peak_mib"].items())
        rows += [
            (f"echo, {what}: rows/s end to end", f"{found['rows_per_s']:,}", ""),
            ("… while asking", f"{found['asking_rows_per_s']:,}", ""),
            ("… peak MiB", memory, "flat"),
            ("… the driver's MiB over time", " ".join(str(mib) for _, mib in found["driver_mib_over_time"]), "flat"),
            ("… share of the time that putting the output together took", f"{found['finalize_share']:.0%}", ""),
            ("… nodes that did it", f"{len(found['finalize_nodes'])}", f"{found['cpu_nodes']}"),
        ]
        if "resume_s" in found:
            rows.append(("… resume over it, finished, s", f"{found['resume_s']}", ""))
        for one in found.get("ledger", []):
            rows.append((f"ledger of {one['rows']:,} rows: index, bytes a row", f"{one['bytes_per_row']}", "flat"))
            rows.append(("… at most while it is made", f"{one['peak_bytes_per_row']}", ""))
            rows.append(("… processor time to read it, µs a row", f"{one['cpu_us_per_row']}", "flat"))
    if found := results.get("remote"):
        fast, slow, faults = found["no_latency"], found["latency"], found["faults"]
        rows += [
            ("remote, 64 in flight, no latency: requests/s, engine alone", f"{fast['req_per_s']:,}", ""),
            ("… against a bare aiohttp loop", f"{fast['ratio']:.2f}", "≥ 0.5"),
            ("… against Oumi 0.9's best (3,511)", f"{fast['against_oumi']:.2f}", "≥ 2"),
            ("remote, the whole command, one worker: rows/s", f"{found['whole']['rows_per_s']:,}", "≥ 3,000"),
            ("remote, 512 in flight, 200 ms: requests/s, engine alone", f"{slow['req_per_s']:,}", ""),
            ("… share of the possible 2,560", f"{slow['of_possible']:.3f}", "≥ 0.92"),
        ]
        if one := found.get("transport"):  # measured once, when the transport was changed
            rows += [
                (
                    f"… on aiohttp against pyreqwest, taking turns ({one['date']}): 64 in flight",
                    f"{one['no_latency']:.2f}",
                    "",
                ),
                ("… 512 in flight, 200 ms", f"{one['latency']:.2f}", ""),
                ("… processor time a request, µs, pyreqwest → aiohttp: 64 in flight", "{} → {}".format(*one["cpu_us"]), ""),
                ("… 512 in flight, connections opened included", "{} → {}".format(*one["cpu_us_latency"]), ""),
            ]
        for workers in (1, 4):
            limit = found[f"limited_{workers}"]
            sent = f"{limit['most_in_60_s']:,}"
            rows.append((f"limit of {limit['per_minute']:,}/min, {workers} worker(s): most in any 60 s", sent, "≤ limit"))
            rows.append(("… share of the limit used", f"{limit['used']:.3f}", "≥ 0.97"))
        rows += [
            ("limiter: leases/s, 4 workers", f"{found['leases']['leases_per_s']:,}", "≥ 10,000"),
            (
                "2% faults, 20,000 rows: lost / twice / failed",
                f"{faults['lost']} / {faults['twice']} / {faults['failed']}",
                "0",
            ),
            ("… extra requests", f"{100 * faults['extra']:.2f}%", "< 3%"),
        ]
    if found := results.get("vllm"):
        if one := found.get("engine"):
            rows.append(("vllm: tokens/s, this engine", f"{one['tokens_per_s']:.0f}", ""))
            rows.append(("… against a bare AsyncLLM, all submitted at once", f"{one['ratio']:.3f}", "≥ 0.97"))
        if one := found.get("order"):
            rows.append(("vllm, two replicas, shared prompts: by prefix against in turn", f"{one['ratio']:.2f}", "≥ 1.3"))
        if one := found.get("lora"):
            same = f"{one['identical']} of {one['rows']}"
            rows.append((f"vllm, {one['adapters']} adapters in one batch: answers as each gives alone", same, "all"))
            rows.append(
                ("… tokens/s, against one adapter alone", f"{one['tokens_per_s'] / one['alone_tokens_per_s']:.2f}", "")
            )
        for one in filter(None, (found.get("peers"), found.get("long"))):
            rows.append((f"vllm, {one['rows']:,} rows, the whole command, s", f"{one['eagleray']}", ""))
            rows.append(("… `vllm run-batch`, s", f"{one['run_batch']}", "more"))
            rows.append(("… `ray.data.llm`, s", f"{one['ray_data_llm']}", "more"))
    for one in results.get("batch", []):
        rows.append((f"batch API, {one['rows']:,} rows in {one['batches']} files: s", f"{one['seconds']}", ""))
        rows.append(("… peak MiB of the run's process", f"{one['peak_mib']}", "flat"))
    if found := results.get("rooms"):
        rows.append(("core: lines, all rooms", f"{sum(found.values()):,}", "≤ 14,000"))
        rows += [(f"… {room}", f"{count:,}", "") for room, count in found.items()]
    lines = [f"{results['date']}, {results['machine']['cpus']} CPUs, Python {results['machine']['python']}", ""]
    lines += ["| what | measured | goal |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
