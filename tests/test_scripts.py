"""Scripts: rows whose user says more after each answer."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engines import Conversation, EngineConfig, GenerationParams, load_engine
from engines.errors import EngineError
from engines.types import to_request
from jobs import plan
from pipeline.dataset.formats import RowParser
from pipeline.dataset.keys import RequestHasher
from pipeline.storage.ledger import SEGMENT_SCHEMA, read_segment
from tests.support.batch_server import BatchServer
from tests.support.infer import Infer, ask
from tests.support.provider_server import ProviderServer

Write = Callable[..., Path]
TURNS = ["What is 7 times 6?", "And half of that?", "Thank you."]


def remote(server: ProviderServer, *more: str) -> list[str]:
    return ["engine.model=m", f"engine.base_url={server.url}", *more]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# --- rows ------------------------------------------------------------------------------------------------------------


def test_turns_are_asked_one_after_the_other_and_the_row_holds_all_of_it(
    infer: Infer, write_jsonl: Write, server: ProviderServer
) -> None:
    server.fault = lambda text, _: f"answer=({text})"
    data = write_jsonl([{"id": "1", "system": "Be kind.", "turns": TURNS}, {"id": "2", "turns": TURNS[:1]}])
    outcome = infer(data, *remote(server, "engine.max_concurrency=1"), engine="openai_compatible")
    assert outcome.exit_status == 0, infer.printed
    system = {"role": "system", "content": "Be kind."}
    dialogue = [system, *(message for turn in TURNS for message in (user(turn), said(f"({turn})")))]
    first, second = infer.rows()
    assert json.loads(first["messages"]) == dialogue
    assert first["response"] == "(Thank you.)" and first["attempts"] == 3
    assert json.loads(second["messages"]) == [user(TURNS[0]), said(f"({TURNS[0]})")]
    assert json.loads(first["turns"]) == TURNS
    asked = [seen.body["messages"] for seen in server.requests if seen.body["messages"][0] == system]
    assert asked == [dialogue[:2], dialogue[:4], dialogue[:6]]
    tokens = sum(len(json.dumps(seen.body["messages"])) // 4 for seen in server.requests)
    assert outcome.manifest["tokens"]["input"] == tokens == sum(row["usage"]["input"] for row in (first, second))
    # Nothing is asked again, and the output is the same out of the ledger.
    again = infer(data, *remote(server, "output=jsonl"), engine="openai_compatible")
    assert again.manifest["this_run"]["asked"] == 0
    lines = (infer.out / "data" / "part-00000.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["messages"] == dialogue and "dialogue" not in json.loads(lines[0])


@pytest.mark.slow
def test_an_error_ends_the_turns_names_its_own_and_keeps_what_was_said(
    infer: Infer, write_jsonl: Write, server: ProviderServer
) -> None:
    server.fault = lambda text, _: "400" if text == TURNS[1] else f"answer=({text})"
    outcome = infer(write_jsonl([{"turns": TURNS}]), *remote(server), engine="openai_compatible")
    [row] = infer.rows()
    assert row["error"]["type"] == "bad_request" and row["error"]["message"].startswith("turn 2 of 3: ")
    assert json.loads(row["messages"]) == [user(TURNS[0]), said(f"({TURNS[0]})"), user(TURNS[1])]
    assert row["response"] is None and row["usage"]["input"] > 0 and row["attempts"] == 2
    assert outcome.manifest["tokens"]["input"] == row["usage"]["input"]
    # The errors can be run again as they are.
    server.fault = lambda text, _: None
    infer.out = infer.out.with_name("again")
    assert infer(infer.out.with_name("out") / "errors", *remote(server), engine="openai_compatible").exit_status == 0
    assert infer.rows()[0]["response"] == "Thank you."


def test_a_row_with_an_answer_that_was_cut_off_counts_as_cut_off(server: ProviderServer) -> None:
    server.plan[TURNS[0]] = ["length"]
    with load_engine("openai_compatible", model="m", base_url=server.url) as engine:
        asked = [
            dataclasses.replace(to_request(ask(TURNS[at]), GenerationParams()), turns=TURNS[at + 1 :]) for at in (0, 1)
        ]
        cut, whole = (asyncio.run(engine.generate(request)) for request in asked)
    assert (cut.error, cut.finish_reason, whole.finish_reason) == (None, "length", "stop")


def test_turns_may_be_in_any_column_of_a_table(infer: Infer, tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"questions": [["a", "b"], ["c"], []], "dialogue": ["x", "y", "z"]}), path)
    infer(path, "dataset.columns.turns=questions")
    rows = infer.rows()
    assert [row["response"] for row in rows] == ["b", "c", None]
    assert rows[2]["error"]["message"].endswith("turns is empty")
    assert [row["dialogue"] for row in rows] == ["x", "y", "z"]  # a name that only the ledger has is the input's


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"turns": ["a", ""]}, "turns[1] must be text, or a list of content parts"),
        ({"turns": ["a", {"role": "user"}]}, "turns[1] must be text, or a list of content parts"),
        ({"turns": 3}, "turns must be a list"),
        ({"turns": ["a", [{"text": "b"}]]}, "has a part without a 'type'"),
    ],
)
def test_what_is_wrong_with_turns_is_said(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(EngineError) as raised:
        RowParser().parse(row)
    assert reason in str(raised.value)


def test_messages_with_several_of_the_user_stay_one_request(infer: Infer, write_jsonl: Write) -> None:
    infer(write_jsonl([{"messages": [user("a"), user("b")], "turns": ["c"]}]))
    [row] = infer.rows()
    assert json.loads(row["messages"]) == [user("a"), user("b"), said("b")]


def test_every_turn_is_part_of_the_identity() -> None:
    hasher = RequestHasher(EngineConfig(kind="echo"), GenerationParams())

    def key(row: dict[str, Any]) -> bytes:
        return hasher.key(RowParser().parse(row), "f:1")

    assert key({"turns": ["a", "b"]}) != key({"turns": ["a", "c"]}) != key({"turns": ["a"]})
    assert key({"turns": ["a"]}) == key({"prompt": "a"})


# --- engines ---------------------------------------------------------------------------------------------------------


def test_a_program_may_ask_a_multi_turn_conversation(server: ProviderServer) -> None:
    server.fault = lambda text, _: "answer=(a)" if text == "a" else 'answer=["(b)", "(B)"]'
    with load_engine("openai_compatible", model="m", base_url=server.url) as engine:
        [completion] = engine.infer([Conversation([user("a")], turns=["b"])], {"n": 2, "max_tokens": 5})
    assert completion.text == "(b)" and completion.dialogue == [said("(a)"), user("b")]
    assert [seen.body.get("n") for seen in server.requests] == [None, 2]  # the answers before the last are one each


def test_every_turn_is_in_its_shape_and_corrections_are_not_part_of_what_was_said(server: ProviderServer) -> None:
    answers = iter(['{"n": 1}', "two", '{"n": 2}'])
    server.fault = lambda text, _: f"answer={next(answers)}"
    with load_engine("openai_compatible", model="m", base_url=server.url) as engine:
        generation = {"response_format": {"type": "object", "required": ["n"]}}
        [completion] = engine.infer([{**ask("a"), "turns": ["b"]}], generation)
    assert completion.error is None and completion.attempts == 3
    assert completion.dialogue == [said('{"n": 1}'), user("b")] and completion.text == '{"n": 2}'


def test_a_refusal_within_the_turns_ends_them(server: ProviderServer) -> None:
    server.plan["a"] = ["refusal"]
    with load_engine("openai_compatible", model="m", base_url=server.url) as engine:
        [completion] = engine.infer([{**ask("a"), "turns": ["b"]}])
    assert completion.error is not None and completion.error.type == "content_filter" and len(server.requests) == 1
    assert completion.error.message.startswith("turn 1 of 2: ")


def test_a_fallback_asks_all_turns_itself(server: ProviderServer) -> None:
    server.fault = lambda text, _: "400" if text == "b" else "answer=first"
    with ProviderServer(fault=lambda text, _: "answer=second") as other:
        second = {"engine": "openai_compatible", "model": "b", "base_url": other.url}
        with load_engine("openai_compatible", model="a", base_url=server.url, fallback=[second]) as engine:
            [completion] = engine.infer([{**ask("a"), "turns": ["b"]}])
    assert completion.dialogue == [said("second"), user("b")] and completion.text == "second"
    assert completion.attempts == 4


def test_batch_apis_are_not_asked_multi_turn_conversations(
    infer: Infer, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    with BatchServer(delay_s=0.1) as batches:
        keys = [f"engine.base_url={batches.url}/v1", "engine.model=m", "run.mode=batch", "run.batch_poll_s=0.1"]
        infer(write_jsonl([{"turns": ["a", "b"]}, {"turns": ["a"]}]), *keys, engine="openai")
    multi_turn, single = infer.rows()
    assert multi_turn["error"]["type"] == "invalid_input"
    assert "one after the other, which no batch API can do (run.mode=live does)" in multi_turn["error"]["message"]
    assert single["response"] == "answer to: a"


@pytest.mark.slow
def test_llamacpp_goes_on_from_what_was_said(infer: Infer, write_jsonl: Write) -> None:
    turns = ["What is the capital of France?", "And of Italy?"]
    data = write_jsonl([{"turns": turns}, {"turns": turns}])  # equal ones are asked once
    assert infer(data, "generation.max_tokens=24", engine="llamacpp").exit_status == 0, infer.printed
    first, second = infer.rows()
    assert first["messages"] == second["messages"]
    messages = json.loads(first["messages"])
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2 and "Paris" in messages[1]["content"]
    assert first["usage"]["cached_input"] > 0  # the second request begins as the first one did


# --- around ----------------------------------------------------------------------------------------------------------


def test_segments_of_an_earlier_version_are_read(infer: Infer, write_jsonl: Write) -> None:
    data = write_jsonl([ask("a"), ask("b")])
    infer(data)
    before = infer.rows()
    for path in (infer.out / "_segments").glob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["dialogue", "message_fields"]), path)
        assert read_segment(pa.fs.LocalFileSystem(), str(path)).schema == SEGMENT_SCHEMA
    (infer.out / "manifest.json").unlink()
    assert infer(data).manifest["this_run"]["asked"] == 0
    assert infer.rows() == before


def test_plan_counts_every_turn(write_jsonl: Write, capsys: pytest.CaptureFixture[str]) -> None:
    def told(row: dict[str, Any]) -> str:
        assert plan.main([f"dataset.path={write_jsonl([row])}", "engine=llamacpp", "generation.max_tokens=10"]) == 0
        return capsys.readouterr().out

    one, three = told({"turns": TURNS[:1]}), told({"turns": TURNS})
    tokens = [int(re.findall(r"prompt tokens +(\d+) ", text)[0]) for text in (one, three)]
    assert "at most 10" in one and "at most 30" in three
    assert tokens[1] > tokens[0] + 10
