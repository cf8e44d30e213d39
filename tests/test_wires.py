"""The three wires: bodies against the official SDKs' own types and Bedrock's service model, answers read leniently."""

from __future__ import annotations

import base64
import json
import warnings
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import botocore.session
import pytest
from anthropic.types import Message as AnthropicMessage
from anthropic.types import StopReason
from anthropic.types.beta import BetaStopReason
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming as AnthropicBody
from botocore.validate import ParamValidator
from fireworks.types.chat.chat_completion_chunk import Choice as FireworksChunkChoice
from fireworks.types.shared.choice import Choice as FireworksChoice
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion import Choice as OpenAIChoice
from openai.types.chat.chat_completion_chunk import Choice as OpenAIChunkChoice
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as OpenAIBody
from pydantic import TypeAdapter
from together.types.chat.chat_completion import Choice as TogetherChoice
from together.types.chat.chat_completion_chunk import Choice as TogetherChunkChoice

import engines
from engines import Completion, EngineError, load_engine, registry
from engines.config import EngineConfig, config_from_keys, packaged
from engines.errors import ConfigError
from engines.params import GenerationParams
from engines.registry import HTTP_ENGINES
from engines.remote import anthropic_messages, bedrock_converse, openai_chat
from engines.remote.batch.factory import BATCH_APIS
from engines.remote.provider import BATCH_WIRES, ENDINGS, Provider, endpoints
from engines.remote.schemas import inline_refs
from engines.remote.wire_format import StreamAccumulator, WireFormat, finish_reason, read_answer
from engines.types import Request, called, to_request
from pipeline.configuration.compose import compose

PNG, JPEG = b"\x89PNG\r\n\x1a\n" + bytes(8), b"\xff\xd8\xff\xe0" + bytes(8)
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": SCHEMA}}
# OpenAI's tools that take free text, here of a grammar.
CUSTOM_TOOL = {"type": "custom", "custom": {"name": "run_code", "description": "d", "format": {
    "type": "grammar", "grammar": {"syntax": "regex", "definition": "[0-9+]+"}}}}  # fmt: skip
CUSTOM_CALL = {"id": "c1", "type": "custom", "custom": {"name": "run_code", "input": "1+\n2"}}
PARSED: dict[str, WireFormat] = {"chat": openai_chat, "messages": anthropic_messages, "converse": bedrock_converse}
KEY = "sk-some-key-0123456789"


def call(id: str, **arguments: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "weather", "arguments": json.dumps(arguments)}}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


# What people have in their datasets: name -> (messages, generation).
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one turn": ([{"role": "user", "content": "hi"}], {"max_tokens": 9, "temperature": 0.5, "stop": ["x"]}),
    "system prompts anywhere": (
        [{"role": "system", "content": "first"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
         {"role": "developer", "content": "second"}, {"role": "user", "content": "c"}], {}),
    "neighbours of one role": (
        [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]},
         {"role": "assistant", "content": "c"}, {"role": "assistant", "content": "d"},
         {"role": "user", "content": "e"}], {}),
    "parallel tool calls": (
        [{"role": "user", "content": "a"},
         {"role": "assistant", "content": None, "tool_calls": [call("1", n=1), call("2", n=2)]},
         {"role": "tool", "tool_call_id": "1", "content": "sun"},
         {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "rain"}]},
         {"role": "user", "content": "so?"}], {"tools": [TOOL], "tool_choice": "auto"}),
    "a tool that must be called": (
        [{"role": "user", "content": "a"}],
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}}),
    "some tool must be called": ([{"role": "user", "content": "a"}], {"tools": [TOOL], "tool_choice": "required"}),
    "no tool may be called": ([{"role": "user", "content": "a"}], {"tools": [TOOL], "tool_choice": "none"}),
    "images": (
        [{"role": "user", "content": [image(data_url(PNG, "jpeg")), {"type": "text", "text": "and"},
                                      image(data_url(JPEG, "png"))]}], {}),
    "a schema": (
        [{"role": "user", "content": "a"}],
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}}),
    "a schema without a name": (
        [{"role": "user", "content": "a"}], {"response_format": {"type": "json_schema", "schema": SCHEMA}}),
    "effort": ([{"role": "user", "content": "a"}], {"reasoning_effort": "low"}),
}  # fmt: skip
OPENAI_CASES = {
    "samples": ([{"role": "user", "content": "a"}], {"n": 3, "logprobs": 4, "seed": 1, "logit_bias": {"5": 2}, "top_p": 0.5,
                                                     "presence_penalty": 0.1, "frequency_penalty": 0.2}),
    "json": ([{"role": "user", "content": "a"}], {"response_format": {"type": "json_object"}}),
    "custom tools": (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [CUSTOM_CALL]},
         {"role": "tool", "tool_call_id": "c1", "content": "3"}],
        {"tools": [TOOL, CUSTOM_TOOL], "tool_choice": {"type": "custom", "custom": {"name": "run_code"}}}),
    "an image on the web": ([{"role": "user", "content": [image("https://x.example/a.png")]}], {}),
}  # fmt: skip


def request(case: tuple[list[dict[str, Any]], dict[str, Any]]) -> Request:
    return to_request({"messages": case[0]}, GenerationParams.parse(case[1]))


def provider(kind: str, model: str | None = None, caching: bool = False) -> Provider:
    found = Provider.of(config_from_keys(kind, {"model": model}))
    if not caching:
        found = Provider(**{**found.__dict__, "prompt_caching": False})
    return found.for_model(model)


