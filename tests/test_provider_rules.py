"""Rules of providers and their models: what they refuse, where they want it, and how they are addressed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import botocore.session
import pytest
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming as AnthropicBody
from anthropic.types.model import Model
from botocore.validate import ParamValidator
from openai.types.shared.chat_model import ChatModel

from engines import load_engine
from engines.config import config_from_keys
from engines.errors import ConfigError, EngineError
from engines.params import GenerationParams
from engines.registry import secret_variables
from engines.remote import anthropic_messages, bedrock_converse
from engines.remote.batch.factory import wire_of
from engines.remote.provider import Provider, endpoints
from engines.types import Message, Request
from tests.support.infer import ask
from tests.support.loopback import make_certificate
from tests.support.provider_server import ProviderServer

KEY = "sk-some-key-0123456789"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CLAUDES = [*get_args(get_args(Model)[0]), "claude-opus-4-10", "claude-opus-4-1-20250805", "claude-opus-4-20250514",
           "claude-sonnet-4-0", "claude-haiku-4-5", "claude-3-7-sonnet-latest", "claude-4-opus-20250514"]  # fmt: skip


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "FIREWORKS_API_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("AWS_REGION", "us-east-1")


def problem(kind: str, model: str, **generation: Any) -> str | None:
    """The parameter that this model does not take, as messages describe it."""
    found = Provider.of(config_from_keys(kind, {"model": model})).for_model(model).capabilities()
    refused = found.unsupported_parameter(GenerationParams.parse(generation))
    return refused[1] if refused else None


# -- OpenAI -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model", ["o3", "o4-mini-2025-04-16", "gpt-5", "gpt-5-mini", "gpt-5-2025-08-07", "ft:o4-mini:org::1"]
)
def test_openais_reasoning_models_refuse_sampling_and_stop(model: str) -> None:
    for name, value in (("temperature", 0.5), ("top_p", 0.5), ("stop", ["x"]), ("logit_bias", {"1": 1}), ("logprobs", 1)):
        assert problem("openai", model, **{name: value}) == f"generation.{name}"
    assert problem("openai", model, reasoning_effort="low", max_tokens=5, tools=[TOOL]) is None


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4.1-mini", "gpt-5-chat-latest", "gpt-3.5-turbo", "ft:gpt-4o-mini:org::1"])
def test_openais_other_models_take_them(model: str) -> None:
    assert problem("openai", model, temperature=0.5, top_p=0.5, stop=["x"], logprobs=1, tools=[TOOL]) is None


@pytest.mark.parametrize(
    "model", ["gpt-5.1", "gpt-5.4-mini-2026-03-17", "gpt-5.5", "gpt-5.6-sol", "gpt-5.10", "gpt-6-luna"]
)
def test_without_reasoning_newer_models_take_a_temperature_but_no_stop(model: str) -> None:
    assert problem("openai", model, reasoning_effort="none", temperature=0.5, top_p=0.5, logprobs=1) is None
    assert problem("openai", model, reasoning_effort="none", stop=["x"]) == "generation.stop"
    refused = problem("openai", model, reasoning_effort="low", temperature=0.5)
    assert refused is not None and re.search("generation.temperature unless generation.reasoning_effort is .*none", refused)
    by_default = problem("openai", model, temperature=0.5) is None
    assert by_default is (model.startswith(("gpt-5.1", "gpt-5.4")) and model != "gpt-5.10")


def test_the_newest_models_take_tools_only_without_reasoning(monkeypatch: pytest.MonkeyPatch) -> None:
    for model, unset, low in (("gpt-5", True, True), ("gpt-5.4", True, False), ("gpt-5.6-sol", False, False),
                              ("gpt-6.2-astra", False, False)):  # fmt: skip
        assert (problem("openai", model, tools=[TOOL]) is None) is unset, model
        assert (problem("openai", model, tools=[TOOL], reasoning_effort="low") is None) is low, model
        assert problem("openai", model, tools=[TOOL], reasoning_effort="none") is None
    with load_engine("openai", model="gpt-5.6-sol") as engine:  # preflight asks this
        with pytest.raises(
            ConfigError, match="generation.tools unless generation.reasoning_effort is none is not supported by"
        ):
            engine.check(GenerationParams.parse({"tools": [TOOL]}))
        asked = Request([{"role": "user", "content": "a"}], GenerationParams.parse({"tools": [TOOL]}))
        with pytest.raises(
            EngineError, match="engine=openai does not support generation.tools unless .*[(]model gpt-5.6-sol;"
        ):
            engine.prepared(asked)


def test_every_model_of_openais_sdk_has_rules_of_one_kind() -> None:
    for model in get_args(ChatModel):
        chat = re.match(r"gpt-4|gpt-3|chatgpt|gpt-audio|codex|gpt-5-chat", model)
        assert (problem("openai", model, stop=["x"]) is None) is bool(chat), model


# -- Claude -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", CLAUDES)
def test_claude_has_the_same_rules_at_bedrock(model: str) -> None:
    for name in (f"anthropic.{model}", f"us.anthropic.{model}-v1:0",
                 f"arn:aws:bedrock:us-east-1:1:inference-profile/global.anthropic.{model}-v1:0"):  # fmt: skip
        for generation in ({"temperature": 1}, {"top_k": 5}, {"temperature": 1, "top_p": 1}, {"reasoning_effort": "low"}):
            assert problem("bedrock", name, **generation) == problem("anthropic", model, **generation), (name, generation)


@pytest.mark.parametrize(
    ("model", "sampling", "both", "effort"),
    [("claude-3-7-sonnet-latest", True, True, False), ("claude-opus-4-20250514", True, True, False),
     ("claude-sonnet-4-0", True, True, False), ("claude-opus-4-1-20250805", True, False, False),
     ("claude-sonnet-4-5-20250929", True, False, False), ("claude-haiku-4-5", True, False, False),
     ("claude-opus-4-5-20251101", True, False, True), ("claude-sonnet-4-6", True, False, True),
     ("claude-opus-4-7", False, False, True), ("claude-opus-4-10", False, False, True),
     ("claude-mythos-preview", False, False, True), ("claude-haiku-5-5", False, False, True),
     ("claude-sonnet-5", False, False, True)],
)  # fmt: skip
def test_claudes_rules(model: str, sampling: bool, both: bool, effort: bool) -> None:
    for generation in ({"temperature": 0.5}, {"top_p": 0.5}, {"top_k": 5}):
        assert (problem("anthropic", model, **generation) is None) is sampling
    together = problem("anthropic", model, temperature=0.5, top_p=0.5)
    assert (together is None) is both
    if sampling and not both:
        assert together == "generation.top_p beside generation.temperature"
    assert (problem("anthropic", model, reasoning_effort="low") is None) is effort


# -- Bedrock ------------------------------------------------------------------------------------------------------------


def converse(model: str, messages: list[Message] | None = None, **generation: Any) -> dict[str, Any]:
    """The body, checked against Bedrock's service model."""
    asked = Request(messages or [{"role": "user", "content": "a"}], GenerationParams.parse(generation))
    with load_engine("bedrock", model=model) as engine:
        body: dict[str, Any] = engine.body(engine.prepared(asked))  # type: ignore[attr-defined]
    shape = botocore.session.get_session().get_service_model("bedrock-runtime").operation_model("Converse").input_shape
    report = ParamValidator().validate(body, shape)
    assert not report.has_errors(), report.generate_report()
    return body


