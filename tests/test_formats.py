"""Rows to conversations: each format, overrides, templates, and the reasons for rows that are none."""

import copy
import dataclasses
import json
import pickle
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import ConfigError, EngineError
from engines.params import GenerationParams
from pipeline.dataset.formats import OUTPUT_COLUMNS, ArrowRow, Parsed, RowParser, passthrough_names
from pipeline.dataset.read import read_file_split
from pipeline.dataset.source import list_file_splits
from pipeline.storage.exact_json import loads

HI = [{"role": "user", "content": "hi"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def parse(row: dict[str, Any], /, *args: Any, **options: Any) -> Parsed:
    """Parses, checks that the row is left as it was, and that a pickled parser does the same."""
    parser = RowParser(*args, **options)
    before = copy.deepcopy(row)
    parsed = parser.parse(row)
    assert row == before
    assert pickle.loads(pickle.dumps(parser)).parse(row) == parsed
    return parsed


def refusal(row: dict[str, Any], /, *args: Any, **options: Any) -> str:
    with pytest.raises(EngineError) as caught:
        RowParser(*args, **options).parse(row)
    assert caught.value.type == "invalid_input"
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["auto", "messages"])
@pytest.mark.parametrize("as_text", [False, True])
def test_messages_come_as_a_list_or_as_json_text(format: str, as_text: bool) -> None:
    messages = [
        {"role": "system", "content": "be brief", "name": None, "x_own": {"big": 2**80, "null": None}},
        {
            "role": "user",
            "content": [{"type": "text", "text": "é \u2028"}, {"type": "audio", "input_audio": {"k": []}}],
        },
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
    ]
    row = {"id": "a", "messages": json.dumps(messages) if as_text else messages}
    assert parse(row, format) == Parsed(messages, "a")


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([], "messages is empty"),
        ({"role": "user"}, "messages must be a list, not an object"),
        (5, "messages must be a list, not int"),
        ("hello", "messages is text that is not JSON: invalid JSON: Expecting value at column 1"),
        ('"hello"', "messages must be a list, not str"),
        ([{"role": "human", "content": "x"}], "messages[0] has the unknown role 'human'"),
        ([{"role": "usr", "content": "x"}], "messages[0] has the unknown role 'usr' (did you mean 'user'?)"),
        ([*HI, "x"], "messages[1] must be an object, not str"),
        ([{"role": "user"}], "messages[0].content must be text or a list of parts, not NoneType"),
        ('[{"role": "user", "content": "\\ud800"}]', "messages is text that is not JSON: a lone surrogate"),
    ],
)
def test_messages_that_are_no_conversation_are_refused(messages: Any, reason: str) -> None:
    assert refusal({"messages": messages}).startswith(reason)


def test_a_row_without_a_conversation_names_its_columns() -> None:
    assert refusal({"question": "x", "n": 1}) == (
        "no messages, conversations, body, prompt or turns among the columns question, n "
        "(to ask the text in 'question': dataset.columns.prompt=question; to ask several columns: dataset.template)"
    )
    assert refusal({"prompt": "x"}, "messages").startswith("no messages among the columns prompt (")
    assert refusal({}).startswith("no messages, conversations, body, prompt or turns among the columns none")
    assert "c19, … (" in refusal({f"c{i}": 1 for i in range(30)})
    assert refusal({"id": 1, "prompt": None}) == "the column 'prompt' is null"
    assert refusal({"messages": None, "prompt": None}) == "the columns 'messages' and 'prompt' are null"


def test_auto_decides_for_each_row_by_what_is_not_null() -> None:
    nothing = {"messages": None, "conversations": None, "body": None, "prompt": None}
    say = [{"from": "human", "value": "b"}]
    body = {"messages": [{"role": "user", "content": "c"}]}
    rows = [nothing | {"messages": HI}, nothing | {"conversations": say}, nothing | {"body": body}]
    rows.append(nothing | {"prompt": "d"})
    assert [parse(row).messages[0]["content"] for row in rows] == ["hi", "b", "c", "d"]
    assert parse({"messages": HI, "conversations": say, "prompt": "d"}).messages == HI