def plain(value: Any) -> Any:
    """Pydantic checks an iterable when it is read."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return [plain(item) for item in value]
    return value


def conforms(type: Any, body: dict[str, Any]) -> None:
    """`body` is one of `type`, and has nothing that the type does not know (pydantic leaves that out)."""
    assert plain(TypeAdapter(type).validate_python(body)) == body


# -- bodies -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CASES, *OPENAI_CASES])
@pytest.mark.parametrize("model", ["gpt-4o-mini", "gpt-5"])
def test_bodies_are_openais(name: str, model: str) -> None:
    asked = request({**CASES, **OPENAI_CASES}[name])
    found = provider("openai", model)
    if found.capabilities().unsupported_parameter(asked.generation):
        pytest.skip(f"{model} does not take it; refused before this")
    conforms(OpenAIBody, openai_chat.body(asked, model, found))


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_bodies_are_anthropics(name: str, caching: bool) -> None:
    messages_, generation = CASES[name]
    asked = request((messages_, {"max_tokens": 100, **{k: v for k, v in generation.items() if k != "temperature"}}))
    conforms(AnthropicBody, anthropic_messages.body(asked, "claude-sonnet-5", provider("anthropic", None, caching)))


def test_anthropic_takes_an_image_on_the_web() -> None:
    asked = request(([{"role": "user", "content": [image("https://x.example/a.png")]}], {"max_tokens": 5}))
    conforms(AnthropicBody, anthropic_messages.body(asked, "m", provider("anthropic")))


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_bodies_are_bedrocks(name: str, caching: bool) -> None:
    bedrock_body(request(CASES[name]), caching)


def bedrock_body(asked: Request, caching: bool = False) -> dict[str, Any]:
    """The body, checked against Bedrock's service model."""
    shape = botocore.session.get_session().get_service_model("bedrock-runtime").operation_model("Converse").input_shape
    body = bedrock_converse.body(asked, "amazon.nova-lite-v1:0", provider("bedrock", None, caching))
    report = ParamValidator().validate(body, shape)
    assert not report.has_errors(), report.generate_report()
    return body


def test_nothing_of_a_conversation_is_lost_on_any_wire() -> None:
    system, user = CASES["system prompts anywhere"], CASES["parallel tool calls"]
    found = anthropic_messages.body(request(system), "m", provider("anthropic"))
    assert [block["text"] for block in found["system"]] == ["first", "second"]
    assert [turn["role"] for turn in found["messages"]] == ["user", "assistant", "user"]
    turns = anthropic_messages.body(request(user), "m", provider("anthropic"))["messages"]
    assert [block["input"] for block in turns[1]["content"]] == [{"n": 1}, {"n": 2}]
    assert [block["type"] for block in turns[2]["content"]] == ["tool_result", "tool_result", "text"]
    found = bedrock_converse.body(request(system), "m", provider("bedrock"))
    assert [block["text"] for block in found["system"]] == ["first", "second"]
    turns = bedrock_converse.body(request(user), "m", provider("bedrock"))["messages"]
    assert [block["toolUse"]["input"] for block in turns[1]["content"]] == [{"n": 1}, {"n": 2}]
    assert [next(iter(block)) for block in turns[2]["content"]] == ["toolResult", "toolResult", "text"]
    found = openai_chat.body(request(system), "m", provider("openai"))
    assert found["messages"] == system[0]  # as they came
    assert [m["role"] for m in openai_chat.body(request(system), "m", provider("together"))["messages"]].count(
        "system"
    ) == 2


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
turns = st.tuples(st.sampled_from(["system", "user", "assistant"]), texts)


@given(st.lists(turns, min_size=1, max_size=8))
def test_every_text_reaches_every_wire_in_its_order(said: list[tuple[str, str]]) -> None:
    said = [*said, ("user", "end")]
    asked = request(([{"role": role, "content": text} for role, text in said], {"max_tokens": 5}))
    system = [text for role, text in said if role == "system"]
    others = [text for role, text in said if role != "system"]
    for wire, kind in ((anthropic_messages, "anthropic"), (bedrock_converse, "bedrock")):
        body = wire.body(asked, "m", provider(kind))
        assert [block["text"] for block in body.get("system", [])] == system
        assert [block["text"] for turn in body["messages"] for block in turn["content"]] == others
        roles = [turn["role"] for turn in body["messages"]]
        assert all(a != b for a, b in pairwise(roles))
    assert [(m["role"], m["content"]) for m in openai_chat.body(asked, "m", provider("openai"))["messages"]] == said


@pytest.mark.parametrize("form", ["path", "file", "data"])
def test_images_are_named_by_their_bytes(tmp_path: Path, form: str) -> None:
    file = tmp_path / "a picture.jpg"
    file.write_bytes(PNG)
    url = {"path": str(file), "file": file.as_uri(), "data": data_url(PNG, "jpeg")}[form]
    asked = request(([{"role": "user", "content": [image(url)]}], {"max_tokens": 5}))
    part = openai_chat.body(asked, "m", provider("openai"))["messages"][0]["content"][0]
    assert part["image_url"]["url"] == data_url(PNG, "png")
    source = anthropic_messages.body(asked, "m", provider("anthropic"))["messages"][0]["content"][0]["source"]
    assert (source["media_type"], base64.b64decode(source["data"])) == ("image/png", PNG)
    block = bedrock_converse.body(asked, "m", provider("bedrock"))["messages"][0]["content"][0]["image"]
    assert block == {"format": "png", "source": {"bytes": PNG}}


@pytest.mark.parametrize(
    ("messages_", "said"),
    [([{"role": "user", "content": [image("/no/such.png")]}], "cannot be read"),
     ([{"role": "user", "content": [image("file://[x")]}], "cannot be read"),
     ([{"role": "user", "content": [image("~nobody-of-that-name/x.png")]}], "cannot be read"),
     ([{"role": "user", "content": [image("a\0b.png")]}], "cannot be read"),
     ([{"role": "user", "content": [image("x" * 5000)]}], "cannot be read"),
     ([{"role": "user", "content": [image(__file__)]}], "is not a PNG, JPEG, GIF or WebP"),
     ([{"role": "user", "content": [image("data:image/png;base64,%%")]}], "not valid base64"),
     ([{"role": "user", "content": [{"type": "video", "url": "x"}]}], "'video' cannot be sent"),
     ([{"role": "system", "content": "alone"}], "not a system prompt"),
     ([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], "needs a tool_call_id"),
     ([{"role": "assistant", "content": None, "tool_calls": [
         {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]}],
      "arguments that are a JSON object")],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["anthropic", "bedrock"])
def test_what_cannot_be_said_on_a_wire_is_refused(kind: str, messages_: list[dict[str, Any]], said: str) -> None:
    wire = anthropic_messages if kind == "anthropic" else bedrock_converse
    with pytest.raises(EngineError, match=said) as refused:
        wire.body(request((messages_, {"max_tokens": 5})), "m", provider(kind))
    assert refused.value.type == "invalid_input"


def test_prompt_caching_marks_the_system_prompt_where_it_must_be_marked() -> None:
    asked = request(CASES["system prompts anywhere"])
    assert anthropic_messages.body(asked, "m", provider("anthropic", None, True))["system"][-1]["cache_control"]
    assert "cache_control" not in json.dumps(anthropic_messages.body(asked, "m", provider("anthropic")))
    # No mark beside the author's own: there may be four, and one of an hour may not follow ours.
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "ttl": "1h"}}
    own = request(([{"role": "system", "content": "s"}, {"role": "user", "content": [part]}], {"max_tokens": 5}))
    assert json.dumps(anthropic_messages.body(own, "m", provider("anthropic", None, True))).count("cache_control") == 1
    assert {"cachePoint": {"type": "default"}} in bedrock_converse.body(asked, "m", provider("bedrock", None, True))[
        "system"
    ]
    assert openai_chat.body(asked, "m", provider("openai", None, True)) == openai_chat.body(asked, "m", provider("openai"))


