"""JSON schemas as providers take them, against the official SDKs' own transformations."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
from anthropic import transform_schema
from hypothesis import given
from hypothesis import strategies as st
from openai.lib._pydantic import _ensure_strict_json_schema, to_strict_json_schema
from pydantic import BaseModel, Field

from engines import load_engine
from engines.errors import EngineError
from engines.params import GenerationParams
from engines.remote.schemas import in_subset, provider_schema
from engines.structured import schema_error
from engines.types import Choice, Request, answer
from tests.support.infer import ask
from tests.support.provider_server import ProviderServer

README_SCHEMA = json.loads(Path("docs/examples/score.json").read_text())
KEY = "sk-some-key-0123456789"


class Address(BaseModel):
    street: str = Field(description="with the number")
    city: str | None


class Person(BaseModel):
    """A person."""

    name: str = Field(min_length=1, max_length=40, description="the full name")
    age: int = Field(ge=0, le=150)
    mood: Literal["good", "bad"]
    home: Address
    others: list[Address] = Field(max_length=3)
    kind: Address | int


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "FIREWORKS_API_KEY",
                 "GEMINI_API_KEY"):  # fmt: skip
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("AWS_REGION", "us-east-1")


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's own transformation."""
    found = copy.deepcopy(schema)
    return _ensure_strict_json_schema(found, path=(), root=found)


def without_types_of_literals(node: Any) -> Any:
    if isinstance(node, list):
        return [without_types_of_literals(each) for each in node]
    if not isinstance(node, dict):
        return node
    return {name: without_types_of_literals(value) for name, value in node.items() if name != "type" or "enum" not in node}


@pytest.mark.parametrize("schema", [README_SCHEMA, Person.model_json_schema()], ids=["README", "pydantic"])
def test_schemas_are_as_the_official_sdks_make_them(schema: dict[str, Any]) -> None:
    assert in_subset(schema, "anthropic") == transform_schema(copy.deepcopy(schema))
    found = in_subset(schema, "openai")
    assert without_types_of_literals(found) == without_types_of_literals(strict(schema))
    assert strict(found) == found


def test_pydantics_models_are_as_openais_helper_makes_them() -> None:
    assert in_subset(Person.model_json_schema(), "openai") == to_strict_json_schema(Person)


def test_a_constraint_that_a_provider_does_not_take_is_in_the_description() -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 9, "description": "short"},
            "tags": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1, "uniqueItems": True},
        },
        "required": ["name", "tags"],
    }
    found = in_subset(schema, "anthropic")["properties"]
    assert found["name"] == {"type": "string", "description": "short\n\n{maxLength: 9}"}
    assert found["tags"] == {
        "type": "array",
        "items": {"type": "integer", "description": "{minimum: 1}"},
        "minItems": 1,
        "description": "{uniqueItems: true}",
    }
    assert in_subset(schema, "openai")["properties"]["name"] == schema["properties"]["name"]  # type: ignore[index]
    tuned = in_subset(schema, "openai_fine_tuned")["properties"]
    assert tuned["name"]["description"] == "short\n\n{maxLength: 9}"


