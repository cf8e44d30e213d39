"""The table of the measurements: a function for each part of `bench/results.json`.

It imports nothing of what it shows, so the table can be drawn where only some of the engines are installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = tuple[str, str, str]  # what, measured, goal


def _llamacpp(found: Any) -> list[Row]:
    rows: list[Row] = []
    if "engine" in found:
        rows += [
            ("llama.cpp: tokens/s, this engine", f"{found['engine']:.0f}", ""),
            ("… against one `create_chat_completion` at a time", f"{found['engine_over_sequential']:.2f}", "≥ 1.9"),
            ("… against a bare low-level batch loop", f"{found['engine_over_bare']:.2f}", "≥ 0.95"),
        ]
    for case, (what, goal) in _SERVER.items():
        if one := found.get(f"server_{case}"):
            rows.append((f"llama.cpp, {what}: tokens/s, this engine", f"{one['tokens_per_s']:.0f}", ""))
            rows.append(("… against llama.cpp's C++ server", f"{one['ratio']:.2f}", goal))
    for case, (what, goal) in _SPECULATION.items():
        if one := found.get(f"speculation_{case}"):
            rows.append((f"llama.cpp, {what}: tokens/s against without", f"{one['ratio']:.2f}", goal))
            if one["accepted"] is not None:
                share = f"{one['accepted']:.0%}; {one['same']} of {one['rows']}"
                rows.append(("… guessed tokens that were right; equal answers", share, ""))
            else:
                rows.append(("… MiB of memory beside the weights, against F16", "{} / {}".format(*one["mib"]), "less"))
    return rows


# The engine converts the packaged model to f16 by default. The server computes it as it is, in Q4_1.
_AS_LOADED = "f16 here, Q4_1 in the server"
_SERVER = {
    "greedy": (f"temperature 0, 16 slots, {_AS_LOADED}", "≥ 1.1"),
    "f16": ("temperature 0, 16 slots, both in f16", "≥ 1.1"),
    "q4_1": ("temperature 0, 16 slots, both in Q4_1", "≥ 1.1"),
    "json": (f"with a JSON schema, 16 slots, {_AS_LOADED}", "≥ 1.0"),
    "system": (f"with a long system prompt, 16 slots, {_AS_LOADED}", "≥ 1.0"),
    "slots64": (f"temperature 0, 64 slots, {_AS_LOADED}", "≥ 1.0"),
}
_SPECULATION = {
    "lookup_1": ("prompt lookup, answers that copy, 1 slot", "> 1"),
    "lookup_16": ("prompt lookup, answers that copy, 16 slots", ""),
    "lookup_story": ("prompt lookup, answers that do not copy, 16 slots", ""),
    "draft": ("draft model (in 4 bits, for the same in f32), 1 slot", "> 1"),
    "kv_q8_0": ("KV cache in q8_0, 16 slots", ""),
}


def _transformers(found: Any) -> list[Row]:
    rows: list[Row] = []
    if "ratio" in found:
        rows.append(("transformers: tokens/s, this engine", f"{found['tokens_per_s']:.0f}", ""))
        rows.append(("… against a hand-tuned `generate` loop on sorted batches", f"{found['ratio']:.3f}", "≥ 1.0"))
    if one := found.get("choice"):
        names = {
            "many": f"{one['rows']} rows at once",
            "prefix": f"{one['batch']} rows with one long system prompt",
            "one": "one row at a time",
        }
        for name, what in names.items():
            pair = f"{one[name]['tokens_per_s']:.0f} against {one[name]['bare']:.0f}: {one[name]['ratio']:.2f}"
            rows.append((f"transformers against vLLM on a CPU, tokens/s: {what}", pair, ""))
    return rows


def _pipeline(found: Any) -> list[Row]:
    rows: list[Row] = []
    if scale := found.get("scale"):
        for size in (key for key in scale if key.isdigit()):
            figures = scale[size]
            rows.append((f"echo, {int(size):,} rows: rows/s end to end", f"{figures['rows_per_s']:,}", ""))
            rows.append(("… while asking", f"{figures['asking_rows_per_s']:,}", "≥ 10,000"))
            memory = ", ".join(f"{kind} {mib}" for kind, mib in sorted(figures["peak_mib"].items()))
            rows.append(("… peak MiB", memory, "flat"))
        rows.append(("echo: rows/s at the largest size against the smallest", f"{scale['ratio']:.2f}", "≥ 0.9"))
        rows.append(("echo: resume over the largest, finished run, s", f"{scale['resume_s']}", "< 30"))
    if one := found.get("stragglers"):
        rows.append(("stragglers: share of the possible rate", f"{one['ratio']:.3f}", "≥ 0.95"))
    if one := found.get("cold_start"):
        rows.append(("`eagleray --help`, s", f"{one['help_s']}", "< 0.5"))
        rows.append(("ten echo rows end to end, s", f"{one['ten_rows_s']}", "≤ 4"))
        rows.append(("… processor time of all its processes, s", f"{one['ten_rows_cpu_s']}", ""))
    if one := found.get("fleet"):
        what = "one fast and three slow replicas (4:1): time against all rows at the sum of their speeds"
        rows.append((what, f"{one['ratio']:.3f}", "≤ 1.05"))
    if one := found.get("reading"):
        rows.append(("reading a row, µs of processor time, with Python's garbage collector", f"{one['usual_us']}", ""))
        rows.append(("… with rare garbage collection, as in a run", f"{one['rarely_us']}", "less"))
    if one := found.get("processes"):
        each = ", ".join(f"{kind} {us}" for kind, us in one["us"].items())
        what = f"echo, a run of {one['rows']:,} rows: processor time of a row, all processes, µs"
        rows += [(what, f"{sum(one['us'].values()):.1f}", ""), ("… by process", each, "")]
    if one := found.get("peers"):
        rows += _peers(one)
    return rows


def _peers(found: Any) -> list[Row]:
    rates = found["rows_per_s"]
    return [
        (f"echo, {found['rows']:,} Parquet rows: rows/s end to end", f"{rates['eagleray']:,}", ""),
        ("… Ray Data, read → map_batches(identity) → write", f"{rates['ray_data']:,}", ""),
        ("… `ray.data.llm`, an echo stage", f"{rates['ray_data_llm']:,}", ""),
        ("… against `ray.data.llm`", f"{found['over_ray_data_llm']}", "≥ 1"),
    ]


def _tasks(found: Any) -> list[Row]:
    rows: list[Row] = []
    for figures in found.get("embeddings", ()):
        what = f"finalize of {figures['rows']:,} embeddings of 384 numbers: peak MiB"
        rows.append((what, f"{figures['peak_mib']:,.0f} (imports: {figures['imported_mib']:,.0f})", "flat"))
    return rows


def _scale(found: Any) -> list[Row]:
    rows: list[Row] = []
    if "rows" in found:
        what = f"{found['rows']:,} rows, {found['files']:,} files, {found['nodes']} raylets, {found['replicas']} replicas"
        memory = ", ".join(f"{kind} {mib}" for kind, mib in found["peak_mib"].items())
        rows += [
            (f"echo, {what}: rows/s end to end", f"{found['rows_per_s']:,}", ""),
            ("… while asking", f"{found['asking_rows_per_s']:,}", ""),
            ("… peak MiB", memory, "flat"),
            ("… share of the time that putting the output together took", f"{found['finalize_share']:.0%}", ""),
            ("… nodes that did it", f"{len(found['finalize_nodes'])}", f"{found['cpu_nodes']}"),
        ]
    if "wrong_rows" in found:
        kills = ", ".join(f"{what} at {done:,} rows" for what, done in found["killed"].items())
        over_time = found["memory_over_time"]
        again = found["resume"]
        rows += [
            ("… killed on the way", kills, ""),
            ("… drivers; where the machine's memory was full, the bench ended them", f"{found['drivers']}", ""),
            ("… rows that are wrong, missing or in a wrong place", f"{found['wrong_rows']}", "0"),
            ("… requests that were sent again", f"{found['extra_requests']:,}", ""),
            ("… the driver's MiB over time", " ".join(str(mib) for *_, mib, _ in over_time), "flat"),
            ("… the dispatcher's MiB over time", " ".join(str(mib) for *_, mib in over_time), "flat"),
            ("… processor time a row, µs", f"{sum(found['cpu_us_per_row'].values()):,.0f}", ""),
            ("… again over it, finished, s", f"{again['seconds']}", "< 60"),
            ("… processor time of it, s", f"{sum(again['cpu_s'].values()):,.1f}", ""),
        ]
        if reading := found.get("resume_with_reading"):
            rows.append(("… again, if its rows must be read, s", f"{reading['seconds']}", ""))
    for one in found.get("ledger", []):
        rows.append((f"ledger of {one['rows']:,} rows: index, bytes a row", f"{one['bytes_per_row']}", "flat"))
        rows.append(("… at most while it is made", f"{one['peak_bytes_per_row']}", ""))
        rows.append(("… processor time to read it, µs a row", f"{one['cpu_us_per_row']}", "flat"))
    return rows


def _images(found: Any) -> list[Row]:
    rows: list[Row] = []
    for form in ("jsonl", "parquet"):
        what = f"{found['rows']:,} rows with images of {found['image_mb']:g} MB, {form}: most MiB of a process"
        peak = found[form]["peak_mib"]
        rows.append((what, str(max(peak.values())), "< 1,536"))
        rows.append(("… by kind", ", ".join(f"{kind} {mib}" for kind, mib in list(peak.items())[:6]), ""))
    return rows


def _remote(found: Any) -> list[Row]:
    rows: list[Row] = []
    if one := found.get("no_latency"):
        rows.append(("remote, 64 in flight, no latency: requests/s, engine alone", f"{one['req_per_s']:,}", ""))
        rows += _against_bare(one, "≥ 0.9")
        rows.append(("… against Oumi 0.9's best (3,511)", f"{one['against_oumi']:.2f}", "≥ 2"))
    if one := found.get("whole"):
        rows.append(("remote, the whole command, one worker: rows/s", f"{one['rows_per_s']:,}", "≥ 3,000"))
    if one := found.get("latency"):
        rows.append(("remote, 512 in flight, 200 ms: requests/s, engine alone", f"{one['req_per_s']:,}", ""))
        rows += _against_bare(one, "≥ 0.97")
        rows.append(("… share of the possible 2,560", f"{one['of_possible']:.3f}", "≥ 0.92"))
    for workers in (1, 4):
        if one := found.get(f"limited_{workers}"):
            sent = f"{one['most_in_60_s']:,}"
            rows.append((f"limit of {one['per_minute']:,}/min, {workers} worker(s): most in any 60 s", sent, "≤ limit"))
            rows.append(("… share of the limit used", f"{one['used']:.3f}", "≥ 0.97"))
    if one := found.get("leases"):
        rows.append(("limiter: leases/s, 4 workers", f"{one['leases_per_s']:,}", "≥ 10,000"))
    if one := found.get("faults"):
        lost = f"{one['lost']} / {one['twice']} / {one['failed']}"
        rows.append(("2% faults, 20,000 rows: lost / twice / failed", lost, "0"))
        rows.append(("… extra requests", f"{100 * one['extra']:.2f}%", "< 3%"))
    if one := found.get("refused"):
        asked = f"{one['rows']:,} rows, {one['in_flight']} in flight, a server that takes 8 at once and refuses the others"
        rows.append((f"{asked}: s", f"{one['s']} (at least {one['least_s']})", ""))
        rows.append(("… requests sent; rows that failed", f"{one['sent']:,}; {one['failed']}", "; 0"))
    return rows


def _against_bare(one: Any, goal: str) -> list[Row]:
    """A figure beside that of a bare loop over aiohttp, and the processor time of each."""
    rows = [("… against a bare aiohttp loop", f"{one['ratio']:.3f}", goal)]
    if "cpu_us" in one:
        times = f"{one['cpu_us']} / {one['aiohttp_cpu_us']}"
        rows.append(("… processor time for each, µs: the engine / the bare loop", times, ""))
    return rows


def _tasks_remote(found: Any) -> list[Row]:
    rows: list[Row] = []
    for name, what in (("latency", "1 s a request"), ("short_latency", "0.2 s a request"), ("no_latency", "no latency")):
        if one := found.get(name):
            rows.append((f"remote, {found['texts']:,} embeddings, {what}: texts/s", f"{one['texts_per_s']:,}", ""))
            rows += _against_bare(one, "≥ 0.9")
    return rows


def _vllm(found: Any) -> list[Row]:
    rows: list[Row] = []
    if one := found.get("engine"):
        rows.append(("vllm: tokens/s, this engine", f"{one['tokens_per_s']:.0f}", ""))
        rows.append(("… against a bare AsyncLLM, all submitted at once", f"{one['ratio']:.3f}", "≥ 0.97"))
    if one := found.get("order"):
        rows.append(("vllm, two replicas, shared prompts: by prefix against in turn", f"{one['ratio']:.2f}", "≥ 1.3"))
    if one := found.get("lora"):
        same = f"{one['identical']} of {one['rows']}"
        rows.append((f"vllm, {one['adapters']} adapters in one batch: answers as each gives alone", same, "all"))
        rows.append(("… tokens/s, against one adapter alone", f"{one['tokens_per_s'] / one['alone_tokens_per_s']:.2f}", ""))
    for one in filter(None, (found.get("peers"), found.get("long"))):
        rows.append((f"vllm, {one['rows']:,} rows, the whole command, s", f"{one['eagleray']}", ""))
        rows.append(("… `vllm run-batch`, s", f"{one['run_batch']}", "more"))
        rows.append(("… `ray.data.llm`, s", f"{one['ray_data_llm']}", "more"))
    if one := found.get("fixed"):
        rows.append((f"vllm, {one['rows']} rows, the whole command, s", f"{one['eagleray']}", ""))
        rows.append(("… `vllm run-batch`, s", f"{one['run_batch']}", "more"))
    rows += _tasks_vllm(found)
    return rows


def _tasks_local(found: Any) -> list[Row]:
    names = {
        "embed": ("transformers, task=embed", "sentence-transformers' `encode`", "≥ 0.95"),
        "llamacpp": ("llama.cpp, task=embed", "a bare low-level loop", "≥ 0.95"),
        "loglikelihood": ("transformers, task=loglikelihood", "lm-evaluation-harness, hf", "≥ 1.0"),
    }
    lines = []
    for name, (what, other, goal) in names.items():
        if one := found.get(name):
            lines.append((f"{what}: texts/s, this engine", f"{one['per_s']}", ""))
            other = f"{other} ({one['other']})" if one.get("other", "lm_eval") != "lm_eval" else other
            lines.append((f"… against {other}", f"{one['ratio']:.2f}", goal))
    return lines


def _batch(found: Any) -> list[Row]:
    rows: list[Row] = []
    for one in found:
        rows.append((f"batch API, {one['rows']:,} rows in {one['batches']} files: s", f"{one['seconds']}", ""))
        rows.append(("… peak MiB of the run's process", f"{one['peak_mib']}", "flat"))
    return rows


def _against(found: Any) -> list[Row]:
    rows: list[Row] = []
    for name, one in found.items():
        if name != "commit":
            measured = f"{one['before']:,} → {one['now']:,}: {one['ratio']:.2f}"
            rows.append((f"commit {found['commit']} → {one['at']}, in turns: {name}", measured, "≥ 0.97"))
    return rows


def _rooms(found: Any) -> list[Row]:
    rows: list[Row] = []
    rows.append(("core: lines, all rooms", f"{sum(found.values()):,}", "≤ 14,000"))
    rows += [(f"… {room}", f"{count:,}", "") for room, count in found.items()]
    return rows


def _tasks_vllm(found: Any) -> list[Row]:
    lines = []
    if one := found.get("embed"):
        lines.append(("vllm, task=embed: texts/s, this engine", f"{one['texts_per_s']:.0f}", ""))
        lines.append(("… against `LLM.embed` of vLLM, in turns", f"{one['ratio']:.3f}", "≥ 0.97"))
    if one := found.get("embed_peers"):
        lines.append((f"vllm, task=embed, {one['rows']:,} rows, the whole command, s", f"{one['eagleray']}", ""))
        lines.append(("… `vllm run-batch` with embedding lines, s", f"{one['run_batch']}", "more"))
    return lines


PARTS: dict[str, Callable[[Any], list[Row]]] = {
    "llamacpp": _llamacpp,
    "transformers": _transformers,
    "pipeline": _pipeline,
    "tasks": _tasks,
    "scale": _scale,
    "images": _images,
    "remote": _remote,
    "tasks_remote": _tasks_remote,
    "vllm": _vllm,
    "tasks_local": _tasks_local,
    "batch": _batch,
    "against": _against,
    "rooms": _rooms,
}


def markdown(results: dict[str, Any]) -> str:
    """The claims, their figures and their goals."""
    rows = [row for name, part in PARTS.items() if name in results for row in part(results[name])]
    machine = results["machine"]
    about = f"{machine['cpus']} CPUs ({machine['processor']}), {machine['memory_gib']} GiB, Python {machine['python']}"
    lines = [f"{results['date']}, {about}. The commands and the commit of each figure are below.", ""]
    lines += ["| what | measured | goal |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    lines += ["", "| command | commit | date |", "|---|---|---|"]
    for name, one in sorted(results.get("measured", {}).items()):
        lines.append(f"| `python -m bench --only {name}` | {one['commit']} | {one['date']} |")
    return "\n".join(lines) + "\n"