def test_schemas_have_no_references_where_they_may_have_none() -> None:
    schema = {"$defs": {"A": {"type": "object", "properties": {"b": {"$ref": "#/$defs/B"}}}, "B": {"type": "integer"}},
              "properties": {"a": {"$ref": "#/$defs/A", "description": "d"}}}  # fmt: skip
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    generation = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}, "tools": [tool]}
    body = openai_chat.body(request(([{"role": "user", "content": "a"}], generation)), "m", provider("gemini"))
    assert "$ref" not in json.dumps(body)
    inlined = {"properties": {"a": {"type": "object", "properties": {"b": {"type": "integer"}}, "description": "d"}}}
    assert body["tools"][0]["function"]["parameters"] == inlined
    with pytest.raises(ValueError, match="refers to itself"):
        inline_refs({"$defs": {"T": {"items": {"$ref": "#/$defs/T"}}}, "items": {"$ref": "#/$defs/T"}})
    with pytest.raises(ValueError, match="has nothing at #/x"):
        inline_refs({"items": {"$ref": "#/x"}})


# -- answers ------------------------------------------------------------------------------------------------------------


def test_an_answer_of_openais_own_type_is_read_whole() -> None:
    token = {"token": "hi", "logprob": -0.1, "bytes": None, "top_logprobs": []}
    message = {"role": "assistant", "content": None, "tool_calls": [call("1", n=1)], "reasoning_content": "hm"}
    payload = ChatCompletion.model_validate({
        "id": "c", "object": "chat.completion", "created": 1, "model": "gpt-4o-2024", "choices": [
            {"index": 0, "finish_reason": "tool_calls", "message": message},
            {"index": 1, "finish_reason": "length", "message": {"role": "assistant", "content": "hi"},
             "logprobs": {"content": [token], "refusal": None}}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14,
                  "prompt_tokens_details": {"cached_tokens": 4}}}).model_dump()  # fmt: skip
    found = openai_chat.completion(payload, Provider())
    assert found.tool_calls == [call("1", n=1)]
    assert (found.finish_reason, found.choices[1].finish_reason, found.reasoning) == ("tool_calls", "length", "hm")
    assert found.choices[1].logprobs == [token]
    assert (found.usage.input, found.usage.cached_input, found.usage.output) == (9, 4, 5)
    assert found.model == "gpt-4o-2024"


def anthropic_answer(content: list[dict[str, Any]], reason: str) -> Completion:
    payload = AnthropicMessage.model_validate({
        "id": "m", "type": "message", "role": "assistant", "model": "claude", "content": content, "stop_reason": reason,
        "stop_sequence": None, "usage": {"input_tokens": 3, "output_tokens": 5, "cache_read_input_tokens": 7,
                                         "cache_creation_input_tokens": 2}}).model_dump()  # fmt: skip
    return anthropic_messages.completion(payload, Provider())


def test_an_answer_of_anthropics_own_type_is_read_whole() -> None:
    found = anthropic_answer(
        [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "one"},
         {"type": "text", "text": " two"}, {"type": "tool_use", "id": "1", "name": "weather", "input": {"n": 1}}],
        "tool_use",
    )  # fmt: skip
    assert (found.text, found.reasoning, found.finish_reason) == ("one two", "hm", "tool_calls")
    assert found.tool_calls is not None
    assert json.loads(found.tool_calls[0]["function"]["arguments"]) == {"n": 1}
    assert (found.usage.input, found.usage.cached_input, found.usage.output) == (12, 7, 5)


def test_thinking_alone_is_an_answer_and_is_not_bought_again() -> None:
    found = anthropic_answer([{"type": "thinking", "thinking": "hm", "signature": "s"}], "max_tokens")
    assert (found.text, found.reasoning, found.finish_reason, found.error) == (None, "hm", "length", None)
    payload = {"choices": [{"message": {"content": None, "reasoning": "hm"}, "finish_reason": "stop"}]}
    assert openai_chat.completion(payload, Provider()).reasoning == "hm"


def test_an_answer_of_bedrocks_is_read_whole() -> None:
    blocks = [{"reasoningContent": {"reasoningText": {"text": "hm"}}}, {"text": "one"},
              {"toolUse": {"toolUseId": "1", "name": "weather", "input": {"n": 1}}}]  # fmt: skip
    usage = {"inputTokens": 3, "outputTokens": 5, "totalTokens": 8, "cacheReadInputTokens": 7}
    payload = {"output": {"message": {"role": "assistant", "content": blocks}}, "stopReason": "tool_use", "usage": usage}
    found = bedrock_converse.completion(payload, Provider())
    assert (found.text, found.reasoning, found.finish_reason) == ("one", "hm", "tool_calls")
    assert (found.usage.input, found.usage.cached_input, found.usage.output) == (10, 7, 5)


