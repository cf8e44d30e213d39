"""`eagleray plan`: sizes against figures others have published, prompts against what the engines count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines import load_engine
from engines.config import EngineConfig
from engines.identity import identity
from engines.local.memory_estimate import Footprint, footprint, weights_bytes
from engines.local.prompt_renderer import prompt_renderer
from engines.params import GenerationParams
from engines.registry import REGISTRY, EngineKind
from jobs import plan
from tests.support.checkpoint import gguf_path, smollm2_checkpoint  # noqa: F401
from tests.support.infer import ask

# Oumi's table of hardware: billions of parameters, GB in BF16, GB in Q4.
TABLE = [(1, 2, 0.5), (3, 6, 1.5), (7, 14, 3.5), (13, 26, 6.5), (33, 66, 16.5), (70, 140, 35)]


def llama(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "max_position_embeddings": 131072,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        **more,
    }


LLAMA_8B = llama(4096, 32, 32, 8, 14336, 128256)
LLAMA_70B = llama(8192, 80, 64, 8, 28672, 128256)
MIXTRAL = llama(4096, 32, 32, 8, 14336, 32000, num_local_experts=8, max_position_embeddings=32768)
DEEPSEEK_V3 = llama(
    7168, 61, 128, 128, 18432, 129280, moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1,
    first_k_dense_replace=3, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
    v_head_dim=128, quantization_config={"quant_method": "fp8"},
)  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., str]:
    def write(config: dict[str, Any], **files: bytes) -> str:
        folder = tmp_path / "checkpoint"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        for name, content in files.items():
            (folder / f"{name}.safetensors").write_bytes(content)
        return str(folder)

    return write


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs the job; its exit status, and all it printed with single spaces."""

    def run(*overrides: str) -> tuple[int, str]:
        monkeypatch.setenv("COLUMNS", "200")
        status = plan.main(list(overrides))
        printed = capsys.readouterr()
        return status, " ".join((printed.out + printed.err).split())

    return run


def size(path: str, **kwargs: Any) -> Footprint:
    found = footprint(EngineConfig("vllm", path, kwargs=kwargs))
    assert found is not None
    return found


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("billions", "bf16", "q4"), TABLE)
def test_the_tables_of_the_documentation_come_out(billions: float, bf16: float, q4: float) -> None:
    assert weights_bytes(billions * 1e9, 16) == bf16 * 1e9
    assert weights_bytes(billions * 1e9, 4) == q4 * 1e9


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (llama(2048, 22, 32, 4, 5632, 32000), 1),  # TinyLlama
        (llama(3072, 28, 24, 8, 8192, 128256, tie_word_embeddings=True), 3),  # Llama 3.2
        (llama(4096, 32, 32, 32, 11008, 32000), 7),  # Llama 2
        (llama(5120, 40, 40, 40, 13824, 32000), 13),  # Llama 2
        (llama(6656, 60, 52, 52, 17920, 32000), 33),  # Llama
        (LLAMA_70B, 70),
    ],
)
def test_real_models_of_these_sizes_are_near_the_tables(
    config: dict[str, Any], billions: float, checkpoint: Callable[..., str]
) -> None:
    bf16, q4 = next(row[1:] for row in TABLE if row[0] == billions)
    assert size(checkpoint(config)).weight_bytes / 1e9 == pytest.approx(bf16, rel=0.11)
    # 4-bit formats leave the embeddings in 16 bits, which weighs most in small models.
    low = size(checkpoint(config), load_in_4bit=True).weight_bytes / 1e9
    assert q4 < low < 1.5 * q4


@pytest.mark.parametrize(
    ("config", "parameters", "kib_a_token"),
    [
        (LLAMA_8B, 8_030_261_248, 128),
        (LLAMA_70B, 70_553_706_496, 320),
        (MIXTRAL, 46_702_792_704, 128),
        (DEEPSEEK_V3, pytest.approx(671_026_419_200, rel=1e-6), 68.625),
        # Qwen3-30B-A3B: many small experts, no dense layer, heads wider than hidden_size says.
        (
            llama(2048, 48, 32, 4, 6144, 151936, num_experts=128, moe_intermediate_size=768, head_dim=128),
            pytest.approx(30_532_122_624, rel=1e-6),
            96,
        ),
    ],
)
def test_parameters_by_the_dimensions_are_the_published_ones(
    config: dict[str, Any], parameters: int, kib_a_token: float, checkpoint: Callable[..., str]
) -> None:
    found = size(checkpoint(config))
    assert found.parameters == parameters
    assert not found.counted
    assert found.kv_bytes / 1024 == kib_a_token