def test_effort_and_top_k_are_where_each_model_of_bedrock_wants_them() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    body = converse("us.anthropic.claude-opus-4-6-v1", reasoning_effort="low", top_k=5, response_format=schema)
    assert body["outputConfig"]["effort"] == "low" and body["outputConfig"]["textFormat"]
    assert body["additionalModelRequestFields"] == {"top_k": 5}
    body = converse("us.amazon.nova-2-lite-v1:0", reasoning_effort="low", top_k=5, temperature=0.5)
    assert body["additionalModelRequestFields"] == {
        "reasoningConfig": {"type": "enabled", "maxReasoningEffort": "low"},
        "inferenceConfig": {"topK": 5},
    }
    body = converse("us.amazon.nova-2-lite-v1:0", reasoning_effort="none", max_tokens=5)
    assert body["additionalModelRequestFields"] == {"reasoningConfig": {"type": "disabled"}}
    for name, value in (("temperature", 0.5), ("top_p", 0.5), ("top_k", 5), ("max_tokens", 5)):
        refused = problem("bedrock", "amazon.nova-2-lite-v1:0", reasoning_effort="high", **{name: value})
        assert refused is not None and refused.startswith(f"generation.{name} unless")
    assert problem("bedrock", "amazon.nova-lite-v1:0", reasoning_effort="low") == "generation.reasoning_effort"
    body = converse("openai.gpt-oss-120b-1:0", reasoning_effort="low")
    assert body["additionalModelRequestFields"] == {"reasoning_effort": "low"}