@pytest.mark.parametrize(
    ("choice", "text", "finish"),
    [({"message": {"content": [{"type": "text", "text": "a"}, {"text": "b"}]}, "finish_reason": "stop"}, "ab", "stop"),
     ({"message": {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
       "finish_reason": "stop"}, "", "tool_calls"),
     ({"message": {"content": None}, "finish_reason": "length"}, None, "length")],
)  # fmt: skip
def test_odd_answers_are_read(choice: dict[str, Any], text: str | None, finish: str) -> None:
    found = openai_chat.completion({"choices": [choice], "usage": {"prompt_tokens": "many"}}, Provider())
    assert (found.text, found.finish_reason) == (text, finish)
    assert found.usage.input == 0


# -- finish reasons -----------------------------------------------------------------------------------------------------


def test_each_table_has_every_reason_of_the_official_sdk() -> None:
    bedrock = botocore.session.get_session().get_service_model("bedrock-runtime").shape_for("StopReason").enum
    for choice in (OpenAIChoice, OpenAIChunkChoice):
        assert reasons_of(choice) <= set(openai_chat.FINISH_REASONS)
    assert set(get_args(StopReason)) | set(get_args(BetaStopReason)) == set(anthropic_messages.FINISH_REASONS)
    assert set(bedrock) == set(bedrock_converse.FINISH_REASONS)
    for wire in PARSED.values():
        assert set(wire.FINISH_REASONS.values()) <= set(ENDINGS)


def reasons_of(choice: Any) -> set[str]:
    """The finish reasons in the type of an SDK's choice."""

    def literals(type: Any) -> Iterable[str]:
        for argument in get_args(type):
            yield from [argument] if isinstance(argument, str) else literals(argument)

    found = set(literals(choice.model_fields["finish_reason"].annotation))
    assert found
    return found


@pytest.mark.parametrize(
    ("kind", "choices"),
    [("together", [TogetherChoice, TogetherChunkChoice]), ("fireworks", [FireworksChoice, FireworksChunkChoice])],
)
def test_a_providers_table_has_every_reason_of_its_own_sdk(kind: str, choices: list[Any]) -> None:
    known = set(openai_chat.FINISH_REASONS) | set(provider(kind).finish_reasons)
    for choice in choices:
        assert reasons_of(choice) <= known


def ended(wire: str, reason: Any, text: str | None = "half", kind: str | None = None) -> Completion:
    usage = {
        "prompt_tokens": 7,
        "completion_tokens": 5,
        "input_tokens": 7,
        "output_tokens": 5,
        "inputTokens": 7,
        "outputTokens": 5,
    }
    blocks = [{"type": "text", "text": text}] if text is not None else []
    payload = {
        "chat": {"choices": [{"message": {"content": text}, "finish_reason": reason}]},
        "messages": {"content": blocks, "stop_reason": reason},
        "converse": {"output": {"message": {"content": blocks}}, "stopReason": reason},
    }[wire]
    return read_answer(PARSED[wire], {**payload, "usage": usage}, provider(kind) if kind else Provider())


@pytest.mark.parametrize(
    ("wire", "reason", "finish"),
    [("chat", "stop", "stop"), ("chat", "length", "length"), ("chat", "model_length", "length"),
     ("chat", "content_filter", "content_filter"), ("messages", "end_turn", "stop"), ("messages", "max_tokens", "length"),
     ("messages", "pause_turn", "length"), ("messages", "model_context_window_exceeded", "length"),
     ("messages", "refusal", "content_filter"), ("converse", "end_turn", "stop"), ("converse", "stop_sequence", "stop"),
     ("converse", "model_context_window_exceeded", "length"), ("converse", "guardrail_intervened", "content_filter")],
)  # fmt: skip
def test_an_answer_says_how_it_ended(wire: str, reason: str, finish: str) -> None:
    found = ended(wire, reason)
    assert (found.text, found.finish_reason) == ("half", finish)


@pytest.mark.parametrize(
    ("wire", "reason", "type"),
    [("chat", "error", "server"), ("chat", "abort", "server"), ("chat", "tool_calls", "bad_response"),
     ("converse", "malformed_tool_use", "bad_response")],
)  # fmt: skip
def test_a_broken_end_is_a_retryable_error_that_is_paid(wire: str, reason: str, type: str) -> None:
    with pytest.raises(EngineError) as broken:
        ended(wire, reason)
    assert (broken.value.type, broken.value.retryable) == (type, True)
    assert broken.value.usage is not None and broken.value.usage.output == 5


@pytest.mark.parametrize("wire", ["chat", "messages", "converse"])
def test_an_unknown_end_is_an_error_that_is_paid_once_and_says_how_to_accept_it(wire: str) -> None:
    for reason, said, accepts in (
        (None, "no finish reason", "engine.provider.finish_reasons.null=stop"),
        ("", "no finish reason", "engine.provider.finish_reasons.null=stop"),
        ("of tomorrow", "'of tomorrow'", "engine.provider.finish_reasons={of tomorrow: stop}"),
    ):
        with pytest.raises(EngineError) as unknown:
            ended(wire, reason)
        assert (unknown.value.type, unknown.value.retryable) == ("bad_response", False)
        assert unknown.value.usage is not None and unknown.value.usage.output == 5
        assert said in str(unknown.value) and accepts in str(unknown.value)
        accepted = Provider.of(compose(["engine=openai_compatible", "engine.model=m", accepts]).engine)
        assert finish_reason(reason, PARSED[wire].FINISH_REASONS, accepted) == "stop"


@pytest.mark.parametrize(
    ("kind", "reason", "finish"),
    [("together", "eos", "stop"), ("gemini", "MAX_TOKENS", "length"), ("vertex", "SAFETY", "content_filter"),
     ("gemini", "content_filter: PROHIBITED_CONTENT", "content_filter"), ("huggingface", "eos_token", "stop"),
     ("openai_compatible", "end_turn", "stop"), ("openai_compatible", "sensitive", "content_filter"),
     ("remote_vllm", "repetition", "length"), ("deepseek", "insufficient_system_resource", None),
     ("gemini", "CONTINUATION", "length"), ("vertex", "MODEL_ARMOR", "content_filter"), ("gemini", "OTHER", None),
     ("huggingface", "sensitive", "content_filter"), ("huggingface", "network_error", None),
     ("gemini", "function_call_filter: MALFORMED_FUNCTION_CALL", None)],
)  # fmt: skip
def test_providers_name_reasons_of_their_own(kind: str, reason: str, finish: str | None) -> None:
    if finish:
        assert ended("chat", reason, kind=kind).finish_reason == finish
    else:
        with pytest.raises(EngineError, match=reason.partition(":")[0]) as broken:
            ended("chat", reason, kind=kind)
        assert broken.value.retryable
    if not reason.startswith("content_filter"):  # nobody else means that by it
        with pytest.raises(EngineError, match="unknown finish reason"):
            ended("chat", reason, kind="openai")


def test_a_provider_may_say_what_no_reason_means() -> None:
    payload = {"choices": [{"message": {"content": "a"}}]}
    own = Provider.of(config_from_keys("acme", {"provider": {"finish_reasons": {"null": "stop"}}}))
    assert openai_chat.completion(payload, own).finish_reason == "stop"
    with pytest.raises(ConfigError, match="did you mean 'length'"):
        Provider.of(config_from_keys("acme", {"provider": {"finish_reasons": {"cut": "lenght"}}}))


def test_an_error_beside_half_a_text_is_an_error() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 5}
    error = {"code": 429, "message": "upstream is busy"}
    choice = {"index": 0, "message": {"content": "half"}, "finish_reason": "stop"}
    for payload in ({"choices": [{**choice, "error": error}]}, {"choices": [choice], "error": error}):
        with pytest.raises(EngineError, match="upstream is busy") as broken:
            read_answer(openai_chat, {**payload, "usage": usage}, Provider())
        assert (broken.value.type, broken.value.retryable, broken.value.usage.output) == ("rate_limit", True, 5)  # type: ignore[union-attr]


