"""The inputs of tasks other than a chat: columns, templates, conversations, and lines of OpenAI batch files."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from engines.config import EngineConfig
from engines.errors import ConfigError, EngineError
from engines.params import GenerationParams
from engines.tasks import TASKS
from engines.types import to_request
from pipeline.configuration.compose import compose
from pipeline.dataset.formats import Parsed, RowParser
from pipeline.dataset.keys import RequestHasher
from pipeline.executors.requests import prefix_of, request_json, request_of
from pipeline.storage.ledger import VALUE_COLUMNS

USER = {"role": "user", "content": "q"}
SAID = {"role": "assistant", "content": "a"}
TALK = [USER, SAID]


def parse(task: str, row: dict[str, Any], **options: Any) -> Parsed:
    return pickle.loads(pickle.dumps(RowParser(task=task, **options))).parse(row)


@pytest.mark.parametrize(
    ("task", "row", "options", "inputs"),
    [
        ("embed", {"text": "a", "input": "b"}, {}, {"text": "a"}),
        ("embed", {"input": "b", "body": "not a request"}, {}, {"text": "b"}),
        ("embed", {"review": "r", "text": 3}, {"columns": {"text": "review"}}, {"text": "r"}),
        ("embed", {"text": "a", "input": "b"}, {"columns": {"text": None}, "template": "<{{ input }}>"}, {"text": "<b>"}),
        ("embed", {"text": "a", "messages": TALK}, {}, {"text": "a"}),
        ("classify", {"a": "x", "b": "y"}, {"template": "{{ a }} {{ b }}"}, {"text": "x y"}),
        ("score", {"query": "q", "text": "t"}, {}, {"query": "q", "text": "t"}),
        ("score", {"query": "q", "doc": "t"}, {"columns": {"text": "doc"}}, {"query": "q", "text": "t"}),
        ("rerank", {"query": "q", "documents": ["a", "b"]}, {}, {"query": "q", "documents": ["a", "b"]}),
        ("rerank", {"query": "q", "documents": '["a", {"text": "b"}]'}, {}, {"query": "q", "documents": ["a", "b"]}),
        ("loglikelihood", {"prompt": "p", "completion": "c"}, {}, {"prompt": "p", "completion": "c"}),
        ("loglikelihood", {"q": "p", "completion": ""}, {"columns": {"prompt": "q"}}, {"prompt": "p", "completion": ""}),
        ("loglikelihood", {"completion": "c"}, {}, {"prompt": "", "completion": "c"}),
        ("loglikelihood", {"text": "c"}, {"columns": {"completion": "text"}}, {"prompt": "", "completion": "c"}),
        ("loglikelihood", {"prompt": 1, "completion": "c"},
         {"columns": {"prompt": None}}, {"prompt": "", "completion": "c"}),
    ],
)  # fmt: skip
def test_the_inputs_of_a_task_are_columns_or_a_template(
    task: str, row: dict[str, Any], options: dict[str, Any], inputs: dict[str, Any]
) -> None:
    parsed = parse(task, row, **options)
    assert (parsed.task, parsed.inputs, parsed.messages) == (task, inputs, [])


@pytest.mark.parametrize(
    ("task", "row", "options", "messages"),
    [
        ("classify", {"messages": TALK, "text": "t"}, {}, [USER]),
        ("classify", {"messages": TALK}, {"last_answer": "keep"}, TALK),
        ("classify", {"prompt": "q"}, {}, [USER]),
        ("score", {"messages": TALK}, {}, TALK),
        ("score", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {}, TALK),
        ("loglikelihood", {"talk": TALK}, {"columns": {"messages": "talk"}}, TALK),
        ("loglikelihood", {"q": "q", "a": "a"}, {"template": {"user": "{{ q }}", "assistant": "{{ a }}"}}, TALK),
        ("score", {"messages": TALK, "system": "s"}, {}, [{"role": "system", "content": "s"}, *TALK]),
    ],
)
def test_a_conversation_is_an_input_of_the_tasks_that_take_one(
    task: str, row: dict[str, Any], options: dict[str, Any], messages: list[Any]
) -> None:
    parsed = parse(task, row, **options)
    assert (parsed.task, parsed.inputs, parsed.messages, parsed.reference) == (
        task, {}, messages, "a" if messages == [USER] and "prompt" not in row else None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("task", "row", "options", "said"),
    [
        ("embed", {"review": "r", "n": 3}, {}, "task=embed needs text; the row has the columns review, n (to name them: "
         "dataset.columns.text=review)"),
        ("embed", {"text": None}, {}, "the column 'text' is null"),
        ("embed", {"r": None}, {"columns": {"text": "r"}}, "the column 'r' (dataset.columns.text) is null"),
        ("embed", {"x": 1}, {"columns": {"text": "r"}}, "no column 'r' (dataset.columns.text)"),
        ("embed", {"text": 3}, {}, "the column 'text' must be text, not int"),
        ("embed", {"a": "x"}, {"template": {"system": "s", "user": "{{ a }}"}},
         "task=embed needs text; this row has messages"),
        ("score", {"query": "q"}, {}, "dataset.columns.query=query dataset.columns.text=query"),
        ("rerank", {"query": "q", "documents": []}, {}, "documents must be a list of at least one text"),
        ("rerank", {"query": "q", "documents": [1]}, {}, "documents[0] must be text, not int"),
        ("loglikelihood", {"messages": [USER]}, {}, "needs a conversation that ends with an answer"),
        ("loglikelihood", {"prompt": "p"}, {}, "task=loglikelihood needs prompt and completion or messages"),
        ("loglikelihood", {"prompt": None, "completion": "c"}, {}, "the column 'prompt' is null"),
    ],
)  # fmt: skip
def test_an_error_of_a_row_names_the_task_and_the_key_to_set(
    task: str, row: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(EngineError) as caught:
        parse(task, row, **options)
    assert caught.value.type == "invalid_input" and said in str(caught.value)


@pytest.mark.parametrize(
    ("task", "columns", "said"),
    [
        ("chat", {"text": "t"}, "task=chat does not read dataset.columns.text; it reads messages"),
        ("embed", {"query": "t"}, "task=embed does not read dataset.columns.query; it reads text"),
        ("score", {"text": "t", "documents": "d"}, "it reads query and text or messages"),
        ("embed", {"messages": "m"}, "dataset.columns.messages is not read with dataset.format=auto and task=embed"),
    ],
)
def test_a_role_without_meaning_for_the_task_is_refused(task: str, columns: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match="dataset.columns") as caught:
        RowParser(task=task, columns=columns)
    assert said in str(caught.value)


# -- lines of OpenAI batch files ------------------------------------------------------------------------------------------


def line(url: str | None, body: dict[str, Any]) -> dict[str, Any]:
    return {"custom_id": "c", "method": "POST", "body": body} | ({"url": url} if url else {})


@pytest.mark.parametrize(
    ("url", "body", "task", "inputs", "generation"),
    [
        ("/v1/embeddings", {"input": "t", "dimensions": 4, "encoding_format": "base64"}, "embed", {"text": "t"},
         {"dimensions": 4}),
        ("/v1/embeddings", {"input": ["t"], "user": "u"}, "embed", {"text": "t"}, {}),
        ("/v1/classify", {"input": "t"}, "classify", {"text": "t"}, {}),
        ("/v1/score", {"text_1": "q", "text_2": "t"}, "score", {"query": "q", "text": "t"}, {}),
        ("/v1/score", {"query": "q", "documents": ["t"]}, "score", {"query": "q", "text": "t"}, {}),
        ("/score", {"text_1": "q", "text_2": ["a", "b"]}, "rerank", {"query": "q", "documents": ["a", "b"]}, {}),
        ("/v2/rerank", {"query": "q", "documents": ["a"], "top_n": 1}, "rerank", {"query": "q", "documents": ["a"]}, {}),
        ("/v1/completions", {"prompt": "t", "echo": True, "max_tokens": 0, "logprobs": 1}, "loglikelihood",
         {"prompt": "", "completion": "t"}, {"logprobs": 1}),
        ("https://x/openai/embeddings?api-version=1", {"input": "t"}, "embed", {"text": "t"}, {}),
    ],
)  # fmt: skip
def test_the_url_of_a_line_decides_its_task(
    url: str, body: dict[str, Any], task: str, inputs: dict[str, Any], generation: dict[str, Any]
) -> None:
    parsed = parse("chat", line(url, {"model": "m", **body}))
    assert (parsed.task, parsed.inputs, parsed.messages) == (task, inputs, [])
    assert (parsed.generation, parsed.model, parsed.id) == (generation, "m", "c")
    assert set(parsed.extra_body) <= {"user"}


def test_a_line_without_a_task_in_its_url_has_that_of_the_run() -> None:
    for url in (None, "/v1/chat/completions", "/v4/other"):
        parsed = parse("chat", line(url, {"messages": [USER], "logprobs": True, "top_logprobs": 2}))
        assert (parsed.task, parsed.messages, parsed.generation) == ("chat", [USER], {"logprobs": 2})
    assert parse("embed", line(None, {"input": "t"})).inputs == {"text": "t"}
    assert parse("embed", line("/v1/chat/completions", {"messages": [USER]})).task == "chat"
    assert parse("chat", line("/v1/score", {"messages": TALK})).messages == TALK
    assert parse("chat", line("/v1/classify", {"messages": [USER]})).task == "classify"


@pytest.mark.parametrize(
    ("url", "body", "said"),
    [
        ("/v1/embeddings", {"input": ["a", "b"]}, "body.input is a list of 2 texts: write one text a line"),
        ("/v1/embeddings", {"input": [1, 2]}, "body.input is a list of something other than texts"),
        ("/v1/embeddings", {}, "body has no input or text"),
        ("/v1/score", {"text_1": "q"}, "body has no text_2"),
        ("/v1/completions", {"prompt": "p"}, "a line for /v1/completions asks to continue a plain text"),
        ("/v1/moderations", {"input": "p"}, "body has no messages (its url is '/v1/moderations')"),
    ],
)
def test_a_body_that_no_task_can_read_is_an_error_of_its_row(url: str, body: dict[str, Any], said: str) -> None:
    with pytest.raises(EngineError) as caught:
        parse("chat", line(url, body))
    assert said in str(caught.value)


# -- requests and keys ----------------------------------------------------------------------------------------------------


def key(parsed: Parsed, **generation: Any) -> tuple[bytes, bool]:
    hasher = RequestHasher(EngineConfig(kind="echo", model="m"), GenerationParams.parse(generation))
    found = hasher.row_key(parsed, "f:1")
    return found.key, found.is_numbered


def test_a_key_has_the_task_and_its_inputs() -> None:
    rows = [
        Parsed(TALK), Parsed(TALK, task="score"), Parsed(TALK, task="loglikelihood"),
        Parsed([], task="embed", inputs={"text": "a"}), Parsed([], task="embed", inputs={"text": "b"}),
        Parsed([], task="classify", inputs={"text": "a"}),
        Parsed([], task="embed", inputs={"text": "a"}, generation={"dimensions": 2}),
    ]  # fmt: skip
    assert len({key(row)[0] for row in rows}) == len(rows)


def test_rows_of_a_task_share_an_answer_whatever_a_chat_samples() -> None:
    row = Parsed([], task="embed", inputs={"text": "a"}, id="x")
    assert key(row, temperature=1.0, max_tokens=3) == key(row) == (key(row)[0], False)
    assert key(Parsed([USER]), temperature=1.0)[1] is False  # by its place
    assert key(Parsed([USER], id="x"), temperature=1.0)[1]


def test_a_request_keeps_its_task_and_drops_parameters_of_chats() -> None:
    row = Parsed([], task="embed", inputs={"text": "a"}, generation={"dimensions": 2})
    base = GenerationParams.parse({"temperature": 1.0, "max_tokens": 3})
    request = request_of(json.loads(request_json(row)), base, b"k")
    assert (request.task, request.inputs, request.messages) == ("embed", {"text": "a"}, [])
    assert request.generation.values == {"dimensions": 2}
    assert json.loads(request_json(Parsed([USER]))) == {"messages": [USER]}
    again = to_request({"task": "embed", "inputs": {"text": "a"}}, GenerationParams())
    assert (again.task, again.inputs) == (request.task, request.inputs)
    same = Parsed([], task="loglikelihood", inputs={"prompt": "p", "completion": "c"})
    other = Parsed([], task="loglikelihood", inputs={"prompt": "p", "completion": "d"})
    assert prefix_of(same) == prefix_of(other) != prefix_of(row)


def test_the_ledger_has_a_column_for_each_value_of_a_task() -> None:
    assert {name for kind in TASKS.values() for name in kind.columns} == VALUE_COLUMNS.keys()


# -- the configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said", "key"),
    [
        (["task=embd"], "task=embd is not known (did you mean 'embed'?)", "task"),
        (["tsk=embed"], "there is no key 'tsk' (did you mean 'task'?)", "task"),
        (["task.x=embed"], "task takes a value and has no keys of its own", "task"),
        (["task=embed", "generation.temperature=0"], "generation.temperature has no meaning for task=embed",
         "generation.temperature"),
        (["generation.dimensions=3"], "generation.dimensions has no meaning for task=chat", "generation.dimensions"),
        (["task=score", "output.columns=schema"], "output.columns has no meaning for task=score", "output.columns"),
        (["task=score", "dataset.last_answer=continue"], "dataset.last_answer=continue has no meaning",
         "dataset.last_answer"),
        (["task=score", "engine=anthropic"], "engine=anthropic does not support task=score (it supports chat", "task"),
        (["task=score", "engine.fallback=[anthropic]"], "engine=anthropic does not support task=score", "task"),
    ],
)  # fmt: skip
def test_a_configuration_that_has_no_meaning_for_the_task_is_refused(words: list[str], said: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        engine = [] if any(word.startswith("engine=") for word in words) else ["engine=echo"]
        compose([*engine, "dataset.path=x", "output.path=y", *words]).check()
    assert said in str(caught.value) and caught.value.key == key


def test_a_run_file_sets_the_task_and_a_typed_key_replaces_it(tmp_path: Any) -> None:
    from jobs.write_run_file import run_file_text, typed_values
    from pipeline.configuration.compose import compose_all
    from pipeline.configuration.run_file import RunFile
    from pipeline.program.keys import GivenKeys

    path = tmp_path / "run.yaml"
    path.write_text("task: embed\nengine: echo\ndataset:\n  path: in.csv\n")
    file = RunFile.read(str(path))
    assert compose([], run_file=file).task == "embed"
    assert file.content == {"task": "embed", "engine": {"name": "echo"}, "dataset": {"path": "in.csv"}}
    assert compose([], run_file=file).dataset.path == str(tmp_path / "in.csv")
    assert compose(["task=score"], run_file=file).task == "score"
    keys = GivenKeys.of(str(path), None)
    keys.add({"generation.dimensions": 3, "task": "rerank"})
    assert keys.compose().config.task == "rerank"
    written = run_file_text(typed_values(compose_all(["task=score", "engine=echo"]), "x.yaml"), {"engine": "echo"}, [])
    assert written.startswith("#") and "\ntask: score\n" in written
