"""Answers in a shape: checked and asked for again, and as typed columns of the output."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from engines import Engine, GenerationParams, load_engine
from engines.errors import ConfigError
from engines.structured import schema_error
from engines.types import Choice, answer
from pipeline.configuration.compose import compose
from pipeline.context import resolve_context
from pipeline.dataset.formats import Parsed
from pipeline.dataset.keys import RequestHasher
from pipeline.output.answer_columns import arrow_type, fitted, plan_answer_columns
from tests.support.batch_server import BatchServer
from tests.support.infer import Infer, ask
from tests.support.processes import until
from tests.support.provider_server import ProviderServer

Write = Callable[..., Path]
SCHEMA = {
    "type": "object",
    "properties": {"why": {"type": "string"}, "score": {"type": "integer"}, "mood": {"enum": ["good", "bad"]}},
    "required": ["score"],
}
FORMAT = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
GOOD = {"why": "because", "score": 4, "mood": "good"}
COMPLAINT = "That is not in the format asked for: "


@pytest.fixture
def engine(server: ProviderServer) -> Iterator[Engine]:
    with load_engine("openai_compatible", model="m", base_url=server.url) as loaded:
        yield loaded


def says(server: ProviderServer, *answers: str) -> list[str]:
    """The server's next answers, whatever it is asked; what the user said in each request is in what is returned."""
    left, asked = list(answers), []

    def fault(text: str, _: int) -> str:
        asked.append(text)
        return f"answer={left.pop(0) if len(left) > 1 else left[0]}"

    server.fault = fault
    return asked


# --- asked for again -------------------------------------------------------------------------------------------------