def test_choices_are_in_order_and_one_filtered_choice_loses_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    usage = {"prompt_tokens": 7, "completion_tokens": 5}

    def choice(index: int, text: str | None, finish: str = "stop", **more: Any) -> dict[str, Any]:
        return {"index": index, "message": {"role": "assistant", "content": text, **more}, "finish_reason": finish}

    with load_engine("openai", model="gpt-4o") as engine:
        three = [choice(2, "c"), choice(0, "a"), choice(1, None, "content_filter")]
        found = engine.read({"choices": three, "usage": usage}, 3)  # type: ignore[attr-defined]
        assert [c.message["content"] for c in found.choices] == ["a", None, "c"]
        assert [c.finish_reason for c in found.choices] == ["stop", "content_filter", "stop"]
        refused = [choice(0, None, refusal="No."), choice(1, "b")]
        found = engine.read({"choices": refused, "usage": usage}, 2)  # type: ignore[attr-defined]
        assert [c.finish_reason for c in found.choices] == ["content_filter", "stop"]
        with pytest.raises(EngineError, match="refused: No") as filtered:
            engine.read({"choices": refused[:1], "usage": usage})  # type: ignore[attr-defined]
        assert filtered.value.type == "content_filter"
        with pytest.raises(EngineError, match="2 choices where generation.n=3") as fewer:
            engine.read({"choices": refused, "usage": usage}, 3)  # type: ignore[attr-defined]
        assert (fewer.value.type, fewer.value.retryable, fewer.value.usage.output) == ("bad_response", False, 5)  # type: ignore[union-attr]


# -- what the next turn needs -------------------------------------------------------------------------------------------


def streamed(accumulator: StreamAccumulator, events: list[dict[str, Any]]) -> dict[str, Any]:
    for event in events:
        list(accumulator.add(event))
    return accumulator.payload()


def test_a_legacy_function_call_is_a_tool_call() -> None:
    legacy = {"name": "f", "arguments": '{"x": 1}'}
    whole = {"choices": [{"message": {"content": None, "function_call": legacy}, "finish_reason": "function_call"}]}
    pieces: list[dict[str, Any]] = [
        {"function_call": {"name": "f", "arguments": '{"x"'}},
        {"function_call": {"arguments": ": 1}"}},
    ]
    events = [{"choices": [{"index": 0, "delta": piece}]} for piece in pieces]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "function_call"}]})
    for payload in (whole, streamed(openai_chat.accumulator(), events)):
        found = openai_chat.completion(payload, Provider())
        assert (found.finish_reason, found.text) == ("tool_calls", None)
        assert found.tool_calls == [{"id": "call_0", "type": "function", "function": legacy}]


def test_streamed_calls_that_share_an_index_are_told_apart_by_their_ids() -> None:
    """Gemini's OpenAI endpoint gives all calls the index 0. Other servers repeat the id and the name in each piece."""
    begun, rest = call("2", n=2), {"index": 0, "function": {"arguments": '{"n": 2}'}}
    begun["function"] = {**begun["function"], "arguments": ""}
    repeated = {"index": 1, "id": "3", "type": "function", "function": {"name": "weather", "arguments": '{"n"'}}
    pieces = [{"index": 0, **call("1", n=1)}, {"index": 0, **begun}, rest, repeated]
    pieces.append({**repeated, "function": {"name": "weather", "arguments": ": 3}"}})
    events: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": {"tool_calls": [piece]}}]} for piece in pieces]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    found = openai_chat.completion(streamed(openai_chat.accumulator(), events), Provider())
    assert found.tool_calls == [call("1", n=1), call("2", n=2), call("3", n=3)]


