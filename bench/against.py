"""Compare this commit with an earlier one: `python -m bench.against COMMIT [--turns 3] [--only "llamacpp;remote, 64"]`.

Both commits run the same small measurements in turns, each in a process of its own, with the same environment. The result
is the median of the ratios (this commit / the earlier one; more than 1 is faster). `--site DIR` adds a directory with
packages that only the earlier commit needs. Writes into `bench/results.json` and `bench/results.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.commands import commit
from bench.table import markdown

HERE = Path(__file__).parent.parent

# Each expression gives the rate of one engine. `gsm8k()` is the path of the questions.
STEPS = {
    "echo, 100,000 rows/s": "pipeline.run([100_000], 'scale')['scale']['100000']['rows_per_s']",
    "llamacpp, tokens/s": "llamacpp.run(gsm8k(), rows=32, tokens=64, repeats=1, only=('engine',))['engine']",
    "transformers, tokens/s": "transformers.run(gsm8k(), rows=96, tokens=32, repeats=1)['tokens_per_s']",
    "remote, 64 in flight, requests/s": "remote.run('no_latency')['no_latency']['req_per_s']",
    "remote, 512 in flight, 200 ms, requests/s": "remote.run('latency')['latency']['req_per_s']",
    "remote, the whole command, rows/s": "remote.run('whole')['whole']['rows_per_s']",
    "vllm, tokens/s": "vllm.engine_against_bare(gsm8k(), rows=128, tokens=32, repeats=1)['tokens_per_s']",
    "batch, 12,000 rows/s": "12_000 / batch.measure(12_000)['seconds']",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.against")
    parser.add_argument("commit")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--site", default="")
    args = parser.parse_args()
    found: dict[str, Any] = {"commit": args.commit}
    now = commit()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "worktree", "add", "-f", "--detach", f"{folder}/tree", args.commit], check=True, cwd=HERE)
        try:
            for name, expression in STEPS.items():
                if args.only and not any(name.startswith(only) for only in args.only.split(";")):
                    continue
                pairs = []
                for turn in range(args.turns):
                    sides = [(Path(folder) / "tree", args.site), (HERE, "")]
                    rates = [measure(expression, *side) for side in (sides if turn % 2 == 0 else sides[::-1])]
                    pairs.append(rates if turn % 2 == 0 else rates[::-1])
                    print(name, pairs[-1], file=sys.stderr, flush=True)
                found[name] = {
                    "before": round(statistics.median(pair[0] for pair in pairs), 1),
                    "now": round(statistics.median(pair[1] for pair in pairs), 1),
                    "ratio": round(statistics.median(pair[1] / pair[0] for pair in pairs), 3),
                    "ratios": [round(pair[1] / pair[0], 3) for pair in pairs],
                    "at": now,
                }
                keep(found)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", f"{folder}/tree"], check=False, cwd=HERE)
    print(json.dumps(found, indent=2))


def keep(found: dict[str, Any]) -> None:
    """Writes the steps measured so far beside those of earlier calls, so a call that is cut off loses nothing."""
    path = HERE / "bench" / "results.json"
    results = json.loads(path.read_text())
    before = results.get("against") or {}
    results["against"] = {**(before if before.get("commit") == found["commit"] else {}), **found}
    path.write_text(json.dumps(results, indent=2) + "\n")
    path.with_suffix(".md").write_text(markdown(results))


def measure(expression: str, tree: Path, site: str) -> float:
    """The number that the expression gives in a process whose packages are those of `tree`."""
    module = expression.removeprefix("12_000 / ").split(".")[0]
    code = f"from bench import {module}; from bench.__main__ import gsm8k; print('RATE', {expression})"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(tree), site]))}
    env.setdefault("EAGLERAY_GSM8K", str((HERE / "../shared/data/gsm8k_test.jsonl").resolve()))
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=env, capture_output=True, text=True, check=False)
    rates = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("RATE ")]
    if not rates:
        raise SystemExit(f"`{expression}` gave no number in {tree}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return float(rates[0])


if __name__ == "__main__":
    main()
