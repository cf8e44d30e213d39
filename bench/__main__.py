"""`make bench`: every figure the project claims, measured here and now, as JSON and as a Markdown table.

    python -m bench [--only remote.faults,vllm] [--sizes 100000,1000000] [--out bench/results]

`--only` names parts, or one step of a part as `part.step`. What is not measured this time stays in the files. Without it,
all parts are measured but these, which need much time or disk:
    scale    ten million rows, fifty nodes: an hour (scale.ledger: only the index of the ledger)
    tasks    memory of finalize with embeddings: 4 GB of disk
    images   memory with images of 1 MB: 12 GB of disk

The GSM8K questions are taken from $EAGLERAY_GSM8K or ../shared/data/gsm8k_test.jsonl, where they are; a small set of
the bench's own otherwise.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import rooms
from bench.commands import commit
from bench.table import markdown

USUAL = ("llamacpp", "transformers", "vllm", "tasks_local", "pipeline", "remote", "tasks_remote", "batch", "rooms")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--only", default=",".join(USUAL))
    parser.add_argument("--sizes", default="")
    args = parser.parse_args()
    path = args.out.with_suffix(".json")
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if not results or args.only != "rooms":
        results |= {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
    sizes = [int(size) for size in args.sizes.split(",") if size]
    for name in args.only.split(","):
        part, _, step = name.partition(".")
        if part not in MEASURE:
            raise SystemExit(f"--only has no part {part!r}: {', '.join(MEASURE)}")
        found = MEASURE[part](step, sizes)
        results[part] = {**results.get(part, {}), **found} if step else found
        measured: dict[str, Any] = results.setdefault("measured", {})
        for other in [each for each in measured if not step and each.startswith(f"{part}.")]:
            del measured[other]
        measured[name] = {"commit": commit(), "date": time.strftime("%Y-%m-%d")}
    results["rooms"] = rooms.run()
    path.write_text(json.dumps(results, indent=2) + "\n")
    table = markdown(results)
    args.out.with_suffix(".md").write_text(table)
    print(table)


def gsm8k() -> Path | None:
    path = Path(os.environ.get("EAGLERAY_GSM8K", "../shared/data/gsm8k_test.jsonl"))
    return path if path.exists() else None


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    processor = names[0] if names else platform.machine()
    return {"cpus": os.cpu_count(), "python": platform.python_version(), "processor": processor, "memory_gib": memory}


def _part(module: str) -> Any:
    return importlib.import_module(f"bench.{module}")


def _scale(step: str, sizes: list[int]) -> Any:
    part = _part("scale")
    if step == "ledger":
        return {"ledger": part.ledger()}
    return part.run(sizes) if sizes else {**part.run(), "ledger": part.ledger()}


def _transformers(step: str) -> dict[str, Any]:
    part = _part("transformers")
    found = {} if step == "choice" else part.run(gsm8k(), rows=256, tokens=64, repeats=3)
    return found if step == "loop" else {**found, "choice": part.choice(gsm8k())}


def _llamacpp(step: str) -> dict[str, Any]:
    """The engine against loops, against llama.cpp's server where it is installed, and speculative decoding."""
    part, _, case = step.partition(".")
    found: dict[str, Any] = {}
    if part in ("", "alone"):
        found |= _part("llamacpp").run(gsm8k(), rows=64, tokens=128, repeats=3)
    if part in ("", "speculation"):
        found |= _part("llamacpp_speculation").run(gsm8k(), case)
    if part == "server" or (not part and _part("llamacpp_server").installed()):
        found |= _part("llamacpp_server").run(gsm8k(), case)
    return found


# Each takes the step ("" is all) and `--sizes`, and imports its module only then: engines need not all be installed.
MEASURE: dict[str, Callable[[str, list[int]], Any]] = {
    "llamacpp": lambda step, sizes: _llamacpp(step),
    "transformers": lambda step, sizes: _transformers(step),
    "vllm": lambda step, sizes: _part("vllm").run(gsm8k(), step),
    "tasks_local": lambda step, sizes: _part("tasks_local").run(gsm8k(), step),
    "pipeline": lambda step, sizes: _part("pipeline").run(sizes, step),
    "remote": lambda step, sizes: _part("remote").run(step),
    "tasks_remote": lambda step, sizes: _part("tasks_remote").run(step),
    "batch": lambda step, sizes: _part("batch").run(),
    "scale": lambda step, sizes: _scale(step, sizes),
    "tasks": lambda step, sizes: _part("tasks").run(*([tuple(sizes)] if sizes else [])),
    "images": lambda step, sizes: _part("images").run(),
    "rooms": lambda step, sizes: rooms.run(),
}


if __name__ == "__main__":
    main()