def test_a_stream_of_a_mistral_model_that_reasons_is_its_answer() -> None:
    """It sends the reasoning in content parts, and then the answer as text."""
    thinking = [[{"type": "thinking", "thinking": [{"type": "text", "text": text}]}] for text in ("Let me ", "see.")]
    accumulator, said = openai_chat.accumulator(), []
    for content in ["", *thinking, "Par", "is", [{"type": "text", "text": "."}]]:
        said += list(accumulator.add({"choices": [{"index": 0, "delta": {"content": content}}]}))
    said += list(accumulator.add({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
    found = openai_chat.completion(accumulator.payload(), Provider())
    assert (found.text, found.reasoning, found.finish_reason) == ("Paris.", "Let me see.", "stop")
    assert [(each.text, each.reasoning) for each in said] == [
        ("", "Let me "), ("", "see."), ("Par", ""), ("is", ""), (".", ""),
    ]  # fmt: skip


def test_calls_of_custom_tools_and_of_other_types_are_kept_as_they_came() -> None:
    other = {"id": "s1", "type": "search", "search": {"query": "q"}}  # a type that no API has yet
    calls = [call("1", n=1), CUSTOM_CALL, other]
    whole = {"choices": [{"message": {"content": None, "tool_calls": calls}, "finish_reason": "tool_calls"}]}
    pieces: list[dict[str, Any]] = [
        {"index": 0, **call("1", n=1), "custom": None},
        {"index": 1, "id": "c1", "type": "custom", "custom": {"name": "run_code", "input": ""}, "function": None},
        {"index": 1, "custom": {"input": "1+"}},
        {"index": 1, "custom": {"input": "\n2"}},
        {"index": 2, **other},
    ]
    events: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": {"tool_calls": [piece]}}]} for piece in pieces]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    for payload in (whole, streamed(openai_chat.accumulator(), events)):
        found = openai_chat.completion(payload, Provider())
        assert (found.finish_reason, found.text, found.tool_calls) == ("tool_calls", None, calls)
        again = request(([{"role": "user", "content": "a"}, dict(found.message or {})], {}))
        assert openai_chat.body(again, "m", provider("openai"))["messages"][1]["tool_calls"] == calls
    assert [called(each) for each in calls[:2]] == [("weather", '{"n": 1}'), ("run_code", "1+\n2")]


@pytest.mark.parametrize("kind", ["anthropic", "bedrock", "remote_vllm", "sglang", "llamacpp", "transformers", "vllm"])
def test_custom_tools_are_refused_by_engines_that_cannot_have_them(kind: str) -> None:
    config = config_from_keys(kind, {"model": "m"})
    able = provider(kind).capabilities() if config.provider else registry.engine_class(kind, {}).capabilities
    for messages_, generation, place in (
        ([{"role": "user", "content": "a"}], {"tools": [TOOL, CUSTOM_TOOL]}, "generation.tools"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [CUSTOM_CALL]}], {},
         "messages[1].tool_calls"),
    ):  # fmt: skip
        refused = able.refusal(request((messages_, generation)), config)
        said = f"engine={kind} takes functions as tools only; {place} has a tool of type 'custom'"
        assert refused is not None and (refused.type, str(refused)) == ("invalid_input", said)
    own = {"type": "custom", "name": "weather", "input_schema": SCHEMA}  # Anthropic's form of a function
    assert able.refusal(request(([{"role": "user", "content": "a"}], {"tools": [TOOL, own]})), config) is None


def test_geminis_thought_signature_goes_back_as_it_came() -> None:
    signed = {**call("1", n=1), "extra_content": {"google": {"thought_signature": "s"}}}
    whole = {
        "choices": [{"message": {"content": None, "tool_calls": [{**signed, "index": 0}]}, "finish_reason": "tool_calls"}]
    }
    events = [{"choices": [{"index": 0, "delta": {"tool_calls": [signed]}, "finish_reason": "tool_calls"}]}]
    for payload in (whole, streamed(openai_chat.accumulator(), events)):
        message = openai_chat.completion(payload, Provider()).message
        assert message is not None and message["tool_calls"] == [signed]
        again = request(([{"role": "user", "content": "a"}, dict(message),
                          {"role": "tool", "tool_call_id": "1", "content": "sun"}], {}))  # fmt: skip
        assert openai_chat.body(again, "m", provider("gemini"))["messages"][1]["tool_calls"] == [signed]


def test_reasoning_goes_back_where_the_provider_wants_it() -> None:
    calls = {"content": None, "tool_calls": [call("1", n=1)], "reasoning_content": "hm"}
    plain_, calling = (
        openai_chat.completion({"choices": [{"message": message, "finish_reason": "stop"}]}, Provider()).message
        for message in ({"content": "b", "reasoning_content": "hm"}, calls)
    )
    assert plain_ == {"role": "assistant", "content": "b", "reasoning_content": "hm"}
    asked = request(([{"role": "user", "content": "a"}, dict(plain_ or {}), dict(calling or {}),
                      {"role": "tool", "tool_call_id": "1", "content": "sun"}], {}))  # fmt: skip
    for kind, model, sent in (("deepseek", "deepseek-v4-pro", [False, True]),
                              ("deepseek", "deepseek-reasoner", [False, False]),
                              ("remote_vllm", "m", [True, True]), ("openai", "m", [False, False]),
                              ("openai_compatible", "m", [False, True])):  # fmt: skip
        said = openai_chat.body(asked, model, provider(kind, model))["messages"][1:3]
        assert ["reasoning_content" in message for message in said] == sent, (kind, model)


def test_what_else_an_answer_has_is_kept_and_sent_in_the_form_of_a_request() -> None:
    def read(**message: Any) -> dict[str, Any]:
        choice = {"message": {"content": None, **message}, "finish_reason": "stop"}
        found = openai_chat.completion({"choices": [choice]}, Provider()).message
        return dict(found or {})

    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "b"}]
    assert read(content=parts) == {"role": "assistant", "content": "b", "reasoning_content": "hm"}  # Mistral's form
    audio = {"id": "audio_1", "data": "AAAA", "expires_at": 1, "transcript": "hi"}
    picture = {"type": "image_url", "image_url": {"url": data_url(PNG, "png")}}
    spoken, drawn = read(audio=audio), read(content="here", images=[picture], annotations=[{"type": "url_citation"}])
    assert spoken["audio"] == audio and drawn["images"] == [picture] and drawn["annotations"]
    asked = request(([{"role": "user", "content": "a"}, spoken, {"role": "user", "content": "c"}, drawn,
                      {"role": "user", "content": "d"}], {}))  # fmt: skip
    body = openai_chat.body(asked, "m", provider("openai"))
    conforms(OpenAIBody, body)
    assert body["messages"][1]["audio"] == {"id": "audio_1"}
    assert body["messages"][3] == {"role": "assistant", "content": "here"}