def test_an_optional_property_may_be_null_where_all_are_required() -> None:
    schema = {
        "type": "object",
        "$defs": {"A": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
        "properties": {
            "a": {"$ref": "#/$defs/A"},
            "b": {"type": "string", "enum": ["x"], "description": "d"},
            "c": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "d": {"const": 1},
            "e": {"oneOf": [{"type": "string"}, {"type": "integer"}]},
            "f": {"type": ["integer", "null"]},
            "g": {"type": ["string", "null"], "enum": ["x"]},
        },
        "required": [],
    }
    found = in_subset(schema, "openai")
    assert found["required"] == list("abcdefg")
    assert found["properties"] == {
        "a": {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]},
        "b": {"type": ["string", "null"], "enum": ["x", None], "description": "d"},
        "c": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "d": {"type": ["integer", "null"], "enum": [1, None]},
        "e": {"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "null"}]},
        "f": {"type": ["integer", "null"]},
        "g": {"type": ["string", "null"], "enum": ["x", None]},
    }
    assert strict(found) == found


@pytest.mark.parametrize(
    ("schema", "said"),
    [({"type": "object"}, "the root is an object with any property names"),
     ({"type": "object", "properties": {"a": {"type": "object", "additionalProperties": {"type": "string"}}}},
      "/properties/a is an object with any property names"),
     ({"type": "object", "properties": {"a": {}}}, "/properties/a takes any value"),
     ({"type": "object", "properties": {"a": {"$ref": "#/$defs/no", "title": "t"}}}, "nothing at #/[$]defs/no")],
)  # fmt: skip
def test_a_schema_that_cannot_be_expressed_is_refused_with_its_place(schema: dict[str, Any], said: str) -> None:
    for subset in ("openai", "anthropic"):
        with pytest.raises(EngineError, match=said) as refused:
            provider_schema(schema, subset, False)
        assert refused.value.type == "invalid_input"
    tree = {"type": "object", "properties": {"t": {"$ref": "#"}}, "required": ["t"]}
    assert in_subset(tree, "openai")["properties"]["t"] == {"$ref": "#"}
    with pytest.raises(ValueError, match="refers to itself"):
        in_subset(tree, "anthropic")


_leaves = st.sampled_from([
    {"type": "string", "maxLength": 3}, {"type": "integer", "minimum": 2}, {"enum": ["a", 1, None]}, {"const": True},
    {"type": ["number", "null"]}, {"type": "string", "format": "date"}, {"type": "string", "pattern": "^a"}])  # fmt: skip
_schemas = st.recursive(
    _leaves,
    lambda inner: (
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 3))
        | st.builds(lambda parts: {"anyOf": parts}, st.lists(inner, min_size=1, max_size=2))
        | st.builds(
            lambda properties, some: {"type": "object", "properties": properties, "required": some},
            st.dictionaries(st.sampled_from("abc"), inner, min_size=1),
            st.just([]),
        )
    ),
    max_leaves=6,
)
# Without objects: those of a transformed schema are closed, and have null for an absent property.
_values = st.recursive(
    st.sampled_from([None, True, 0, 1, 5, 1.5, "", "a", "aaaa", "2026-01-01"]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=8,
)


@given(_schemas, _values)
def test_a_transformed_schema_allows_every_answer_that_the_original_allows(inner: dict[str, Any], value: Any) -> None:
    schema = {"type": "object", "properties": {"a": inner}, "required": ["a"]}
    ours = in_subset(schema, "openai")
    assert strict(ours) == ours
    if jsonschema.Draft202012Validator(schema).is_valid({"a": value}):
        for found in (ours, in_subset(schema, "anthropic")):
            assert jsonschema.Draft202012Validator(found).is_valid({"a": value})


# -- what is sent -------------------------------------------------------------------------------------------------------


def sent(kind: str, response_format: dict[str, Any], model: str = "m", **keys: Any) -> dict[str, Any]:
    with load_engine(kind, model=model, **keys) as engine:
        params = GenerationParams.parse({"response_format": response_format})
        body: dict[str, Any] = engine.body(engine.prepared(Request([{"role": "user", "content": "a"}], params)))  # type: ignore[attr-defined]
        return body


def test_each_provider_gets_the_readmes_schema_in_its_form() -> None:
    asked = {"type": "json_schema", "json_schema": {"schema": README_SCHEMA}}
    found = sent("openai", asked)["response_format"]["json_schema"]
    assert (found["strict"], found["schema"]["required"]) == (True, README_SCHEMA["required"])
    assert found["schema"]["properties"]["why"] == README_SCHEMA["properties"]["why"]
    tuned = sent("openai", asked, "ft:gpt-4o-mini-2024-07-18:org::1")["response_format"]["json_schema"]["schema"]
    assert tuned["properties"]["why"] == {"type": "string", "description": "{maxLength: 160}"}
    own = transform_schema(copy.deepcopy(README_SCHEMA))
    assert sent("anthropic", asked, "claude-sonnet-5")["output_config"]["format"]["schema"] == own
    text = sent("bedrock", asked)["outputConfig"]["textFormat"]["structure"]["jsonSchema"]["schema"]
    assert json.loads(text) == own
    for kind in ("openai_compatible", "fireworks"):
        given = sent(kind, asked, base_url="localhost:1")["response_format"]["json_schema"]
        assert given == {"name": "answer", "schema": README_SCHEMA}


def test_a_schema_without_a_strict_form_is_sent_as_it_is_unless_strict_was_asked_for() -> None:
    free = {"type": "object", "properties": {"any": {"type": "object"}}}
    assert sent("openai", free)["response_format"]["json_schema"] == {"name": "answer", "schema": free}
    asked = {"type": "json_schema", "json_schema": {"schema": README_SCHEMA, "strict": False}}
    assert sent("openai", asked)["response_format"]["json_schema"]["schema"] == README_SCHEMA
    with pytest.raises(EngineError, match="/properties/any is an object with any property names"):
        sent("openai", {"type": "json_schema", "json_schema": {"schema": free, "strict": True}})


def nested(levels: int) -> dict[str, Any]:
    inner = nested(levels - 1) if levels > 1 else {"type": "string"}
    return {"type": "object", "properties": {"a": inner}, "required": ["a"], "additionalProperties": False}


def of_labels(count: int, length: int) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"label": {"type": "string", "enum": [f"{at:0{length}}" for at in range(count)]}},
        "required": ["label"],
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    ("schema", "is_strict"),
    [(nested(10), True), (nested(11), False), (of_labels(1000, 5), True), (of_labels(1001, 5), False),
     (of_labels(250, 100), True), (of_labels(251, 100), False)],
)  # fmt: skip
def test_a_schema_above_openais_limits_is_strict_only_if_that_was_asked_for(
    schema: dict[str, Any], is_strict: bool
) -> None:
    found = sent("openai", schema)["response_format"]["json_schema"]
    assert (found.get("strict", False), found["schema"]) == (is_strict, schema)
    asked = {"type": "json_schema", "json_schema": {"schema": schema, "strict": True}}
    assert sent("openai", asked)["response_format"]["json_schema"]["strict"]