def test_the_cache_follows_tensor_parallel_number_format_and_window(checkpoint: Callable[..., str]) -> None:
    path = checkpoint(LLAMA_70B)
    whole = size(path).sequence_bytes(1000)
    assert size(path).sequence_bytes(1000, 4) == whole / 4
    assert size(path).sequence_bytes(1000, 16) == whole / 8  # 8 heads: 16 GPUs hold each twice
    assert size(path, kv_cache_dtype="fp8").sequence_bytes(1000) == whole / 2
    assert size(path, max_model_len=8192).context == 8192
    kinds = ["sliding_attention", "full_attention"] * 40
    windowed = size(checkpoint({**LLAMA_70B, "layer_types": kinds, "sliding_window": 100}))
    assert windowed.sequence_bytes(100) == whole / 10
    assert windowed.sequence_bytes(1000) == whole * 0.55
    off = {**LLAMA_70B, "sliding_window": 100, "use_sliding_window": False}
    assert size(checkpoint(off)).sequence_bytes(1000) == whole


@pytest.mark.parametrize(
    ("config", "kwargs", "bits"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, {}, 4),
        ({"quantization_config": {"quant_method": "fp8"}}, {}, 8),
        ({"quantization_config": {"config_groups": {"a": {"weights": {"num_bits": 8}}}}}, {}, 8),
        ({}, {"quantization": "fp8"}, 8),
        ({}, {"load_in_4bit": True}, 4),
        ({}, {"quantization_config": {"load_in_8bit": True}}, 8),
    ],
)
def test_quantised_weights_are_smaller_but_for_the_embeddings(
    config: dict[str, Any], kwargs: dict[str, Any], bits: int, checkpoint: Callable[..., str]
) -> None:
    embeddings = 2 * 128256 * 4096
    found = size(checkpoint({**LLAMA_8B, **config}), **kwargs)
    assert found.weight_bytes == (found.parameters - embeddings) * bits / 8 + embeddings * 2
    assert found.weight_format == f"{bits} bits"


def test_a_checkpoints_own_files_are_counted(checkpoint: Callable[..., str]) -> None:
    def tensors(*shapes: list[int], dtype: str) -> bytes:
        about = {f"t{i}": {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]} for i, shape in enumerate(shapes)}
        header = json.dumps({"__metadata__": {"format": "pt"}, **about}).encode()
        return len(header).to_bytes(8, "little") + header

    names = ("model-00001-of-00002", "model-00002-of-00002")
    files = dict(zip(names, (tensors([100, 7], [3], dtype="BF16"), tensors([5, 5], dtype="BF16")), strict=True))
    found = size(checkpoint(LLAMA_8B, **files))
    assert (found.parameters, found.counted, found.weight_bytes) == (728, True, 1456)
    assert size(checkpoint(LLAMA_8B, **files), dtype="float32").weight_bytes == 2912
    packed = {**LLAMA_8B, "quantization_config": {"bits": 4, "quant_method": "awq"}}
    found = size(checkpoint(packed, **files))
    assert (found.parameters, found.weight_bytes) == (8_030_261_248, 1456)


def test_a_model_that_does_not_fit_is_told_with_what_would(
    checkpoint: Callable[..., str], planned: Callable[..., tuple[int, str]]
) -> None:
    base = ["engine=vllm", f"engine.model={checkpoint(LLAMA_70B)}", "hardware=8xh100"]
    status, text = planned(*base)
    assert status == 3
    assert "no: 0 sequences of 131,072 tokens" in text
    assert "the weights need 60.3 GiB more" in text
    assert "suggested engine.kwargs.tensor_parallel_size=4 " in f"{text} "
    status, text = planned(*base, "engine.kwargs.tensor_parallel_size=4")
    assert (status, "131.4 GiB, bfloat16; 32.9 GiB on each GPU" in text) == (0, True)
    assert "replicas 1 to 2, 4 × GPU each" in text
    assert "yes: 3 sequences of 131,072 tokens at once" in text
    status, text = planned(*base, "engine.kwargs.tensor_parallel_size=2", "engine.kwargs.max_model_len=8192")
    assert (status, "yes: 4 sequences of 8,192" in text) == (0, True)


def test_two_nodes_are_suggested_where_one_is_too_small(
    checkpoint: Callable[..., str], planned: Callable[..., tuple[int, str]]
) -> None:
    base = ["engine=vllm", f"engine.model={checkpoint(DEEPSEEK_V3)}", "engine.kwargs.max_model_len=32768"]
    status, text = planned(*base, "hardware=8xh100")
    assert (status, "suggested none of these GPUs" in text) == (3, True)
    status, text = planned(*base, "hardware=2x8xh100")
    assert "engine.kwargs.tensor_parallel_size=8 engine.kwargs.pipeline_parallel_size=2" in text
    both = ["engine.kwargs.tensor_parallel_size=8", "engine.kwargs.pipeline_parallel_size=2"]
    assert planned(*base, "hardware=2x8xh100", *both)[0] == 0


