"""`eagleray serve` and the tasks other than a chat: OpenAI's own SDK, and the bodies of vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import Completion, load_engine
from engines.errors import EngineError
from engines.params import GenerationParams
from pipeline.config import ServeConfig
from pipeline.serve.task_api import parse_task_call
from tests.support.checkpoint import checkpoint_dir
from tests.support.endpoint import KEY, Endpoint, start
from tests.support.pages import ROOT, blocks

openai = pytest.importorskip("openai")
pytest.importorskip(
    "ray.serve", reason="Ray Serve is not installed here: pip install 'eagleray[serve]'", exc_type=ImportError
)

TEXTS = ["one text", "another text", "ein dritter Text"]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("tasks")
    running = start(folder, "engine=echo", "serve.max_texts=4", "serve.api_key_env=MY_KEY", MY_KEY=KEY)
    yield running
    running.stop()


def told(rows: list[dict[str, Any]], **generation: Any) -> list[Completion]:
    """What the same engine says without a server."""
    with load_engine("echo") as engine:
        return engine.infer(rows, generation)


def post(endpoint: Endpoint, path: str, status: int = 200, key: str = KEY, **body: Any) -> Any:
    answer = endpoint.http.post(f"{endpoint.url}{path}", json=body, headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]["message"]


def test_the_official_sdk_gets_embeddings_in_order(endpoint: Endpoint) -> None:
    wanted = told([{"task": "embed", "inputs": {"text": text}} for text in TEXTS])
    client = endpoint.client()
    for form in (
        {},
        {"encoding_format": "float"},
        {"encoding_format": "base64"},
    ):  # the SDK asks for base64 by itself
        found = client.embeddings.create(model="echo", input=TEXTS, **form)
        assert [item.index for item in found.data] == [0, 1, 2] and found.model == "echo"
        assert found.usage.prompt_tokens == found.usage.total_tokens == sum(row.usage.input for row in wanted)
        for item, row in zip(found.data, wanted, strict=True):
            given = item.embedding
            if isinstance(given, str):
                import base64

                given = np.frombuffer(base64.b64decode(given), "<f4")
            assert np.array_equal(np.asarray(given, np.float32), row.values["embedding"])
    [short] = client.embeddings.create(model="echo", input=TEXTS[0], dimensions=3).data
    [row] = told([{"task": "embed", "inputs": {"text": TEXTS[0]}}], dimensions=3)
    assert np.array_equal(np.asarray(short.embedding, np.float32), row.values["embedding"])


def test_the_program_of_the_page_runs(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    [block] = [b for b in blocks(ROOT / "docs" / "serving.md") if b.language == "python"]
    text = block.text.replace("http://127.0.0.1:8000", endpoint.url).replace('"none"', repr(KEY))
    exec(compile(text.replace("path/to/checkpoint", "echo"), str(block), "exec"), {})
    assert capsys.readouterr().out == "2 embeddings of 8 numbers\n"


def test_scores_rankings_and_classes_have_the_forms_of_vllm(endpoint: Endpoint) -> None:
    pairs = told([{"task": "score", "inputs": {"query": "q", "text": text}} for text in TEXTS])
    for body in ({"text_1": "q", "text_2": TEXTS}, {"queries": ["q"] * 3, "documents": TEXTS}):
        found = post(endpoint, "/v1/score", **body)
        assert found["data"] == [
            {"index": at, "object": "score", "score": row.values["score"]} for at, row in enumerate(pairs)
        ]
    [ranked] = told([{"task": "rerank", "inputs": {"query": "q", "documents": TEXTS}}])
    found = post(endpoint, "/v1/rerank", query="q", documents=TEXTS, top_n=2)
    assert found["results"] == [
        {"index": item["index"], "relevance_score": item["score"], "document": {"text": TEXTS[item["index"]]}}
        for item in ranked.values["ranking"][:2]
    ]
    classes = told([{"task": "classify", "inputs": {"text": text}} for text in TEXTS])
    found = post(endpoint, "/classify", input=TEXTS)
    assert [(item["index"], item["label"], item["scores"]) for item in found["data"]] == [
        (at, row.values["label"], row.values["scores"]) for at, row in enumerate(classes)
    ]
    assert found["data"][0]["probs"] == sorted(found["data"][0]["probs"], reverse=True)


def test_a_remote_engine_reads_all_of_it(endpoint: Endpoint) -> None:
    rows: list[dict[str, Any]] = [
        *({"task": task, "inputs": {"text": text}} for task in ("embed", "classify") for text in TEXTS),
        *({"task": "score", "inputs": {"query": "q", "text": text}} for text in TEXTS),
        {"task": "rerank", "inputs": {"query": "q", "documents": TEXTS}},
        {"task": "classify", "messages": [{"role": "user", "content": "Hi"}]},
    ]
    keys: dict[str, Any] = {"base_url": endpoint.url, "headers": {"authorization": f"Bearer {KEY}"}}
    options = {"texts": 3, "conversations": True}
    tasks = {"embed": {"texts": 3, "base64": True}, "classify": options, "score": options, "rerank": {}}
    with load_engine("remote_vllm", model="echo", provider={"tasks": tasks}, **keys) as engine:
        found = engine.infer(rows)
    for row, wanted in zip(found, told(rows), strict=True):
        assert row.error is None
        for name, value in wanted.values.items():
            assert np.array_equal(row.values[name], value) if name == "embedding" else row.values[name] == value


@pytest.mark.slow
def test_transformers_gives_likelihoods_through_the_sdk(tmp_path: Path) -> None:
    model = str(checkpoint_dir())
    rows: list[Any] = [{"task": "loglikelihood", "inputs": {"prompt": "", "completion": text}} for text in TEXTS]
    with load_engine("transformers", model=model) as engine:
        wanted = engine.infer(rows, {"logprobs": 0})
    running = start(tmp_path, "engine=transformers", f"engine.model={model}", COLUMNS="200")
    try:
        found = running.client().completions.create(model=model, prompt=TEXTS, max_tokens=0, echo=True, logprobs=1)
        for choice, row in zip(found.choices, wanted, strict=True):
            assert choice.logprobs.token_logprobs == pytest.approx(row.values["token_logprobs"], abs=1e-3)
        with pytest.raises(openai.BadRequestError, match="engine=transformers does not support task=embed"):
            running.client().embeddings.create(model=model, input="x")
    finally:
        running.stop()


def test_completions_give_the_likelihood_of_a_text(endpoint: Endpoint) -> None:
    wanted = told([{"task": "loglikelihood", "inputs": {"prompt": "", "completion": text}} for text in TEXTS], logprobs=0)
    client = endpoint.client()
    found = client.completions.create(model="echo", prompt=TEXTS, max_tokens=0, echo=True, logprobs=1)
    for choice, row in zip(found.choices, wanted, strict=True):
        assert choice.logprobs.token_logprobs == row.values["token_logprobs"]
        assert choice.loglikelihood == row.values["loglikelihood"]
    with pytest.raises(openai.BadRequestError, match="no engine continues a plain text: use /v1/chat/completions"):
        client.completions.create(model="echo", prompt="Once upon a time")


def test_limits_and_keys_hold_for_tasks(endpoint: Endpoint) -> None:
    text = "a request may have at most 4 texts, not 5 (serve.max_texts)"
    assert post(endpoint, "/v1/embeddings", 400, input=["x"] * 5) == text
    assert post(endpoint, "/v1/rerank", 400, query="q", documents=["x"] * 5) == text
    assert "API key" in post(endpoint, "/v1/embeddings", 401, key="wrong", input="x")
    assert "does not exist" in post(endpoint, "/v1/embeddings", 404, input="x", model="gpt-9")
    assert "there is nothing at" in post(endpoint, "/v1/pooling", 404, input="x")
    assert post(endpoint, "/v1/embeddings", 400, input=["x", "y"], dimensions=10**6).startswith("text 0: ")


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/embeddings", {"input": [1, 2]}, "lists of token ids are not supported"),
        ("/v1/embeddings", {"input": [[1], [2]]}, "lists of token ids are not supported"),
        ("/v1/embeddings", {"input": []}, "input must be a text or a list of at least one text"),
        ("/v1/embeddings", {"input": "x", "encoding_format": "int8"}, "encoding_format must be float or base64"),
        ("/v1/embeddings", {"input": "x", "truncate": True}, "/v1/embeddings has no field truncate; it has dimensions,"),
        ("/v1/embeddings", {"input": "x", "dimensions": 0}, "dimensions must be a whole number"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1 must have one text, or as many as text_2: 2 and 1"),
        ("/v1/rerank", {"documents": ["c"]}, "query must be a text"),
        ("/v1/classify", {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}, "must be at an http(s) or data URL"),
        ("/v1/completions", {"prompt": "x", "echo": True}, "with echo=true, max_tokens=0 and logprobs=0"),
    ],
)  # fmt: skip
def test_a_wrong_body_is_refused(path: str, body: dict[str, Any], said: str) -> None:
    with pytest.raises(EngineError) as caught:
        parse_task_call(path, body, "m", GenerationParams(), ServeConfig())
    assert caught.value.type == "invalid_input" and said in str(caught.value)


def test_only_the_servers_defaults_that_a_task_has_count() -> None:
    base = GenerationParams.parse({"temperature": 0.5, "dimensions": 8})
    [request] = parse_task_call("/v1/embeddings", {"input": "x", "user": "u"}, "m", base, ServeConfig()).requests
    assert request.generation.values == {"dimensions": 8}