def test_signed_thinking_goes_back_unchanged() -> None:
    blocks: list[dict[str, Any]] = [
        {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "redacted_thinking", "data": "cmVk"},
        {"type": "text", "text": "b"}]  # fmt: skip
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {"model": "m", "usage": {}}},
        {"type": "content_block_start", "content_block": {"type": "thinking", "thinking": "", "signature": ""}},
        {"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "hm"}},
        {"type": "content_block_delta", "delta": {"type": "signature_delta", "signature": "s"}},
        {"type": "content_block_stop"},
        {"type": "content_block_start", "content_block": blocks[1]}, {"type": "content_block_stop"},
        {"type": "content_block_start", "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "b"}}, {"type": "content_block_stop"},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}]  # fmt: skip
    whole = {"content": blocks, "stop_reason": "end_turn"}
    for payload in (whole, streamed(anthropic_messages.accumulator(), events)):
        message = anthropic_messages.completion(payload, Provider()).message
        assert message is not None and (message["content"], message["thinking_blocks"]) == ("b", blocks[:2])  # type: ignore[typeddict-item]
        asked = request(
            ([{"role": "user", "content": "a"}, dict(message), {"role": "user", "content": "c"}], {"max_tokens": 5})
        )
        body = anthropic_messages.body(asked, "m", provider("anthropic"))
        conforms(AnthropicBody, body)
        assert body["messages"][1]["content"] == blocks
        assert "thinking_blocks" not in openai_chat.body(asked, "m", provider("openai"))["messages"][1]
    theirs = [{"reasoningContent": {"reasoningText": {"text": "hm", "signature": "s"}}},
              {"reasoningContent": {"redactedContent": b"red"}}, {"text": "b"}]  # fmt: skip
    answer = {"output": {"message": {"content": theirs}}, "stopReason": "end_turn"}
    message = bedrock_converse.completion(answer, Provider()).message
    assert message is not None
    asked = request(([{"role": "user", "content": "a"}, dict(message), {"role": "user", "content": "c"}], {}))
    assert bedrock_body(asked)["messages"][1]["content"] == theirs


def test_arguments_cut_off_in_a_stream_stay_text() -> None:
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {"model": "m", "usage": {}}},
        {"type": "content_block_start", "content_block": {"type": "tool_use", "id": "t", "name": "f", "input": {}}},
        {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": '{"x": "un'}},
        {"type": "content_block_stop"}, {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}}]  # fmt: skip
    found = anthropic_messages.completion(streamed(anthropic_messages.accumulator(), events), Provider())
    assert found.finish_reason == "length"
    assert [call["function"]["arguments"] for call in found.tool_calls or ()] == ['{"x": "un']


def test_a_file_and_a_sound_are_sent_in_each_wires_form() -> None:
    pdf = base64.b64encode(b"%PDF-1").decode()
    file = {"type": "file", "file": {"filename": "a_b.pdf", "file_data": f"data:application/pdf;base64,{pdf}"}}
    sound = {"type": "input_audio", "input_audio": {"data": pdf, "format": "wav"}}
    text = {"type": "text", "text": "what is it?"}
    asked, heard = (request(([{"role": "user", "content": [part, text]}], {"max_tokens": 5})) for part in (file, sound))
    for each in (asked, heard):
        body = openai_chat.body(each, "m", provider("openai"))
        conforms(OpenAIBody, body)
        assert body["messages"] == each.messages
    body = anthropic_messages.body(asked, "m", provider("anthropic"))
    conforms(AnthropicBody, body)
    assert body["messages"][0]["content"][0]["source"]["data"] == pdf
    document = bedrock_body(asked)["messages"][0]["content"][0]["document"]
    assert document == {"format": "pdf", "name": "a b pdf", "source": {"bytes": b"%PDF-1"}}
    assert bedrock_body(heard)["messages"][0]["content"][0]["audio"] == {"format": "wav", "source": {"bytes": b"%PDF-1"}}
    with pytest.raises(EngineError, match="'input_audio' cannot be sent"):
        anthropic_messages.body(heard, "m", provider("anthropic"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([
        "choices", "message", "content", "tool_calls", "function", "name", "arguments", "finish_reason", "usage", "refusal",
        "prompt_tokens", "output", "type", "text", "thinking", "input", "id", "stop_reason", "stopReason", "toolUse",
        "reasoningContent", "reasoningText", "logprobs", "model", "input_tokens", "prompt_tokens_details", "inputTokens"]),
        inner, max_size=4),
    max_leaves=25,
)  # fmt: skip


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["choices", "content", "output", "usage", "stop_reason"]), json_values))
def test_whatever_comes_back_is_an_answer_or_a_typed_error(payload: dict[str, Any]) -> None:
    for wire in PARSED.values():
        try:
            assert wire.completion(payload, Provider()).choices
        except EngineError as error:
            assert error.type in ("bad_response", "content_filter")


# -- providers ----------------------------------------------------------------------------------------------------------

URLS = {
    "openai": "https://api.openai.com/v1/chat/completions",
    "anthropic": "https://api.anthropic.com/v1/messages",
    "gemini": "https://generativelanguage.googleapis.com/v1beta/openai/chat/completions",
    "vertex": "https://us-east5-aiplatform.googleapis.com/v1beta1/projects/p1/locations/us-east5/endpoints/openapi"
    "/chat/completions",
    "together": "https://api.together.xyz/v1/chat/completions",
    "deepseek": "https://api.deepseek.com/v1/chat/completions",
    "fireworks": "https://api.fireworks.ai/inference/v1/chat/completions",
    "openrouter": "https://openrouter.ai/api/v1/chat/completions",
    "sambanova": "https://api.sambanova.ai/v1/chat/completions",
    "parasail": "https://api.parasail.io/v1/chat/completions",
    "cerebras": "https://api.cerebras.ai/v1/chat/completions",
    "huggingface": "https://router.huggingface.co/v1/chat/completions",
}
# They have no address of their own; Lambda's service ended.
SERVERS = ("remote_vllm", "sglang", "openai_compatible", "lambda")


def test_every_provider_is_tested_here() -> None:
    assert set(HTTP_ENGINES) == set(URLS) | set(SERVERS)