def test_a_wrong_answer_is_asked_for_again_with_what_was_wrong(server: ProviderServer, engine: Engine) -> None:
    bad = json.dumps({**GOOD, "score": "high"})
    says(server, bad, json.dumps(GOOD))
    [completion] = engine.infer([ask("How good?")], {"response_format": FORMAT})
    assert completion.error is None and json.loads(completion.text or "") == GOOD
    first, second = (seen.body for seen in server.requests)
    assert second["messages"][:-1] == [*first["messages"], {"role": "assistant", "content": bad}]
    assert "score: 'high' is not of type 'integer'" in second["messages"][-1]["content"]
    assert second["response_format"] == first["response_format"]
    # Both tries are paid for.
    usage = [len(json.dumps(seen.body["messages"])) // 4 for seen in server.requests]
    assert completion.usage.input == sum(usage) and completion.attempts == 2


def test_an_answer_that_stays_wrong_is_a_schema_mismatch_that_says_why(server: ProviderServer, engine: Engine) -> None:
    asked = says(server, '{"score": 4, "mood": "\x1b[31mred"}'.replace("\x1b", "\\u001b"))
    [completion] = engine.infer([ask("How good?")], {"response_format": FORMAT})
    assert completion.choices == [] and completion.error is not None and completion.error.type == "schema_mismatch"
    assert completion.error.message.startswith("the answer is not in the format asked for: mood: ")
    assert "is not one of ['good', 'bad']" in completion.error.message
    assert '{"score": 4' in completion.error.message and "\x1b" not in completion.error.message
    assert len(asked) == completion.attempts == 3 and completion.usage.input > 0
    assert asked[1].startswith(COMPLAINT) and asked[2].startswith(COMPLAINT)


@pytest.mark.parametrize("retries", [0, 1])
def test_schema_retries_bounds_the_tries(server: ProviderServer, engine: Engine, retries: int) -> None:
    asked = says(server, "Four stars.")
    [completion] = engine.infer([ask("How good?")], {"response_format": FORMAT, "schema_retries": retries})
    assert completion.error is not None and "it is not JSON" in completion.error.message
    assert len(asked) == 1 + retries


FENCED = "```json\n{}\n```"


@pytest.mark.parametrize(
    ("said", "thought"),
    [(FENCED, None), ("Here it is:\n" + FENCED + "\nAnything else?", None), ("```{}```", None), ("```json\n{}", None),
     ("<think>four {\"score\": 1} stars?</think>\n{}", 'four {"score": 1} stars?'),
     ("four stars</think>" + FENCED, "four stars"),
     (FENCED.replace("{}", '{"score": "bad"}') + "\nNo, rather:\n" + FENCED, None)],
)  # fmt: skip
def test_json_in_a_fence_or_after_reasoning_is_taken_out_and_costs_no_retry(
    server: ProviderServer, engine: Engine, said: str, thought: str | None
) -> None:
    good = json.dumps({**GOOD, "why": "it says ```x``` and </think>"})
    asked = says(server, said.replace("{}", good))
    [completion] = engine.infer([ask("How good?")], {"response_format": FORMAT})
    assert completion.error is None and len(asked) == completion.attempts == 1
    assert (completion.text, completion.reasoning) == (good, thought)


@pytest.mark.parametrize("rest", ["</think>I cannot rate it.", '</think>{"score": "five"}', '</think>{"score": 5, "wh', ""])
def test_a_draft_inside_the_reasoning_is_no_answer(server: ProviderServer, engine: Engine, rest: str) -> None:
    says(server, f"<think>Perhaps\n```json\n{json.dumps(GOOD)}\n```\nNo, that is wrong.{rest}")
    [completion] = engine.infer([ask("How good?")], {"response_format": FORMAT, "schema_retries": 0})
    assert completion.error is not None and completion.error.type == "schema_mismatch"


def test_json_of_a_fence_that_does_not_match_says_what_is_wrong_with_it(server: ProviderServer, engine: Engine) -> None:
    says(server, FENCED.replace("{}", '{"score": "high"}'))
    [completion] = engine.infer([ask("How good?")], {"response_format": FORMAT, "schema_retries": 0})
    assert completion.error is not None and "score: 'high' is not of type 'integer'" in completion.error.message


def test_what_was_cut_off_is_not_asked_for_again(server: ProviderServer, engine: Engine) -> None:
    server.plan["How good?"] = ["length"]
    [completion] = engine.infer([ask("How good?")], {"response_format": FORMAT, "max_tokens": 5})
    assert completion.error is not None and completion.error.type == "schema_mismatch"
    assert "cut off by generation.max_tokens=5" in completion.error.message
    assert len(server.requests) == 1


def test_a_json_object_may_be_any_but_must_be_one(server: ProviderServer, engine: Engine) -> None:
    says(server, "[1]", '{"anything": null}')
    [completion] = engine.infer([ask("Go.")], {"response_format": {"type": "json_object"}})
    assert completion.text == '{"anything": null}' and completion.attempts == 2


def test_each_choice_is_checked_and_only_a_wrong_one_is_asked_for_again(server: ProviderServer, engine: Engine) -> None:
    good = json.dumps(GOOD)
    says(server, json.dumps([good, "Four.", good]), '{"score": 5}')
    [completion] = engine.infer([ask("How good?")], {"response_format": FORMAT, "n": 3})
    assert completion.error is None
    assert [json.loads(choice.message["content"])["score"] for choice in completion.choices] == [4, 5, 4]  # type: ignore[arg-type]
    assert [seen.body.get("n") for seen in server.requests] == [3, None]


@pytest.mark.parametrize(
    ("choice", "wrong"),
    [
        (Choice(answer("I will not."), "content_filter"), False),
        (
            Choice(
                answer(None, [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]), "tool_calls"
            ),
            False,
        ),
        (Choice(answer("I will not."), "stop"), True),
        (Choice(answer('{"score": 1}'), "length"), False),
    ],
)
def test_a_refusal_and_a_call_of_a_tool_are_no_answers_to_judge(choice: Choice, wrong: bool) -> None:
    assert (schema_error(choice, GenerationParams(response_format=FORMAT), 0) is not None) == wrong


def test_trouble_while_asking_again_is_told_as_what_it_is(server: ProviderServer) -> None:
    with load_engine("openai_compatible", model="m", base_url=server.url, max_retries=0) as engine:
        server.fault = lambda text, _: "answer=No." if text == "How good?" else "503"
        [passing] = engine.infer([ask("How good?")], {"response_format": FORMAT})
        assert passing.error is not None and (passing.error.type, passing.error.retryable) == ("server", True)
        server.fault = lambda text, _: "answer=No." if text == "How good?" else "400"
        [refused] = engine.infer([ask("How good?")], {"response_format": FORMAT})
        assert refused.error is not None and refused.error.type == "schema_mismatch" and refused.attempts == 2


def test_every_try_has_an_idempotency_key_of_its_own(server: ProviderServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    says(server, "No.", json.dumps(GOOD))
    with load_engine("openai", model="m", base_url=server.url) as engine:
        assert engine.infer([ask("How good?", id="1")], {"response_format": FORMAT})[0].error is None
    keys = [seen.headers["idempotency-key"] for seen in server.requests]
    assert len(keys) == len(set(keys)) == 2


def test_what_an_engine_cannot_set_right_goes_to_its_fallback(server: ProviderServer) -> None:
    says(server, "No.")
    with ProviderServer() as other:
        says(other, json.dumps(GOOD))
        second = {"engine": "openai_compatible", "model": "b", "base_url": other.url}
        with load_engine("openai_compatible", model="a", base_url=server.url, fallback=[second]) as engine:
            [completion] = engine.infer([ask("How good?")], {"response_format": FORMAT})
    assert completion.error is None and completion.model == "b" and completion.attempts == 4
    requests = [*server.requests, *other.requests]
    assert completion.usage.input == sum(len(json.dumps(seen.body["messages"])) // 4 for seen in requests)


@pytest.mark.parametrize("schema", [{"type": "object", "required": 1}, {"$ref": "http://127.0.0.1:1/x"}, {"$ref": "#/no"}])
def test_a_schema_that_cannot_be_used_is_its_rows_error(engine: Engine, schema: dict[str, Any]) -> None:
    response_format = {"type": "json_schema", "json_schema": {"schema": schema}}
    [completion] = engine.infer([ask("{}")], {"response_format": response_format})
    assert completion.error is not None and completion.error.type in ("invalid_input", "bad_request")
    assert "schema" in completion.error.message


def test_a_schema_alone_is_a_response_format() -> None:
    assert GenerationParams.parse({"response_format": SCHEMA}).response_format == FORMAT


# --- what is asked ---------------------------------------------------------------------------------------------------


def key(**generation: Any) -> bytes:
    hasher = RequestHasher(load_engine("echo").config, GenerationParams.parse(generation))
    return hasher.key(Parsed([{"role": "user", "content": "x"}]), "f:1")


def test_schema_retries_are_no_part_of_what_is_asked_but_the_order_of_properties_is() -> None:
    assert key(response_format=FORMAT, schema_retries=5) == key(response_format=FORMAT)
    turned = {**SCHEMA, "properties": dict(reversed(SCHEMA["properties"].items()))}  # type: ignore[attr-defined]
    assert key(response_format=turned) != key(response_format=SCHEMA)


# --- the configuration -----------------------------------------------------------------------------------------------


def composed(*overrides: str) -> Any:
    config = compose(["engine=echo", "dataset.path=x", "output.path=/tmp/y", *overrides])
    config.check()
    return config


def test_a_schema_may_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "score.json"
    path.write_text(json.dumps(SCHEMA))
    assert composed(f"generation.response_format={path}").generation["response_format"] == FORMAT
    path.write_text(json.dumps(FORMAT))
    assert composed(f"generation.response_format={path}").params().response_format == FORMAT
    assert composed(f"generation.response_format={json.dumps(SCHEMA)}").params().response_format == FORMAT
    inline = composed("generation.response_format={type: object, properties: {score: {type: integer}}}")
    assert inline.params().response_format["json_schema"]["schema"]["properties"] == {"score": {"type": "integer"}}


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["generation.response_format=no.json"], "no.json is not a file that can be read (No such file or directory)"),
        (["generation.response_format=README.md"], "README.md is not JSON"),
        (["generation.response_format={type: object, properties: {a: {type: interger}}}"], "'interger' is not valid under"),
        (["output.columns=schema"], "output.columns needs a generation.response_format of type json_schema"),
        (
            ["output.columns=[sco]", "generation.response_format=docs/examples/score.json"],
            "(known: mood, stars, topics, why)",
        ),
        (["output.columns=[star]", "generation.response_format=docs/examples/score.json"], "(did you mean 'stars'?)"),
        (["output.columns=all", "generation.response_format=docs/examples/score.json"], "must be schema, a list of"),
        (["generation.schema_retries=-1"], "generation.schema_retries must be a whole number of at least 0"),
    ],
)
def test_what_is_wrong_with_it_is_said(overrides: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(ConfigError) as raised:
        resolve_context(composed(*overrides), Console())  # before anything starts
    assert told in str(raised.value)


# --- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "type"),
    [
        ({"type": "integer"}, pa.int64()),
        ({"type": ["number", "null"]}, pa.float64()),
        ({"type": ["integer", "number"]}, pa.float64()),
        ({"type": "boolean"}, pa.bool_()),
        ({"enum": ["a", "b", None]}, pa.string()),
        ({"enum": [1, 2]}, pa.int64()),
        ({"enum": [1, "a"]}, None),
        ({"const": True}, pa.bool_()),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, pa.int64()),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, None),
        ({"type": "array", "items": {"type": "string"}}, pa.list_(pa.string())),
        ({"type": "array"}, None),
        ({"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False},
         pa.struct([("a", pa.int64())])),
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, None),
        ({}, None),
        (True, None),
    ],
)  # fmt: skip
def test_a_schema_has_an_arrow_type(schema: Any, type: pa.DataType | None) -> None:
    assert arrow_type(schema) == type


