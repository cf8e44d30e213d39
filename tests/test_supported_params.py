"""`supported_params` of every engine class, by model, and of engines with a provider of their own."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from engines import Engine, load_engine
from engines.fallback import FallbackEngine
from engines.params import GENERATION_FIELDS
from engines.registry import REGISTRY, engine_class
from engines.tasks import TASK_PARAMS

ALL = frozenset(GENERATION_FIELDS) - TASK_PARAMS
MESSAGES = ("min_p", "stop_token_ids", "seed", "n", "frequency_penalty", "presence_penalty", "repetition_penalty",
            "logit_bias", "logprobs")  # fmt: skip
OPENAI = ("top_k", "min_p", "stop_token_ids", "repetition_penalty")
# What the engines lack, as their providers document it.
LACKS: dict[str, Iterable[str]] = {
    "echo": (), "llamacpp": (), "transformers": (), "vllm": (), "sglang_offline": (),
    "openai": OPENAI, "vertex": (*OPENAI, "logit_bias"), "lambda": OPENAI,
    "anthropic": MESSAGES, "bedrock": MESSAGES, "sambanova": MESSAGES,
    "gemini": (*OPENAI, "seed", "frequency_penalty", "presence_penalty", "logit_bias", "logprobs"),
    "deepseek": (*OPENAI, "n", "seed", "logit_bias"),
    "together": ("stop_token_ids",), "fireworks": ("stop_token_ids",), "openrouter": ("stop_token_ids", "n"),
    "parasail": (), "remote_vllm": (), "sglang": (), "openai_compatible": (), "huggingface": OPENAI,
    "cerebras": (*OPENAI, "n", "frequency_penalty", "presence_penalty", "logit_bias"),
}  # fmt: skip

IMPORTS_TORCH = ("transformers", "vllm")


def class_of(kind: str) -> type[Engine]:
    if kind == "sglang_offline":  # SGLang itself is not installed here; the class needs it only to start
        from engines.local.sglang import SGLangOfflineEngine

        return SGLangOfflineEngine
    return engine_class(kind)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in IMPORTS_TORCH else k for k in REGISTRY])
def test_each_engine_class_tells_the_parameters_that_it_supports(kind: str) -> None:
    engine = class_of(kind)
    embeds = "embed" in engine.class_capabilities(None).tasks
    assert engine.supported_params() == (ALL | TASK_PARAMS if embeds else ALL) - set(LACKS[kind])


def test_the_parameters_depend_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from engines import AnthropicEngine, OpenAIEngine

    sampling = {"temperature", "top_p"}
    assert sampling <= OpenAIEngine.supported_params("gpt-4o-mini")
    assert not sampling & OpenAIEngine.supported_params("o3")
    assert sampling <= AnthropicEngine.supported_params("claude-sonnet-4-5")
    assert not sampling & AnthropicEngine.supported_params("claude-opus-4-7")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-nothing")
    with OpenAIEngine(model="o3") as engine:  # an engine answers for its own model
        assert not sampling & engine.supported_params()
        assert sampling <= engine.supported_params("gpt-4o-mini")


def test_an_engine_answers_for_a_provider_of_its_own() -> None:
    provider = {"unsupported": ["seed"], "models": [{"match": "think", "unsupported": ["temperature"]}]}
    with load_engine("acme", model="m", base_url="localhost:1", provider=provider | {"auth": "optional"}) as engine:
        assert engine.supported_params() == ALL - {"seed"}
        assert engine.supported_params("think-1") == ALL - {"seed", "temperature"}
        with load_engine("echo") as echo:
            assert FallbackEngine([engine, echo]).supported_params() == ALL - {"seed"}