def test_a_conversation_with_tool_calls_declares_their_tools() -> None:
    call: Any = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    history: list[Message] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sun"},
    ]
    names = lambda body: [tool["toolSpec"]["name"] for tool in body["toolConfig"]["tools"]]  # noqa: E731
    assert names(converse("amazon.nova-lite-v1:0", history)) == ["f"]
    other = {"type": "function", "function": {"name": "g", "parameters": {"type": "object", "properties": {}}}}
    body = converse("amazon.nova-lite-v1:0", history, tools=[TOOL, other], tool_choice="none")
    assert names(body) == ["f", "g"] and "toolChoice" not in body["toolConfig"]
    assert "toolConfig" not in converse("amazon.nova-lite-v1:0", history[:1], tools=[TOOL], tool_choice="none")
    assert "toolConfig" not in converse("amazon.nova-lite-v1:0")


def test_an_api_key_of_bedrock_is_used_goes_to_the_workers_and_is_shown_to_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", KEY)
    file, context = make_certificate(tmp_path)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(file))
    server = ProviderServer()
    server.tls = context  # boto3 sends such a key over https only
    with server, load_engine("bedrock", model="amazon.nova-lite-v1:0", base_url=server.url) as engine:
        assert "AWS_BEARER_TOKEN_BEDROCK" in secret_variables(engine.config)
        server.plan["no"] = [f"say=400=the key {KEY} is odd"]
        done, failed = engine.infer([ask("yes"), ask("no")])
        assert KEY not in engine.render_request(Request([{"role": "user", "content": "a"}]))
    assert done.text == "yes" and server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert failed.error is not None and "the key *** is odd" in failed.error.message