def test_pydantics_schemas_are_understood_and_one_that_refers_to_itself_is_text() -> None:
    detail = {"type": "object", "properties": {"reason": {"type": "string"}, "more": {"$ref": "#/$defs/Tree"}}}
    tree = {"type": "object", "properties": {"leaves": {"type": "array", "items": {"$ref": "#/$defs/Tree"}}}}
    schema = {"type": "object", "properties": {"detail": {"anyOf": [{"$ref": "#/$defs/Detail"}, {"type": "null"}]}},
              "$defs": {"Detail": detail}}  # fmt: skip
    wanted = {"why": "detail.reason"}
    detail["properties"].pop("more")  # type: ignore[attr-defined]
    [score] = plan_answer_columns(wanted, {"type": "json_schema", "json_schema": {"schema": schema}})
    assert (score.name, score.path, score.type) == ("why", ("detail", "reason"), pa.string())
    endless = {"type": "object", "properties": {"n": {"type": "integer"}, "tree": {"$ref": "#/$defs/Tree"}},
               "$defs": {"Tree": tree}}  # fmt: skip
    found = plan_answer_columns("schema", {"type": "json_schema", "json_schema": {"schema": endless}})
    assert [(score.name, score.type) for score in found] == [("n", pa.int64()), ("tree", None)]