# --- ids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns, expected",
    [
        ({"id": "a", "custom_id": "b"}, "a"),
        ({"id": 7}, "7"),
        ({"id": 2**70}, str(2**70)),
        ({"id": "007"}, "007"),
        ({"id": 0}, "0"),
        ({"id": None, "conversation_id": "c"}, "c"),
        ({"id": "", "custom_id": "d"}, "d"),
        ({"id": {"a": 1}}, '{"a": 1}'),
        ({}, None),
    ],
)
def test_the_rows_own_id_is_text(columns: dict[str, Any], expected: str | None) -> None:
    assert parse({**columns, "prompt": "x"}).id == expected


# --- overrides -------------------------------------------------------------------------------------------------------


def test_overrides_come_from_generation_tools_model_and_adapter() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"default": None, "enum": [None]}}}]
    row = {"prompt": "x", "generation": {"seed": 5, "top_p": None}, "tools": tools, "model": "m", "adapter": "a"}
    assert parse(row) == Parsed(
        [{"role": "user", "content": "x"}], None, {"tools": tools, "seed": 5, "top_p": None}, "m", "a"
    )
    as_text = row | {"generation": json.dumps(row["generation"]), "tools": json.dumps(tools)}
    assert parse(as_text) == parse(row)


def test_single_generation_fields_as_columns_are_data_unless_they_are_mapped() -> None:
    row = {"prompt": "x", "seed": 5, "temperature": 30.5, "budget": 12, "stop": None}
    assert parse(row).generation == {}
    assert parse(row, columns={"max_tokens": "budget", "seed": "seed"}).generation == {"max_tokens": 12, "seed": 5}
    assert parse(row, columns={"stop": "stop"}).generation == {}


def test_null_and_empty_overrides_are_none() -> None:
    row = {"prompt": "x", "generation": None, "tools": [], "model": "", "adapter": None}
    assert parse(row) == parse({"prompt": "x"})
    assert parse({"prompt": "x", "generation": "", "tools": ""}) == parse({"prompt": "x"})


def test_a_column_called_model_that_is_no_text_is_data_unless_it_is_mapped() -> None:
    assert parse({"prompt": "x", "model": 3, "adapter": ["y"]}).model is None
    reason = "the column 'model' (dataset.columns.model) must hold text, not int"
    assert refusal({"prompt": "x", "model": 3}, columns={"model": "model"}) == reason


def test_overrides_of_the_wrong_shape_are_refused() -> None:
    data = "(dataset.columns.{}=null makes it data)"
    reason = f"the column 'tools' {data.format('tools')} must be a list, not an object"
    assert refusal({"prompt": "x", "tools": {"a": 1}}) == reason
    assert refusal({"prompt": "x", "tools": "[{"}).startswith(f"the column 'tools' {data.format('tools')} is text that is")
    assert refusal({"prompt": "x", "generation": {"temprature": 1}}) == (
        f"the column 'generation' {data.format('generation')} has 'temprature', which is not a generation parameter "
        "(did you mean 'temperature'?)"
    )
    assert refusal({"prompt": "x", "g": [1]}, columns={"prompt": "prompt", "generation": "g"}) == (
        "the column 'g' must be an object, not a list"
    )


# --- columns ---------------------------------------------------------------------------------------------------------


def test_columns_map_roles_to_the_tables_own_names() -> None:
    row = {"qid": 9, "question": "why?", "rules": "be brief", "who": "m", "messages": HI, "id": "other"}
    columns = {"prompt": "question", "id": "qid", "system": "rules", "model": "who"}
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
    assert parse(row, columns=columns) == Parsed(messages, "9", {}, "m")
    assert parse({"chat": HI, "system": "data"}, columns={"messages": "chat"}).messages == HI
    assert parse({"chat": HI, "rules": "r"}, columns={"messages": "chat", "system": "rules"}).messages[1:] == HI


def test_a_mapped_column_that_is_not_there_or_null_is_named() -> None:
    columns = {"prompt": "question", "max_tokens": "budget"}
    reason = "there is no column 'budget' (dataset.columns.max_tokens) among question, x"
    assert refusal({"question": "a", "x": 1}, columns=columns) == reason
    reason = "the column 'question' (dataset.columns.prompt) is null"
    assert refusal({"question": None, "budget": 1}, columns=columns) == reason