def test_a_grammar_of_fireworks_names_its_type() -> None:
    found = sent("fireworks", {"type": "grammar", "grammar": 'root ::= "a"'})
    assert found["response_format"] == {"type": "grammar", "grammar": 'root ::= "a"'}


def test_strict_tools_have_schemas_that_the_provider_takes() -> None:
    function = {"name": "f", "parameters": README_SCHEMA, "strict": True}
    params = GenerationParams.parse({"tools": [{"type": "function", "function": function}], "max_tokens": 5})
    asked = Request([{"role": "user", "content": "a"}], params)
    own = transform_schema(copy.deepcopy(README_SCHEMA))
    with load_engine("anthropic", model="claude-sonnet-5") as engine:
        [tool] = engine.body(asked)["tools"]  # type: ignore[attr-defined]
        assert (tool["strict"], tool["input_schema"]) == (True, own)
    with load_engine("bedrock", model="anthropic.claude-opus-4-6-v1") as engine:
        [tool] = engine.body(asked)["toolConfig"]["tools"]  # type: ignore[attr-defined]
        assert (tool["toolSpec"]["strict"], tool["toolSpec"]["inputSchema"]["json"]) == (True, own)


def test_the_answer_is_checked_against_the_whole_schema(server: ProviderServer) -> None:
    properties = {"s": {"type": "string", "maxLength": 2}, "n": {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "required": ["s"]}
    replies = iter(['{"s": "long"}', '{"s": "ok"}'])
    server.fault = lambda text, _: f"answer={next(replies)}"
    with load_engine("anthropic", model="claude-sonnet-5", base_url=server.url) as engine:
        [done] = engine.infer([ask("x")], {"response_format": schema})
    assert (done.text, done.attempts) == ('{"s": "ok"}', 2)
    given = server.requests[0].body["output_config"]["format"]["schema"]
    assert given["properties"]["s"] == {"type": "string", "description": "{maxLength: 2}"}


def test_null_is_an_absent_property_where_the_provider_requires_all(server: ProviderServer) -> None:
    inner = {"type": "object", "properties": {"x": {"enum": ["a"]}, "y": {"type": ["integer", "null"]}}}
    properties = {
        "n": {"type": "integer"},
        "s": {"type": "string"},
        "in": {"anyOf": [inner, {"type": "array", "items": inner}]},
    }
    schema = {"type": "object", "properties": properties, "required": ["n"]}
    said = '{"n": 12345678901234567890123, "s": null, "in": [{"x": null, "y": null}]}'
    server.fault = lambda text, _: f"answer={said}"
    with load_engine("openai", model="gpt-4o", base_url=server.url) as engine:
        [done] = engine.infer([ask("x")], {"response_format": schema})
        assert (done.text, done.attempts) == ('{"n": 12345678901234567890123, "in": [{"y": null}]}', 1)
        said = '{"n": null, "s": "a", "in": []}'  # a required one
        [done] = engine.infer([ask("x")], {"response_format": schema, "schema_retries": 0})
        assert done.error is not None and "n: None is not of type 'integer'" in done.error.message
    said = '{"n": 1, "s": null}'
    with load_engine("openai_compatible", model="m", base_url=server.url) as engine:
        [done] = engine.infer([ask("x")], {"response_format": schema, "schema_retries": 0})
        assert done.error is not None and "s: None is not of type 'string'" in done.error.message


@pytest.mark.parametrize(
    "schema",
    [{"type": "string", "pattern": "^(a|a|aa)+$"},
     {"type": "object", "patternProperties": {"^(a|a|aa)+$": {}}},
     {"type": "object", "additionalProperties": False, "patternProperties": {"^(a|a|aa)+$": {}}},
     {"type": "object", "unevaluatedProperties": False, "patternProperties": {"^(a|a|aa)+$": {}}},
     {"type": "string", "anyOf": [{"$schema": "http://json-schema.org/draft-07/schema#", "pattern": "^(a|a|aa)+$"}]}],
)  # fmt: skip
def test_a_pattern_that_would_take_years_is_refused(schema: dict[str, Any]) -> None:
    text = json.dumps("a" * 80 + "!" if schema["type"] == "string" else {"a" * 80 + "!": 1})
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    found = schema_error(Choice(answer(text), "stop"), GenerationParams.parse({"response_format": wanted}), 0)
    assert found is not None and found.type == "invalid_input" and "response_format" in str(found)


def test_patterns_of_a_schema_hold() -> None:
    schema = {"type": "object", "patternProperties": {"^x": {"type": "string", "pattern": "^[0-9]+$"}},
              "properties": {"a": {}}, "additionalProperties": False}  # fmt: skip
    params = GenerationParams.parse({"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}})
    found = [schema_error(Choice(answer(json.dumps(value)), "stop"), params, 0) for value in
             ({"a": 1, "xy": "12"}, {"xy": "1b"}, {"b": 1})]  # fmt: skip
    assert found[0] is None
    assert "does not match '^[0-9]+$'" in str(found[1]) and "('b' was unexpected)" in str(found[2])