_NAMES = st.text(string.ascii_lowercase, min_size=1, max_size=3)
_LEAVES = st.sampled_from([{"type": "integer"}, {"type": "number"}, {"type": "string"}, {"type": "boolean"},
                           {"type": ["integer", "null"]}, {"enum": ["a", "b"]},
                           {"const": 1.5}, {"enum": [1, None]}])  # fmt: skip
_SCHEMAS = st.recursive(
    _LEAVES,
    lambda inner: (
        st.builds(lambda items: {"type": "array", "items": items}, inner)
        | st.builds(
            lambda properties: {"type": "object", "properties": properties, "additionalProperties": False},
            st.dictionaries(_NAMES, inner, min_size=1, max_size=3),
        )
    ),
    max_leaves=4,
)


def _values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    kind = schema["type"]
    if isinstance(kind, list):
        return st.none() | st.integers(-(1 << 63), (1 << 63) - 1)
    if kind == "array":
        return st.lists(_values(schema["items"]), max_size=3)
    if kind == "object":
        return st.fixed_dictionaries({name: _values(part) for name, part in schema["properties"].items()})
    return {
        "integer": st.integers(-(1 << 63), (1 << 63) - 1) | st.just(3.0),
        "number": st.floats(allow_nan=False, allow_infinity=False),
        "string": st.text(st.characters(exclude_categories=("Cs",))),
        "boolean": st.booleans(),
    }[kind]


@settings(max_examples=150)
@given(st.data())
def test_every_value_that_a_schema_allows_comes_back_out_of_its_arrow_type(data: st.DataObject) -> None:
    schema = data.draw(_SCHEMAS)
    value = data.draw(_values(schema))
    jsonschema.validate(value, schema)
    type = arrow_type(schema)
    assert type is not None
    assert pa.array([fitted(value, type)], type).to_pylist() == [value]