@pytest.mark.parametrize(
    "options, message",
    [
        ({"format": "mesages"}, r"there is no format 'mesages' \(did you mean 'messages'\?\)"),
        ({"columns": {"promt": "x"}}, r"there is no role 'promt' \(did you mean 'prompt'\?\)"),
        ({"columns": {"prompt": 5}}, r"dataset\.columns\.prompt must be the name of a column or null, not 5"),
        ({"columns": {"prompt": "a"}, "format": "messages"}, r"prompt is not read with dataset\.format=messages"),
        ({"columns": {"prompt": "a"}, "template": "x"}, r"both say where the conversation is"),
        ({"template": "{{ a "}, r"dataset\.template: line 1: unexpected end of template"),
        ({"template": "a\n{% if %}"}, r"dataset\.template: line 2: "),
        ({"template": {"user": "a", "sistem": "b"}}, r"there is no role 'sistem' \(did you mean 'system'\?\)"),
        ({"template": [{"role": "user"}]}, r"must be a text, a list of \{role, content\}"),
        ({"template": {"user": 5}}, r"the user message must be a text, not int"),
        ({"template": {}}, r"dataset\.template is empty"),
        ({"template": {"system": "ok", "user": "{{"}}, r"the user message, line 1: "),
        ({"template": 5}, r"must be a text, a list"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_row(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RowParser(**options)


# --- prompt ----------------------------------------------------------------------------------------------------------


def test_a_prompt_is_a_user_message_with_an_optional_system_message() -> None:
    user = {"role": "user", "content": "x"}
    assert parse({"prompt": "x"}, "prompt").messages == [user]
    assert parse({"prompt": "x", "system": "s"}).messages == [{"role": "system", "content": "s"}, user]
    assert parse({"prompt": "x", "system": ""}).messages == [user]
    assert parse({"prompt": b"x"}).messages == [user]
    assert parse({"prompt": HI}).messages == HI


@pytest.mark.parametrize("value, kind", [(5, "int"), (True, "bool"), ({"a": 1}, "an object"), (1.5, "float")])
def test_a_prompt_that_is_no_text_is_refused(value: Any, kind: str) -> None:
    assert refusal({"prompt": value}) == f"prompt must be text, not {kind}"
    assert refusal({"p": "x", "s": value}, columns={"prompt": "p", "system": "s"}) == (
        f"the column 's' must be text, not {kind}"
    )


def test_a_prompt_that_is_not_utf8_is_refused() -> None:
    assert refusal({"prompt": b"\xff"}) == "prompt is not UTF-8 text"


# --- openai_batch ----------------------------------------------------------------------------------------------------


def test_the_body_of_a_batch_line_gives_messages_and_overrides() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"const": None}}}]
    body = {
        "model": "gpt-4o-mini", "messages": HI, "max_completion_tokens": 9, "temperature": 0, "stop": "X", "n": 2,
        "tools": tools, "tool_choice": "auto", "response_format": {"type": "json_object"}, "logprobs": True,
        "top_logprobs": 3, "stream": False, "user": "u", "seed": None,
    }  # fmt: skip
    row = {"custom_id": "r-1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    expected = {
        "max_tokens": 9, "temperature": 0, "stop": "X", "n": 2, "tools": tools, "tool_choice": "auto",
        "response_format": {"type": "json_object"}, "logprobs": 3,
    }  # fmt: skip
    for format in ("auto", "openai_batch"):
        parsed = parse(row, format)
        assert parsed == Parsed(HI, "r-1", parsed.generation, "gpt-4o-mini", extra_body={"user": "u"})
        assert parsed.generation == expected
    assert GenerationParams.parse(expected).stop == ["X"]
    assert parse(row | {"body": json.dumps(body)}) == parse(row)


@pytest.mark.parametrize(
    "body, expected",
    [({"logprobs": False}, {}), ({"logprobs": True}, {"logprobs": 0}), ({"max_tokens": 5}, {"max_tokens": 5})],
)
def test_fields_of_a_body(body: dict[str, Any], expected: dict[str, Any]) -> None:
    assert parse({"body": {"messages": HI, **body}}).generation == expected


def test_a_body_without_messages_says_what_it_is_for() -> None:
    row = {"custom_id": "a", "url": "/v1/responses", "body": {"input": "x"}}
    assert refusal(row) == "body has no messages (its url is '/v1/responses')"
    assert refusal({"body": "x"}).startswith("body is text, not a request in JSON")
    assert refusal({"body": [1]}) == "body must be an object, not a list"
    assert refusal({"body": {"messages": {"a": 1}}}) == "messages must be a list, not dict"


