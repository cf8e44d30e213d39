"""How much of vLLM's own speed `engine=vllm` keeps with task=embed: steps of `python -m bench --only vllm`.

SmolLM2-135M with vLLM's pooling runner, eager, one machine.
- `embed`: 512 questions through ours, and through vLLM's `LLM.embed`, in turns;
- `embed_peers`: whole commands over 1,319 questions, loading included: `eagleray infer task=embed`, `vllm run-batch`.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.commands import timed
from bench.questions import questions
from engines.registry import load_engine
from tests.support.checkpoint import checkpoint_dir

KWARGS: dict[str, Any] = {
    "runner": "pooling", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 64, "kv_cache_memory_bytes": 1 << 29,
    "enable_prefix_caching": False,
}  # fmt: skip


def texts(data: Path | None, count: int) -> list[str]:
    """As many different texts, also where the bench has fewer questions."""
    asked = questions(data, count)
    return [asked[at % len(asked)] + (f" ({at})" if at >= len(asked) else "") for at in range(count)]


def embed(data: Path | None, rows: int, repeats: int) -> dict[str, Any]:
    """Texts a second of both, and the median of the ratios."""
    from vllm import LLM

    # Both compute on all cores: engine=vllm does so by itself, LLM keeps one core free.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))
    given = texts(data, rows)
    asked = [{"task": "embed", "inputs": {"text": text}} for text in given]
    with load_engine("vllm", model=str(checkpoint_dir()), kwargs=KWARGS) as engine:
        bare = LLM(str(checkpoint_dir()), **KWARGS)

        def ours() -> tuple[float, list[Any]]:
            began = time.perf_counter()
            found = engine.infer(asked)
            return len(asked) / (time.perf_counter() - began), [each.values["embedding"] for each in found]

        def theirs() -> tuple[float, list[Any]]:
            began = time.perf_counter()
            found = bare.embed(given, use_tqdm=False)
            return len(asked) / (time.perf_counter() - began), [np.array(each.outputs.embedding) for each in found]

        ours(), theirs()
        pairs, least = [], 1.0
        for turn in range(repeats):
            first, second = (ours(), theirs()) if turn % 2 else (theirs(), ours())[::-1]
            pairs.append((second[0], first[0]))
            least = min(least, *(float(a @ b) for a, b in zip(first[1], second[1], strict=True)))
        bare.llm_engine.engine_core.shutdown()
    return {
        "texts_per_s": round(statistics.median(b for _, b in pairs), 1),
        "llm_embed": round(statistics.median(a for a, _ in pairs), 1),
        "ratio": round(statistics.median(b / a for a, b in pairs), 3),
        "ratios": [round(b / a, 3) for a, b in pairs],
        "least_cosine": round(least, 6), "rows": rows,
    }  # fmt: skip


def embed_peers(data: Path | None, rows: int) -> dict[str, Any]:
    """Seconds of whole commands over the same texts, loading included."""
    model, given = str(checkpoint_dir()), texts(data, rows)
    found: dict[str, Any] = {"rows": rows}
    with tempfile.TemporaryDirectory() as work:
        plain, batch = Path(work) / "rows.jsonl", Path(work) / "batch.jsonl"
        plain.write_text("".join(json.dumps({"text": text}) + "\n" for text in given))
        line = {"method": "POST", "url": "/v1/embeddings"}
        lines = ({**line, "custom_id": str(i), "body": {"model": model, "input": text}} for i, text in enumerate(given))
        batch.write_text("".join(json.dumps(each) + "\n" for each in lines))
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in KWARGS.items() if not isinstance(value, bool)]
        commands = {
            "eagleray": ["-m", "jobs.infer", "task=embed", "engine=vllm", f"engine.model={model}", f"dataset.path={plain}",
                         f"output.path={work}/out", *(f"engine.kwargs.{name}={value}" for name, value in KWARGS.items())],
            "run_batch": ["-m", "vllm.entrypoints.openai.run_batch", "-i", str(batch), "-o", f"{work}/batch.out",
                          "--model", model, "--enforce-eager", "--no-enable-prefix-caching", *flags],
        }  # fmt: skip
        return found | timed(commands)