@pytest.mark.parametrize(
    ("value", "type"),
    [(1 << 63, pa.int64()), (1.5, pa.int64()), (True, pa.int64()), (1, pa.bool_()), (1, pa.string()),
     ("1", pa.float64()), (10**400, pa.float64()), ({"a": 1}, pa.list_(pa.int64())), ([], pa.struct([("a", pa.int64())]))],
)  # fmt: skip
def test_what_does_not_fit_is_null(value: Any, type: pa.DataType) -> None:
    assert fitted(value, type) is None


# --- whole runs ------------------------------------------------------------------------------------------------------


COLUMNS = ["dataset.template='{{ text }}'", f"generation.response_format={json.dumps(FORMAT)}", "output.columns=schema"]


def test_answers_become_columns_of_one_schema_in_every_part(
    infer: Infer, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.output.finalize.plan_jobs.__defaults__", (0.0, 2))
    rows = [
        {"text": json.dumps(GOOD), "score": "the input's own"},
        {"text": "Four stars.", "score": None},
        {"text": '{"score": 7.0}', "score": "x"},
        {"text": '{"score": 1, "why": null}', "score": "y"},
        {"score": "no text"},
    ]
    outcome = infer(write_jsonl(rows), *COLUMNS, "generation.schema_retries=0")
    assert outcome.exit_status == 3
    assert outcome.manifest["errors"] == {"schema_mismatch": 2, "invalid_input": 1}
    found = infer.rows()
    assert [(row["why"], row["score"], row["mood"]) for row in found] == [
        ("because", 4, "good"), (None, None, None), (None, 7, None), (None, None, None), (None, None, None)]  # fmt: skip
    assert [row["input_score"] for row in found] == [row["score"] for row in rows]
    schemas = [pq.read_schema(path) for path in sorted((infer.out / "data").glob("*.parquet"))]
    assert len(schemas) == 3 and schemas[0].equals(schemas[1]) and schemas[0].equals(schemas[2])
    assert schemas[0].names[:8] == ["id", "index", "text", "input_score", "why", "score", "mood", "response"]
    assert schemas[0].field("score").type == pa.int64()
    # What was paid for and could not be used is counted.
    assert outcome.manifest["tokens"]["output"] == sum(row["usage"]["output"] for row in found if row["usage"])
    assert found[1]["usage"]["output"] == 2


@pytest.mark.slow
def test_names_of_ours_and_places_deep_inside_are_columns_too(infer: Infer, write_jsonl: Write) -> None:
    schema = {"type": "object", "properties": {
        "reasoning": {"type": "string"},
        "detail": {"type": "object", "properties": {"points": {"type": "number"}, "tags": {"type": "array"}}},
    }}  # fmt: skip
    said = {"reasoning": "r", "detail": {"points": 1, "tags": [1, "a"]}}
    wanted = "output.columns={reasoning: reasoning, points: detail.points, tags: detail.tags}"
    infer(write_jsonl([ask(json.dumps(said))]), f"generation.response_format={json.dumps(schema)}", wanted)
    [row] = infer.rows()
    assert (row["response_reasoning"], row["points"], row["tags"]) == ("r", 1.0, '[1,"a"]')
    assert row["reasoning"] is None
    infer(write_jsonl([ask(json.dumps(said))]), f"generation.response_format={json.dumps(schema)}", wanted, "output=jsonl")
    assert infer.printed.count("No request was sent") == 0
    line = json.loads((infer.out / "data" / "part-00000.jsonl").read_text())
    assert (line["response_reasoning"], line["points"], line["tags"]) == ("r", 1.0, [1, "a"])


@pytest.mark.slow
def test_more_columns_and_other_retries_ask_no_good_row_again(infer: Infer, write_jsonl: Write) -> None:
    data = write_jsonl([{"text": json.dumps(GOOD)}, {"text": json.dumps({"score": 1})}])
    assert infer(data, *COLUMNS[:2]).manifest["this_run"]["asked"] == 2
    assert "score" not in infer.table().column_names
    assert infer(data, *COLUMNS, "generation.schema_retries=7").manifest["this_run"]["asked"] == 0
    assert [row["score"] for row in infer.rows()] == [4, 1]


def test_a_provider_that_is_asked_again_fills_the_columns(infer: Infer, write_jsonl: Write, server: ProviderServer) -> None:
    def fault(text: str, attempt: int) -> str:
        wrong = text in ("row 1", "row 2") or text.startswith(f"{COMPLAINT}score: 'row 2' is")
        return f"answer={json.dumps({'score': text if wrong else 4})}"

    server.fault = fault
    data = write_jsonl([{"text": f"row {i}"} for i in range(4)])
    remote = ["engine.model=m", f"engine.base_url={server.url}"]
    outcome = infer(data, *COLUMNS, *remote, engine="openai_compatible")
    assert outcome.exit_status == 0, infer.printed
    rows = infer.rows()
    assert [row["score"] for row in rows] == [4, 4, 4, 4]
    assert [row["attempts"] for row in rows] == [1, 2, 3, 1]
    assert outcome.manifest["tokens"]["input"] == sum(len(json.dumps(s.body["messages"])) // 4 for s in server.requests)


def test_llamacpp_scores_a_table(infer: Infer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    outcome = infer(
        "docs/examples/reviews.csv",
        "dataset.template='Rate this review of a {{ product }}: {{ review }}'",
        "generation.response_format=docs/examples/score.json",
        "generation.max_tokens=200",
        "dataset.limit=3",
        "output.columns=schema",
        engine="llamacpp",
    )
    assert outcome.exit_status == 0, infer.printed
    for row in infer.rows():
        said = json.loads(row["response"])
        assert {name: row[name] for name in said} == said
        assert row["attempts"] == 1 and row["stars"] in (1, 2, 3, 4, 5) and isinstance(row["topics"], list)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchServer]:
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    with BatchServer(delay_s=0.1) as running:
        yield running
        assert running.bad == []


def test_a_batchs_wrong_answers_go_again_in_the_next_and_are_then_errors(
    infer: Infer, write_jsonl: Write, batches: BatchServer
) -> None:
    free = {"generation": {"response_format": {"type": "text"}}}  # judged by its own format
    data = write_jsonl([ask('say: {"score": 3}'), ask("say: three"), ask("say: three", **free)])
    remote = ["engine.model=m", f"engine.base_url={batches.url}/v1", "run.mode=batch", "run.batch_poll_s=0.1"]
    outcome = infer(data, *COLUMNS[1:], *remote, engine="openai")
    assert outcome.manifest["errors"] == {"schema_mismatch": 1}
    first, second, third = infer.rows()
    assert (first["score"], first["attempts"]) == (3, 1)
    assert (third["response"], third["score"], third["error"]) == ("three", None, None)
    assert second["error"]["type"] == "schema_mismatch" and second["attempts"] == 3 and second["usage"]["input"] > 0
    assert [len(ids) for _, ids in batches.submitted] == [3, 1, 1]


@pytest.mark.slow
def test_a_batchs_wrong_answers_may_go_live(infer: Infer, write_jsonl: Write, batches: BatchServer) -> None:
    remote = ["engine.model=m", f"engine.base_url={batches.url}/v1", "run.mode=batch", "run.batch_fallback=live"]
    data = write_jsonl([ask('say: {"score": 3}'), ask("say: three")])
    infer(data, *COLUMNS[1:], *remote, engine="openai")
    assert [len(ids) for _, ids in batches.submitted] == [2]
    assert [len(body["messages"]) for body in batches.live] == [1, 3, 3]
    assert [row["error"] and row["error"]["type"] for row in infer.rows()] == [None, "schema_mismatch"]


def test_a_programs_batches_are_checked_too(batches: BatchServer) -> None:
    with load_engine("openai", model="m", base_url=f"{batches.url}/v1") as engine:
        asked = [ask('say: {"score": 3}'), ask("say: three")]
        batch = engine.infer_batch(asked, {"response_format": FORMAT})
        until(lambda: engine.get_batch_status(batch).status != "in_progress")
        good, bad = engine.get_batch_results(batch, asked, {"response_format": FORMAT})
    assert good.text == '{"score": 3}' and bad.error is not None and bad.error.type == "schema_mismatch"