# --- sharegpt --------------------------------------------------------------------------------------------------------


def test_sharegpt_speakers_become_roles() -> None:
    turns = [
        {"from": speaker, "value": speaker}
        for speaker in ("system", "human", "gpt", "user", "assistant", "chatgpt", "bing", "bard", "tool")
    ]
    parsed = parse({"conversations": turns, "id": "s1"}, "sharegpt")
    assert [message["role"] for message in parsed.messages] == [
        "system", "user", "assistant", "user", "assistant", "assistant", "assistant", "assistant", "tool",
    ]  # fmt: skip
    assert [message["content"] for message in parsed.messages] == [turn["from"] for turn in turns]
    assert parse({"conversations": json.dumps(turns), "id": "s1"}) == parsed


def test_sharegpt_function_calls_are_bound_to_their_observations() -> None:
    turns = [
        {"from": "human", "value": "weather?"},
        {"from": "function_call", "value": '{"name": "get", "arguments": {"city": "Bärn"}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "function_call", "value": '[{"name": "a"}, {"name": "b", "arguments": "{}"}]'},
        {"from": "observation", "value": "1"},
        {"from": "tool", "value": "2"},
        {"from": "gpt", "value": "done"},
    ]
    messages = parse({"conversations": turns, "system": "s", "tools": '[{"name": "get"}]'}).messages
    assert messages[0] == {"role": "system", "content": "s"}
    assert messages[2] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_0", "type": "function", "function": {"name": "get", "arguments": '{"city": "Bärn"}'}}],
    }
    assert messages[3] == {"role": "tool", "content": "sunny", "tool_call_id": "call_0"}
    assert [call["id"] for call in messages[4]["tool_calls"]] == ["call_1", "call_2"]
    assert [message["tool_call_id"] for message in messages[5:7]] == ["call_1", "call_2"]


def test_messages_under_the_sharegpt_name_are_messages() -> None:
    assert parse({"conversations": HI}).messages == HI


@pytest.mark.parametrize(
    "turn, reason",
    [
        ({"from": "humen", "value": "x"}, "conversations[0] has the unknown speaker 'humen' (did you mean 'human'?)"),
        ({"value": "x"}, "conversations[0] has the unknown speaker None"),
        ({"from": "human", "value": None}, "conversations[0].value must be text, not null"),
        ({"from": "function_call", "value": "{}"}, "conversations[0].value must be a function call with a 'name'"),
        ({"from": "function_call", "value": "x"}, "conversations[0].value is text that is not JSON"),
        ("x", "conversations[0] must be an object, not str"),
    ],
)
def test_a_sharegpt_turn_that_cannot_be_understood_is_named(turn: Any, reason: str) -> None:
    assert refusal({"conversations": [turn]}).startswith(reason)


# --- oumi ------------------------------------------------------------------------------------------------------------


def test_oumi_content_parts_become_openai_parts() -> None:
    png = "iVBORw0KGgo="
    content = [
        {"type": "text", "content": "look", "binary": None},
        {"type": "image_url", "content": "https://x/y.png"},
        {"type": "image_path", "content": "/data/a.png"},
        {"type": "image_binary", "binary": png},
        {"type": "image_binary", "binary": "/9j/4AAQ"},
    ]
    expected = [
        {"type": "text", "text": "look"},
        {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
        {"type": "image_url", "image_url": {"url": "file:///data/a.png"}},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}},
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,/9j/4AAQ"}},
    ]
    row = {"conversation_id": "o1", "messages": [{"id": "m1", "role": "user", "content": content}], "metadata": {}}
    assert parse(row, "oumi") == parse(row) == Parsed([{"role": "user", "content": expected}], "o1")


def test_parts_in_openais_form_stay_as_they_are() -> None:
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u", "detail": "low"}}]}
    assert parse({"messages": [message]}).messages == [message]


def test_message_ids_are_left_out_of_oumi_conversations_only() -> None:
    message = {"id": "m1", "role": "user", "content": "x"}
    assert parse({"messages": [message]}).messages == [message]
    assert parse({"messages": [message]}, "oumi").messages == [{"role": "user", "content": "x"}]