def test_gpus_of_unknown_memory_are_said_to_be(
    checkpoint: Callable[..., str], planned: Callable[..., tuple[int, str]]
) -> None:
    base = ["engine=transformers", f"engine.model={checkpoint(LLAMA_8B)}", "hardware=gpu"]
    status, text = planned(*base)
    assert (status, "unknown: set hardware.gpu_memory" in text) == (0, True)
    assert planned(*base, "hardware.gpu_memory=80")[0] == 0
    status, text = planned(*base, "hardware.gpu_memory=16")
    assert (status, "the weights need 570.9 MiB more" in text) == (3, True)


def test_on_a_cpu_the_machines_memory_counts_or_the_profiles(
    checkpoint: Callable[..., str], planned: Callable[..., tuple[int, str]]
) -> None:
    base = ["engine=vllm", f"engine.model={checkpoint(LLAMA_8B)}", "hardware=cpu", "engine.kwargs.max_model_len=8192"]
    assert planned(*base, "hardware.memory=64")[0] == 0
    assert planned(*base, "hardware.memory=8")[0] == 3
    # Two ranks share the memory, and the weights.
    status, text = planned(*base, "hardware.memory=64", "engine.kwargs.tensor_parallel_size=2")
    assert (status, "32.0 GiB for each process" in text) == (0, True)
    assert "7.5 GiB on each process" in text


def test_a_gguf_file_is_read_by_its_header(planned: Callable[..., tuple[int, str]]) -> None:
    found = footprint(EngineConfig("llamacpp", str(gguf_path())))
    assert found is not None
    assert (found.parameters, found.heads, found.kv_heads, found.context) == (134_515_008, 9, 3, 4096)
    assert found.kv_bytes == 2 * 30 * 3 * 64 * 2
    assert found.weight_bytes == pytest.approx(gguf_path().stat().st_size, rel=0.03)
    packaged = footprint(EngineConfig("llamacpp", "smollm2", kwargs={"n_ctx": 512, "type_k": "q8_0"}))
    assert packaged is not None
    assert (packaged.weight_bytes, packaged.context) == (134_515_008 * 2, 512)  # it runs as F16
    assert packaged.kv_bytes == 30 * 3 * 64 * (16 + 8.5) / 8
    exact = footprint(EngineConfig("llamacpp", "smollm2", kwargs={"requantize": "f32"}))
    assert exact is not None and exact.kv_bytes == 2 * 30 * 3 * 64 * 4  # a cache as precise as the weights
    # llama.cpp reserves all its sequences: 90 MiB each.
    base = ["hardware.memory=1", "engine.kwargs.n_ctx=4096"]
    assert planned(*base, "engine.kwargs.n_seq_max=4")[0] == 0
    status, text = planned(*base, "engine.kwargs.n_seq_max=16")
    assert (status, "no: 7 sequences of 4,096 tokens at once, 16 needed" in text) == (3, True)


# --- the dataset -----------------------------------------------------------------------------------------------------

QUESTION = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is it blue? 🙂"}]}


def test_prompts_are_counted_as_the_engines_count(smollm2_checkpoint: Path) -> None:  # noqa: F811
    with load_engine("llamacpp", kwargs={"n_ctx": 256}) as engine:
        (completion,) = engine.infer([QUESTION], {"max_tokens": 1})
    for config in (EngineConfig("llamacpp", "smollm2"), EngineConfig("transformers", str(smollm2_checkpoint))):
        found = prompt_renderer(config)
        assert found is not None
        assert found.count(QUESTION["messages"], GenerationParams()) == completion.usage.input


def test_a_model_in_a_format_of_its_own_has_no_known_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "parrot", EngineKind("engines.echo:EchoEngine", holds_model=True, own_format=True))
    (tmp_path / "words.json").write_text("{}")
    config = EngineConfig("parrot", str(tmp_path / "words.json"))
    assert (footprint(config), prompt_renderer(config)) == (None, None)
    weights = identity(config).values["weights"]
    (tmp_path / "words.json").write_text('{"legs": "wings"}')
    assert weights != identity(config).values["weights"]  # the content is part of the key all the same