def test_a_configuration_that_boto3_refuses_is_no_outage(server: ProviderServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", KEY)
    with load_engine("bedrock", model="amazon.nova-lite-v1:0", base_url=server.url) as engine:
        [done] = engine.infer([ask("x")])
    assert done.error is not None and "requires an HTTPS endpoint" in done.error.message
    assert (done.error.type, done.error.retryable, done.attempts) == ("bad_request", False, 1)


# -- other providers ----------------------------------------------------------------------------------------------------


def test_fireworks_gives_long_answers_as_a_stream(server: ProviderServer) -> None:
    with load_engine("fireworks", model="m", base_url=server.url) as engine:
        short, long = (engine.infer([ask("two words")], {"max_tokens": most})[0] for most in (4096, 4097))
    assert short.text == long.text == "two words"
    assert short.usage == long.usage and short.finish_reason == long.finish_reason == "stop"
    assert [seen.body.get("stream") for seen in server.requests] == [None, True]


@pytest.mark.parametrize(
    ("region", "host"),
    [("us-east5", "us-east5-aiplatform.googleapis.com"), ("global", "aiplatform.googleapis.com"),
     ("eu", "aiplatform.eu.rep.googleapis.com")],
)  # fmt: skip
def test_vertex_is_where_its_location_says(region: str, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGION", region)
    monkeypatch.setenv("PROJECT_ID", "p1")
    config = config_from_keys("vertex", {"model": "m"})
    path = f"/v1beta1/projects/p1/locations/{region}/endpoints/openapi/chat/completions"
    assert endpoints(config, Provider.of(config)) == [f"https://{host}{path}"]


@pytest.mark.parametrize(
    ("given", "full"),
    [("https://r.openai.azure.com/openai/deployments/d?api-version=2024-10-21",
      "https://r.openai.azure.com/openai/deployments/d/chat/completions?api-version=2024-10-21"),
     ("localhost:8000?a=b", "http://localhost:8000/v1/chat/completions?a=b"),
     ("https://x.example/v1/chat/completions?a=b", "https://x.example/v1/chat/completions?a=b")],
)  # fmt: skip
def test_the_query_of_a_url_stays_behind_its_path(given: str, full: str) -> None:
    config = config_from_keys("openai_compatible", {"model": "m", "base_url": given})
    assert endpoints(config, Provider.of(config)) == [full]
    with load_engine(config) as engine:
        _, api = wire_of(engine)
        assert api.client.url("/batches?limit=5").endswith(f"/batches?limit=5&{full.partition('?')[2]}")
        assert api.client.url("/files") == full.replace("/chat/completions", "/files")
        assert api.client.url("https://elsewhere/x") == "https://elsewhere/x"
        api.client.close()


def test_no_capacity_at_groq_is_asked_again(server: ProviderServer) -> None:
    server.plan["x"] = ["say=498=capacity exceeded"]
    with load_engine("openai_compatible", model="m", base_url=server.url, max_concurrency=8) as engine:
        [done] = engine.infer([ask("x")])
        assert (done.text, done.attempts) == ("x", 2)
        assert engine.remote is not None and engine.remote.counts["throttled"] == 1


@pytest.mark.parametrize(
    ("section", "said"),
    [({"conditions": {"temprature": {"top_p": 1}}}, "conditions: .*did you mean 'temperature'"),
     ({"conditions": {"tools": {"reasoning_efort": "none"}}}, "conditions: .*did you mean 'reasoning_effort'"),
     ({"exclusive": [["temperature", "topp"]]}, "exclusive: .*did you mean 'top_p'"),
     ({"schemas": "opnai"}, "did you mean 'openai'"),
     ({"models": [{"match": "a", "hosts": {"a": "b"}}]}, "'hosts' is for all models")],
)  # fmt: skip
def test_a_mistake_in_a_rule_is_said_with_the_nearest_name(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_engine("acme", model="m", base_url="localhost:1", provider=section)


# -- fields of a row's own body -----------------------------------------------------------------------------------------


def test_each_format_takes_the_fields_of_its_own_api() -> None:
    filled = {"model", "messages", "max_tokens", "stop_sequences", "system", "tools", "tool_choice", "stream"}
    header = {"workspace_id"}
    assert set(get_type_hints(AnthropicBody)) - filled - header == anthropic_messages.ROW_FIELDS
    filled = {"modelId", "messages", "system", "inferenceConfig", "toolConfig", "outputConfig"}
    shape = botocore.session.get_session().get_service_model("bedrock-runtime").operation_model("Converse").input_shape
    assert set(shape.members) - filled == bedrock_converse.ROW_FIELDS


@pytest.mark.parametrize(
    ("kind", "model", "own"),
    [("anthropic", "claude-opus-4-6", {"thinking": {"type": "adaptive"}}),
     ("bedrock", "amazon.nova-lite-v1:0", {"performanceConfig": {"latency": "optimized"}}),
     ("openai", "gpt-4o", {"verbosity": "low"})],
)  # fmt: skip
def test_a_rows_own_fields_are_sent_or_refused_by_name(kind: str, model: str, own: dict[str, Any]) -> None:
    def asked(**fields: Any) -> Request:
        return Request([{"role": "user", "content": "a"}], GenerationParams(max_tokens=5), extra_body=fields)

    with load_engine(kind, model=model) as engine:
        plain = engine.body(engine.prepared(asked()))  # type: ignore[attr-defined]
        assert engine.body(engine.prepared(asked(**own))) == {**plain, **own}  # type: ignore[attr-defined]
        foreign = {"min_tokens": 3, "user": "u"}
        if kind == "openai":
            assert engine.body(engine.prepared(asked(**foreign))) == {**plain, **foreign}  # type: ignore[attr-defined]
            return
        with pytest.raises(EngineError, match=f"engine={kind} does not know min_tokens of the row's body"):
            engine.prepared(asked(**foreign))
        assert engine.body(engine.prepared(asked(user="u"))) == plain  # type: ignore[attr-defined]
    with load_engine(kind, model=model, unsupported="drop") as engine, pytest.warns(UserWarning, match="min_tokens"):
        assert engine.body(engine.prepared(asked(**foreign, **own))) == {**plain, **own}  # type: ignore[attr-defined]


def test_bodies_of_rules_are_json() -> None:
    """What a rule puts into a body has no shared parts: the next request does not see the one before."""
    first = converse("us.amazon.nova-2-lite-v1:0", reasoning_effort="low")
    assert "reasoningConfig" not in json.dumps(converse("us.amazon.nova-2-lite-v1:0"))
    assert first["additionalModelRequestFields"]["reasoningConfig"]["maxReasoningEffort"] == "low"


def test_a_service_that_ended_says_so_before_it_asks_for_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAMBDA_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"engine=lambda: Lambda's inference API ended on 2025-09-25"):
        load_engine("lambda", model="m")