# --- Parquet ---------------------------------------------------------------------------------------------------------


def through_parquet(path: Path, table: pa.Table) -> list[dict[str, Any]]:
    pq.write_table(table, path)
    return [row.columns or {} for c in list_file_splits(str(path)) for batch in read_file_split(c) for row in batch]


def test_the_nulls_that_pad_arrow_structs_are_dropped(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
    ]
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}},
        {"type": "function", "function": {"name": "g", "parameters": {"properties": {"b": {"type": "number"}}}}},
    ]
    (row,) = through_parquet(tmp_path / "a.parquet", pa.Table.from_pylist([{"messages": messages, "tools": tools}]))
    assert row["messages"][0]["tool_calls"] is None  # as Arrow has it
    parsed = parse(row)
    assert parsed.messages == messages
    assert parsed.generation == {"tools": tools}


def test_json_text_in_parquet_keeps_its_nulls(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x", "name": None, "big": 2**70}]
    (row,) = through_parquet(tmp_path / "a.parquet", pa.table({"messages": [json.dumps(messages)]}))
    assert parse(row).messages == messages


def test_values_that_json_has_not_become_json_in_what_is_asked() -> None:
    row = ArrowRow(messages=[{"role": "user", "content": "x", "n": Decimal("2"), "f": Decimal("1.5"), "b": b"\xff"}])
    assert parse(row).messages == [{"role": "user", "content": "x", "n": 2, "f": 1.5, "b": "/w=="}]


def test_sharegpt_and_batch_bodies_come_from_structs_too(tmp_path: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "x", "weight": None}], "body": None},
        {"conversations": None, "body": {"messages": HI, "max_tokens": 5, "temperature": None}},
    ]
    first, second = through_parquet(tmp_path / "a.parquet", pa.Table.from_pylist(rows))
    assert parse(first).messages == [{"role": "user", "content": "x"}]
    assert parse(second) == Parsed(HI, None, {"max_tokens": 5})


# --- our own output as input -----------------------------------------------------------------------------------------

OURS: dict[str, Any] = {
    "id": "a", "index": 0, "response": None, "messages": HI, "finish_reason": None, "tool_calls": None,
    "reasoning": None, "usage": None, "model": "earlier", "engine": "echo", "attempts": 1, "latency_s": 0.1,
    "error": {"type": "server", "message": "x", "status": 500, "retryable": True},
}  # fmt: skip


def test_the_model_that_an_earlier_run_wrote_is_no_override() -> None:
    assert parse(OURS) == Parsed(HI, "a")
    assert parse(OURS | {"error": None, "response": "x"}).model is None
    assert parse(OURS | {"input_model": "own"}).model == "own"
    assert parse(OURS | {"m": "own"}, columns={"model": "m"}).model == "own"


def test_a_row_of_ours_from_a_batch_file_is_read_from_its_body() -> None:
    parsed = parse(OURS | {"body": {"messages": HI, "max_tokens": 3}, "custom_id": "a"})
    assert (parsed.messages, parsed.generation) == (HI, {"max_tokens": 3})


def test_an_errors_file_keeps_what_its_rows_asked_for() -> None:
    assert parse({"id": "a", "prompt": "x", "model": "own", "error": OURS["error"]}).model == "own"


def test_what_passes_through_and_under_which_name() -> None:
    def names(*columns: str, **options: Any) -> dict[str, str]:
        return passthrough_names(columns, RowParser(**options))

    assert names("id", "messages", "topic") == {"topic": "topic"}
    assert names("conversations", "body", "prompt") == {c: c for c in ("conversations", "body", "prompt")}
    assert names("model", "response", "x") == {"model": "input_model", "response": "input_response", "x": "x"}
    assert names("model", "input_model") == {"model": "input_input_model", "input_model": "input_model"}
    assert names("messages", "q", template="{{ q }}") == {"messages": "input_messages", "q": "q"}
    assert names("messages", "q", columns={"prompt": "q"}) == {"messages": "input_messages", "q": "q"}
    assert names("id", "qid", "prompt", columns={"id": "qid"}) == {"id": "input_id", "qid": "qid", "prompt": "prompt"}
    assert names("messages", "prompt", format="prompt") == {"messages": "input_messages", "prompt": "prompt"}
    assert names(*OUTPUT_COLUMNS, "topic", "input_model") == {"topic": "topic", "input_model": "input_model"}