def test_rows_that_are_too_long_or_not_valid_are_found(
    write_jsonl: Callable[..., Path], planned: Callable[..., tuple[int, str]]
) -> None:
    rows = [
        *(ask(f"question {i}") for i in range(20)),
        ask("question 3"),
        ask("word " * 300, id="endless"),
        ask("short", id="greedy", generation={"max_tokens": 250}),
        '{"messages": [',
        {"messages": []},
        {"no": "conversation"},
        {"messages": "text"},
    ]
    base = [f"dataset.path={write_jsonl(rows)}", "engine.kwargs.n_ctx=256"]
    status, text = planned(*base, "generation.max_tokens=100")
    assert status == 3
    assert "27 in 1 file: 22 requests to send, 1 duplicate" in text
    assert "invalid 4 rows cannot be read" in text
    assert "in.jsonl:24: invalid JSON" in text
    assert "messages is empty" in text
    assert "1 prompt does not fit into the context of 256 tokens; 1 answer may be truncated" in text
    assert "endless: 331 tokens and 100 for the answer" in text
    assert "greedy: " in text
    assert "by the model's tokenizer and template" in text
    assert "too long none" in planned(*base, "dataset.limit=20")[1]
    assert planned(*base, "dataset.limit=20")[0] == 0


def test_without_a_tokenizer_prompts_are_estimated_and_said_to_be(
    checkpoint: Callable[..., str], write_jsonl: Callable[..., Path], planned: Callable[..., tuple[int, str]]
) -> None:
    data = write_jsonl([ask("x" * 4000)])
    base = ["engine=vllm", "hardware=8xh100", f"engine.model={checkpoint(LLAMA_8B)}", f"dataset.path={data}"]
    status, text = planned(*base)
    assert (status, "1,008 (estimated: 4 bytes of JSON a token)" in text) == (0, True)
    assert planned(*base, "engine.kwargs.max_model_len=1000")[0] == 3
    assert "time unknown: measure" in text


def test_cost_and_time_of_a_provider(write_jsonl: Callable[..., Path], planned: Callable[..., tuple[int, str]]) -> None:
    rows = [ask(f"{i:04}" + "x" * 3967) for i in range(500)]  # 1,000 tokens each, with the JSON around
    base = ["engine=openai", "engine.model=gpt-4o-mini", f"dataset.path={write_jsonl(rows)}", "generation.max_tokens=200"]
    priced = ["engine.price.input=1", "engine.price.output=10"]
    status, text = planned(*base, *priced, "engine.requests_per_minute=100", "engine.output_tokens_per_minute=10000")
    assert status == 0
    assert "prompt tokens 500,000 (estimated" in text
    assert "output tokens at most 100,000" in text
    assert "cost at most $1.50 by engine.price" in text
    assert "about 10.0 minutes by engine.output_tokens_per_minute" in text
    assert "cost at most $0.14 by the list price of 20" in planned(*base)[1]
    unlisted = [*base[:-1], "engine.model=gpt-nobody-knows"]
    status, text = planned(*unlisted, "engine.requests_per_minute=100")
    assert "output tokens about (not all answers have a limit: set generation.max_tokens) 256,000" in text
    assert "about 5.0 minutes by engine.requests_per_minute" in text
    assert "cost unknown" in text
    assert "too long unknown" in text


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["engine=echo"], "engine=echo holds no model here and dataset.path is missing: nothing to plan"),
        (["engine=vllm"], "engine.model is needed"),
        (["engine=vllm", "engine.model=/nowhere/at/all"], "engine.model: there is no directory /nowhere/at/all"),
        (["engine=vllm", "engine.model=."], "has no config.json"),
        (["engine.model=nowhere.gguf"], "there is no file nowhere.gguf"),
        (["hardware.gpu_memry=80"], "did you mean 'hardware.gpu_memory'?"),
        (["hardware.gpu_memory=-1"], "hardware.gpu_memory must be at least 0"),
        (["engine.kwargs.n_ctxx=1"], "did you mean 'n_ctx'?"),
        (["dataset.path=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    overrides: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert plan.main(overrides) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


@pytest.mark.parametrize("content", ["{}", "no JSON", "[]"])
def test_a_config_that_tells_nothing_is_refused(
    content: str, tmp_path: Path, planned: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "config.json").write_text(content)
    status, text = planned("engine=vllm", f"engine.model={tmp_path}")
    assert (status, text.startswith("eagleray: engine.model: ")) == (2, True)


def test_a_model_of_the_hub_needs_the_hub_and_nothing_heavy_is_imported(tmp_path: Path, write_jsonl: Any) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    argv = [sys.executable, "-m", "jobs.cli", "plan", "engine=vllm", "engine.model=org/model"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("eagleray: engine.model: config.json of org/model cannot be downloaded from the hub: ")
    assert done.stderr.count("\n") == 1
    code = f"""
import sys
from jobs.plan import main
assert main(["dataset.path={write_jsonl([ask("x")])}"]) == 0
print([name for name in ("ray", "torch", "transformers", "vllm") if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_help_is_short_and_names_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--help"]) == 0
    assert "Exit status: 0 it fits; 3" in capsys.readouterr().out
