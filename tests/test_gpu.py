"""What only a GPU can show: `python -m pytest -m gpu`. Skipped, and listed, where there is none.

SmolLM2 is small enough for any card; what is asked of it is only what has one right answer.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from engines import Engine, load_engine
from tests.support.checkpoint import adapter_dir, checkpoint_dir, gguf_path

pytestmark = pytest.mark.gpu

FRANCE = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}


def needs(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed here: pip install 'eagleray[{extra}]'")


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def answers(engine: Engine, rows: int = 40) -> None:
    """Of rows enough for several batches, all are answered, and alike."""
    found = engine.infer([FRANCE] * rows, {"max_tokens": 24})
    assert all(completion.error is None for completion in found), found[0].error
    assert all("Paris" in (completion.text or "") for completion in found)


def test_llamacpp_keeps_its_layers_on_the_gpu() -> None:
    import llama_cpp

    if not llama_cpp.llama_supports_gpu_offload():
        pytest.skip("this llama-cpp-python was built without CUDA: CMAKE_ARGS=-DGGML_CUDA=ON builds it with it")
    with load_engine("llamacpp", model=str(gguf_path()), kwargs={"n_gpu_layers": -1, "n_ctx": 512}) as engine:
        answers(engine)


@pytest.mark.parametrize("kwargs", [{}, {"enforce_eager": True}, {"quantization": "fp8"}, {"load_format": "bitsandbytes"}])
def test_vllm_with_graphs_without_and_with_fewer_bits(kwargs: dict[str, Any]) -> None:
    needs("vllm", "vllm")
    if "load_format" in kwargs:
        needs("bitsandbytes", "transformers]' 'bitsandbytes>=0.46")
        kwargs = {**kwargs, "quantization": "bitsandbytes"}
    with load_engine("vllm", model=str(checkpoint_dir()), kwargs={"gpu_memory_utilization": 0.4, **kwargs}) as engine:
        answers(engine)


def test_vllm_gives_rows_of_one_batch_the_weights_of_their_own_adapters() -> None:
    needs("vllm", "vllm")
    adapters = [None, *(str(adapter_dir(seed)) for seed in range(2))]
    rows = [{**FRANCE, "adapter": adapter} for adapter in adapters * 8]
    kwargs = {"gpu_memory_utilization": 0.4, "enable_lora": True, "max_loras": 2, "dtype": "float32"}
    with load_engine("vllm", model=str(checkpoint_dir()), kwargs=kwargs) as engine:
        alone = [engine.infer([row], {"max_tokens": 16})[0].text for row in rows[:3]]
        together = [completion.text for completion in engine.infer(rows, {"max_tokens": 16})]
    assert len(set(alone)) == 3
    assert together == alone * 8


def test_vllm_over_two_gpus() -> None:
    needs("vllm", "vllm")
    if gpus() < 2:
        pytest.skip("tensor parallel over GPUs needs two of them")
    # Its 9 heads and 3 KV heads are not divisible by 2: stages are.
    kwargs = {"gpu_memory_utilization": 0.4, "pipeline_parallel_size": 2}
    with load_engine("vllm", model=str(checkpoint_dir()), kwargs=kwargs) as engine:
        answers(engine)


def test_transformers_batches_continuously_where_flash_attention_is() -> None:
    needs("transformers", "transformers")
    flash = importlib.util.find_spec("flash_attn") is not None
    with load_engine("transformers", model=str(checkpoint_dir())) as engine:
        answers(engine)
        assert (engine.batcher.continuous is not None) == flash  # type: ignore[attr-defined]


def test_transformers_own_continuous_batching_without_flash_attention() -> None:
    needs("transformers", "transformers")
    with load_engine("transformers", model=str(checkpoint_dir()), kwargs={"continuous_batching": True}) as engine:
        answers(engine)
        assert engine.batcher.continuous.number == 40  # type: ignore[attr-defined]
        assert not engine.batcher.continuous.broken  # type: ignore[attr-defined]
        sampled = engine.infer([FRANCE] * 8, {"max_tokens": 8, "temperature": 0.7, "seed": 1})  # in batches of its own
        assert all(completion.error is None for completion in sampled)


@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_with_fewer_bits_by_bitsandbytes_and_an_adapter_on_top(bits: int) -> None:
    needs("transformers", "transformers")
    needs("bitsandbytes", "transformers]' 'bitsandbytes>=0.46")
    with load_engine("transformers", model=str(checkpoint_dir()), kwargs={f"load_in_{bits}bit": True}) as engine:
        found = engine.infer([FRANCE] * 8, {"max_tokens": 8})
    assert all(completion.error is None for completion in found)
    kwargs = {f"load_in_{bits}bit": True}
    with load_engine("transformers", model=str(checkpoint_dir()), adapter=str(adapter_dir()), kwargs=kwargs) as engine:
        adapted = engine.infer([FRANCE] * 8, {"max_tokens": 8})
    assert all(completion.error is None for completion in adapted)
    assert adapted[0].text != found[0].text


def test_sglang_in_the_worker() -> None:
    needs("sglang", "sglang")
    with load_engine("sglang_offline", model=str(checkpoint_dir()), kwargs={"mem_fraction_static": 0.4}) as engine:
        answers(engine)


def test_a_run_on_gpus_through_ray(infer: Any, tmp_path: Path, write_jsonl: Any) -> None:
    needs("vllm", "vllm")
    import ray

    if not ray.cluster_resources().get("GPU"):
        pytest.skip("the test session's Ray counts no GPU")
    outcome = infer(
        write_jsonl([FRANCE] * 4), f"engine.model={checkpoint_dir()}", "hardware=gpu",
        "engine.kwargs.gpu_memory_utilization=0.4", f"generation.max_tokens={os.environ.get('TOKENS', 8)}", engine="vllm",
    )  # fmt: skip
    assert outcome.exit_status == 0