def test_of_an_errors_file_our_error_does_not_pass() -> None:
    ours = pa.struct([("type", pa.string()), ("message", pa.string()), ("status", pa.int64()), ("retryable", pa.bool_())])
    parser = RowParser()
    assert passthrough_names({"prompt": pa.string(), "error": ours}, parser) == {"prompt": "prompt"}
    assert passthrough_names({"error": pa.string()}, parser) == {"error": "input_error"}
    assert passthrough_names({"error": None}, parser) == {"error": "input_error"}


# --- properties ------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=15)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | TEXT | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["messages", "conversations", "body", "prompt", "system", "id", "model", "tools", "generation", "error", "x"]
)
SHAPED = st.dictionaries(st.sampled_from(["role", "from", "value", "content", "type", "text", "messages"]), VALUES | KEYS)


@settings(max_examples=400)
@given(
    columns=st.dictionaries(KEYS, VALUES | st.lists(SHAPED, max_size=3) | SHAPED, max_size=5),
    format=st.sampled_from(["auto", "messages", "oumi", "openai_batch", "sharegpt", "prompt"]),
    arrow=st.booleans(),
)
def test_any_row_is_a_conversation_or_an_invalid_input(columns: dict[str, Any], format: str, arrow: bool) -> None:
    row = ArrowRow(columns) if arrow else columns
    before = copy.deepcopy(row)
    try:
        parsed = RowParser(format).parse(row)
        assert parsed.messages
        if arrow:
            json.dumps([parsed.messages, parsed.generation])
    except EngineError as error:
        assert error.type == "invalid_input"
        assert "\n" not in str(error)
    assert row == before


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "assistant", "tool", "function", "robot", 3])},
        optional={
            "content": TEXT | st.none() | st.just([{"type": "text", "text": "a"}]), "name": TEXT | st.none(),
            "function_call": st.none() | st.just({"name": "f", "arguments": "{}"}), "tool_calls": st.just([{"id": "1"}]),
        },
    ),
    max_size=4,
)  # fmt: skip


@settings(max_examples=400)
@given(
    columns=st.fixed_dictionaries(
        {"messages": MESSAGES},
        optional={"id": TEXT, "system": TEXT, "model": TEXT, "engine": TEXT, "conversation_id": TEXT, "prompt": TEXT},
    ),
    format=st.sampled_from(["auto", "messages", "oumi", "openai_batch"]),
    last_answer=st.sampled_from(["drop", "keep", "continue"]),
    arrow=st.booleans(),
)
def test_the_short_way_of_plain_messages_gives_the_same(
    columns: dict[str, Any], format: str, last_answer: str, arrow: bool
) -> None:
    def parse(parser: RowParser) -> Any:
        try:
            parsed = parser.parse(ArrowRow(columns) if arrow else columns)
        except EngineError as error:
            return str(error)
        assert not parsed.only_text or all(isinstance(message["content"], str) for message in parsed.messages)
        return dataclasses.replace(parsed, only_text=False)

    short, long = RowParser(format, last_answer=last_answer), RowParser(format, last_answer=last_answer)
    long._not_plain = None
    assert parse(short) == parse(long)


@settings(max_examples=100)
@given(value=st.recursive(st.none() | st.integers() | TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner)))
def test_json_is_read_as_the_standard_library_reads_it(value: Any) -> None:
    assert loads(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("row", "hint"),
    [({"body": "Hello"}, "to ask this text: dataset.columns.prompt=body"),
     ({"id": "1", "Text": "Hello"}, "to ask the text in 'Text': dataset.columns.prompt=Text; to ask several columns"),
     ({"content": "a", "question": "b"}, "dataset.columns.prompt=question"), ({"note": "a"}, "dataset.columns.prompt=note"),
     ({"a": "1", "b": "2"}, "(map one with dataset.columns or dataset.template)")],
)  # fmt: skip
def test_the_error_names_the_column_that_may_hold_the_text(row: dict[str, Any], hint: str) -> None:
    with pytest.raises(EngineError) as error:
        RowParser().parse(row)
    assert hint in str(error.value)