@pytest.mark.parametrize("kind", URLS)
def test_a_provider_is_where_it_says_and_wants_its_key(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_from_keys(kind, {"model": "m"})
    monkeypatch.setenv("REGION", "us-east5")
    monkeypatch.setenv("PROJECT_ID", "p1")
    assert endpoints(config, Provider.of(config)) == [URLS[kind]]
    if kind == "vertex":
        return  # its credentials are tested with a server that gives tokens
    assert config.api_key_env is not None
    monkeypatch.delenv(config.api_key_env, raising=False)
    with pytest.raises(ConfigError, match=config.api_key_env):
        load_engine(kind, model="m")
    monkeypatch.setenv(config.api_key_env, KEY)
    with load_engine(kind, model="m") as engine:
        wanted = {"x-api-key": KEY} if kind == "anthropic" else {"authorization": f"Bearer {KEY}"}
        assert engine.auth.fixed == wanted  # type: ignore[attr-defined]
        assert type(engine).__name__ == HTTP_ENGINES[kind]


@pytest.mark.parametrize("kind", [*URLS, *SERVERS, "bedrock"])
def test_a_provider_refuses_what_it_lacks_before_anything_is_sent(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Provider.of(config_from_keys(kind, {"model": "m"}))
    everything = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.1, "stop": ["x"], "seed": 1,
                  "stop_token_ids": [1], "n": 2, "frequency_penalty": 0.1, "presence_penalty": 0.1, "logprobs": 2,
                  "repetition_penalty": 1.1, "logit_bias": {"1": 1}, "reasoning_effort": "low"}  # fmt: skip
    for name, value in everything.items():
        asked = Request([{"role": "user", "content": "a"}], GenerationParams.parse({name: value}))
        refused = found.capabilities().refusal(asked, EngineConfig(kind, model="m"))
        if name in found.unsupported:
            assert refused is not None
            assert f"generation.{name}" in str(refused)
        else:  # then it is in the body
            assert refused is None
            body = PARSED[found.wire].body(asked, "m", found)
            assert len(body) > len(PARSED[found.wire].body(Request(asked.messages), "m", found)), name


def test_unsupported_drop_leaves_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with load_engine("openai", model="o3", unsupported="drop") as engine:
        asked = Request([{"role": "user", "content": "a"}], GenerationParams(temperature=0.5, top_k=3, max_tokens=5))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            left = engine.prepared(asked)
            engine.prepared(asked)
        assert left.generation.given() == {"max_tokens": 5}
        assert sorted(str(warning.message).split(" ")[4] for warning in told) == [
            "generation.temperature:",
            "generation.top_k:",
        ]


@pytest.mark.parametrize(
    ("given", "full"),
    [("localhost:8000", "http://localhost:8000/v1/chat/completions"),
     ("http://localhost:6864", "http://localhost:6864/v1/chat/completions"),
     ("http://localhost:6864/v1/", "http://localhost:6864/v1/chat/completions"),
     ("https://x.example/api/v1/chat/completions", "https://x.example/api/v1/chat/completions"),
     ("api.x.example", "https://api.x.example/v1/chat/completions"), ("gpu1:8000", "http://gpu1:8000/v1/chat/completions"),
     ("10.0.0.7:80/v1", "http://10.0.0.7:80/v1/chat/completions")],
)  # fmt: skip
def test_a_url_may_be_a_host_or_end_anywhere(given: str, full: str) -> None:
    config = config_from_keys("openai_compatible", {"base_url": given})
    assert endpoints(config, Provider.of(config)) == [full]


def test_an_adapter_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, name in (("remote_vllm", "lora"), ("sglang", "base:lora")):
        with load_engine(kind, model="base", base_url="localhost:1", adapter="lora") as engine:
            assert engine.body(Request([{"role": "user", "content": "a"}]))["model"] == name  # type: ignore[attr-defined]


def test_engines_are_classes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in (*HTTP_ENGINES.values(), "BedrockEngine"):
        assert getattr(engines, name).__name__ == name
    with engines.OpenAIEngine(model="gpt-4o") as engine, load_engine("openai", model="gpt-4o") as loaded:
        assert engine.kind == "openai"
        assert isinstance(loaded, engines.OpenAIEngine) and type(loaded).__module__ == "engines"


def test_a_provider_of_ones_own_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path("docs/providers.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "acme.yaml").write_text(text)
    config = compose(["engine=acme", "engine.model=acme-think-1", "dataset.path=x", "output.path=y"], str(tmp_path))
    config.check()
    monkeypatch.setenv("ACME_API_KEY", KEY)
    with load_engine(config.engine) as engine:
        asked = Request([{"role": "user", "content": "a"}], GenerationParams(max_tokens=5))
        assert engine.body(asked)["max_completion_tokens"] == 5  # type: ignore[attr-defined]
        assert "temperature" in engine.capabilities_for(asked).unsupported
        assert engine.endpoints.urls == ["https://api.acme.example/v1/chat/completions"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("section", "said"),
    [({"wire": "chats"}, "did you mean 'chat'"), ({"unsuported": ["n"]}, "did you mean 'unsupported'"),
     ({"rename": {"max_token": "x"}}, "did you mean 'max_tokens'"), ({"models": [{"unsupported": []}]}, "needs a 'match'"),
     ({"wire": "converse"}, "wire=converse is for engine=bedrock only; engine=acme can use chat or messages"),
     ({"batch": {"rows": 5}}, "batch needs a wire: one of openai, anthropic"),
     ({"batch": {"wire": "opnai"}}, "batch.wire=opnai is not known .did you mean 'openai'"),
     ({"models": [{"match": "a", "batch": {"rows": 5}}]}, "not 'rows'; set engine.provider.batch.rows")],
)  # fmt: skip
def test_a_mistake_in_a_provider_is_said_with_the_nearest_name(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_engine("acme", model="m", base_url="localhost:1", provider=section)


@pytest.mark.parametrize("name", ["wire", "auth", "headers", "environment", "kwargs", "idempotency_header"])
def test_a_key_without_effect_in_a_rule_for_models_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is for all models; set engine.provider.{name}"):
        load_engine("acme", model="m", base_url="localhost:1", provider={"models": [{"match": "x", name: "a"}]})


def test_a_rule_for_models_tells_their_finish_reasons() -> None:
    section = {"auth": "optional", "models": [{"match": "^odd", "finish_reasons": {"fin": "stop"}}]}
    payload = {"choices": [{"message": {"content": "a"}, "finish_reason": "fin"}]}
    with load_engine("acme", model="m", base_url="localhost:1", provider=section) as engine:
        assert engine.read(payload, 1, "odd-1").finish_reason == "stop"  # type: ignore[attr-defined]
        with pytest.raises(EngineError, match="unknown finish reason"):
            engine.read(payload, 1)  # type: ignore[attr-defined]


def test_batch_wires_have_their_apis() -> None:
    assert tuple(BATCH_APIS) == BATCH_WIRES


def test_packaged_files_hold_known_keys_only() -> None:
    for path in Path("conf/engine").glob("*.yaml"):
        keys = packaged(path.stem)
        assert keys["kind"] == path.stem
        Provider.of(config_from_keys(path.stem, {}))
