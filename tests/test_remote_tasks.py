"""Tasks other than a chat through a provider's API: several rows in one HTTP request, each with its own answer."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines import Completion, load_engine
from engines.base import Engine
from engines.config import EngineConfig, Price
from engines.errors import ConfigError, EngineError
from engines.params import GenerationParams
from engines.prices import priced
from engines.remote.provider import task_url
from engines.remote.task_formats import vectors
from engines.types import to_request
from engines.usage import Usage
from pipeline.run import WITH_FAILURES
from tests.support.infer import Infer
from tests.support.outputs import durable
from tests.support.processes import end, family, until
from tests.support.task_server import DIMENSIONS, TaskServer, score, tokens, vector

Write = Callable[..., Path]
TEXTS = [f"text {i} {'x' * (i % 40)}" for i in range(300)]


@pytest.fixture(scope="module")
def running() -> Iterator[TaskServer]:
    with TaskServer() as server:
        yield server


@pytest.fixture
def server(running: TaskServer) -> TaskServer:
    return running.reset()


def engine(server: TaskServer, kind: str = "openai", **keys: Any) -> Engine:
    model = "text-embedding-3-small" if kind == "openai" else "m"
    keys = {"headers": {"authorization": "Bearer x"}, "base_url": server.url, "model": model, **keys}
    return load_engine(kind, **keys)


def embed(server: TaskServer, texts: list[str], kind: str = "openai", dimensions: int | None = None, **keys: Any) -> Any:
    with engine(server, kind, **keys) as made:
        rows: list[Any] = [{"task": "embed", "inputs": {"text": text}} for text in texts]
        return made.infer(rows, {"dimensions": dimensions} if dimensions else None)


def one(server: TaskServer, kind: str, row: dict[str, Any], generation: Any = None, **keys: Any) -> Completion:
    with engine(server, kind, **keys) as made:
        return made.infer([row], generation)[0]


def check(completions: list[Completion], texts: list[str]) -> None:
    """Each text has its own embedding, and the tokens add up."""
    assert [completion.error for completion in completions] == [None] * len(texts)
    for completion, text in zip(completions, texts, strict=True):
        found = completion.values["embedding"]
        assert found.dtype == np.float32 and np.array_equal(found, vector(text))
    assert sum(completion.usage.input for completion in completions) == sum(map(tokens, texts))
    assert not any(completion.usage.output for completion in completions)


def test_rows_that_come_together_are_one_request_up_to_the_providers_limit(server: TaskServer) -> None:
    texts = [f"text {i}" for i in range(5000)]
    found = embed(server, texts)
    check(found, texts)
    assert server.sizes() == [2048, 2048, 904]
    assert {path for path, _ in server.bodies} == {"/v1/embeddings"}
    assert {body["encoding_format"] for _, body in server.bodies} == {"base64"}
    assert sum(row.cost_usd for row in found) == pytest.approx(0.02e-6 * sum(map(tokens, texts)))


def test_a_row_does_not_wait_for_the_answer_to_another(server: TaskServer) -> None:
    server.held.set()

    async def ask() -> None:
        with engine(server) as made:
            asked = []
            for text in ("a", "b"):
                request = to_request({"task": "embed", "inputs": {"text": text}}, GenerationParams())
                asked.append(asyncio.create_task(made.generate(request)))
                while len(server.bodies) < len(asked):
                    await asyncio.sleep(0.01)
            server.held.clear()
            check(await asyncio.gather(*asked), ["a", "b"])

    asyncio.run(ask())
    assert server.sizes() == [1, 1]


def test_an_answer_is_matched_by_index(server: TaskServer) -> None:
    server.plan = ["shuffled"]
    check(embed(server, TEXTS), TEXTS)


def test_a_bad_text_fails_alone(server: TaskServer) -> None:
    bad = {7, 8, 250}
    server.bad = frozenset(TEXTS[at] for at in bad)
    found = embed(server, TEXTS)
    assert {at for at, row in enumerate(found) if row.error} == bad
    assert {row.error.type for row in found if row.error} == {"bad_request"}
    good = [at for at in range(len(TEXTS)) if at not in bad]
    check([found[at] for at in good], [TEXTS[at] for at in good])
    assert len(server.bodies) < 60 and max(row.attempts for row in found) <= 10


def test_requests_that_the_server_finds_too_large_become_smaller(server: TaskServer) -> None:
    server.most_texts = 100
    with engine(server) as made:
        for _ in range(2):
            rows: list[Any] = [{"task": "embed", "inputs": {"text": text}} for text in TEXTS]
            check(made.infer(rows), TEXTS)
    first, second = server.sizes()[:7], server.sizes()[7:]
    assert sorted(first) == [75, 75, 75, 75, 150, 150, 300]
    assert sum(second) == 300 and max(second) <= 75  # none is refused


def test_a_missing_embedding_shifts_no_other(server: TaskServer) -> None:
    server.plan = ["few"]
    found = embed(server, TEXTS[:50])
    assert all(np.array_equal(row.values["embedding"], vector(text)) for row, text in zip(found, TEXTS, strict=False))
    assert server.sizes() == [50, 25, 25] and {row.attempts for row in found} == {2}
    # The incomplete answer is paid, too.
    assert sum(row.usage.input for row in found) == 2 * sum(map(tokens, TEXTS[:50]))


def test_a_request_is_tried_again_as_a_whole(server: TaskServer) -> None:
    server.plan = ["429", "500"]
    found = embed(server, TEXTS)
    check(found, TEXTS)
    assert server.sizes() == [300] * 3 and {row.attempts for row in found} == {3}


def test_the_providers_limit_of_tokens_bounds_a_request(server: TaskServer) -> None:
    texts = [f"{i:03} {'word ' * 60}" for i in range(100)]
    check(embed(server, texts, "openai_compatible", provider={"tasks": {"embed": {"texts": 50, "tokens": 1000}}}), texts)
    sums = [sum(map(tokens, body["input"])) for _, body in server.bodies]
    assert max(sums) <= 1000 and min(sums[:-1]) > 500
    # A text that is alone above the limit is sent alone: the server says what is wrong with it.
    server.reset()
    check(embed(server, ["x" * 9000, "y"], "openai_compatible"), ["x" * 9000, "y"])


def test_limits_reserve_the_tokens_of_all_texts_of_a_request(server: TaskServer) -> None:
    taken: list[tuple[float, float]] = []
    with engine(server, input_tokens_per_minute=1e9, output_tokens_per_minute=1e9) as made:
        limits = made.sender.limits  # type: ignore[attr-defined]
        source = limits.source

        async def watched(model: str, request: Any) -> Any:
            taken.extend(request.costs)
            return await source(model, request)

        limits.source = watched
        check(made.infer([{"task": "embed", "inputs": {"text": text}} for text in TEXTS]), TEXTS)
    [(read, written)] = taken
    assert read == pytest.approx(sum(map(len, TEXTS)) / 4, rel=0.25) and written == 0


def test_dimensions_are_the_servers_or_cut_here(server: TaskServer) -> None:
    found = embed(server, TEXTS[:3], dimensions=4)
    assert [body["dimensions"] for _, body in server.bodies] == [4]
    cut = embed(server.reset(), TEXTS[:3], "openai_compatible", dimensions=4)
    assert "dimensions" not in server.bodies[0][1]
    for row, text in zip([*found, *cut], TEXTS[:3] * 2, strict=True):
        assert np.allclose(row.values["embedding"], vector(text, 4), atol=1e-6)
    server.reset(keeps_dimensions=False)  # a server that ignores the field
    assert len(embed(server, TEXTS[:1], dimensions=4)[0].values["embedding"]) == 4
    [more] = embed(server.reset(), TEXTS[:1], "openai_compatible", dimensions=DIMENSIONS + 1)
    assert more.error.type == "invalid_input" and "embeddings have 8 dimensions" in more.error.message


def test_numbers_come_as_json_or_as_base64() -> None:
    coded = [base64.b64encode(np.asarray(each, "<f4").tobytes()).decode() for each in ([1, -2, 3], [4, 5, 6], [7, 8])]
    for found in (coded[:2], coded, [coded[0], [4.0, 5, 6]]):
        numbers = [vector.tolist() for vector in vectors(found)]  # type: ignore[union-attr]
        assert numbers == [[1, -2, 3], [4, 5, 6], [7, 8]][: len(found)]
    bad = base64.b64encode(np.asarray([1, np.nan, 2], "<f4").tobytes()).decode()
    for wrong in (coded[0][:-1] + "!", bad, "", [], [None, 1.0], [[1.0]], None, [math.nan], {"a": 1}):
        good, failed, *others = vectors([coded[0], wrong, *coded[:2] * 40])  # more than are decoded at once
        assert not isinstance(good, EngineError) and good.tolist() == [1, -2, 3]
        assert [list(each) for each in others] == [[1, -2, 3], [4, 5, 6]] * 40  # type: ignore[arg-type]
        assert isinstance(failed, EngineError) and "no valid embedding" in str(failed)


def test_scores_of_pairs_are_one_request(server: TaskServer) -> None:
    with engine(server, "remote_vllm") as made:
        rows: list[Any] = [{"task": "score", "inputs": {"query": "q", "text": text}} for text in TEXTS[:30]]
        found = made.infer(rows)
    assert [row.values for row in found] == [{"score": score("q", text)} for text in TEXTS[:30]]
    [(path, body)] = server.bodies
    assert path == "/score" and body["text_1"] == ["q"] * 30


def test_a_conversation_is_scored_by_a_reward_model(server: TaskServer) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert one(server, "remote_vllm", {"task": "score", "messages": messages}).values == {"score": 5.0}
    [(path, body)] = server.bodies
    assert path == "/pooling" and body["messages"] == messages and body["use_activation"] is False
    refused = one(server, "openai_compatible", {"task": "score", "messages": messages}, provider={"tasks": {"score": {}}})
    assert refused.error and "takes no conversation for task=score" in refused.error.message and refused.attempts == 0


@pytest.mark.parametrize("kind", ["openai_compatible", "together", "fireworks", "remote_vllm"])
def test_a_ranking_is_in_the_order_of_the_scores(server: TaskServer, kind: str) -> None:
    inputs = {"query": "q", "documents": TEXTS[:20]}
    found = one(server, kind, {"task": "rerank", "inputs": inputs})
    scores = [score("q", text) for text in TEXTS[:20]]
    assert [(item["index"], item["score"]) for item in found.values["ranking"]] == sorted(
        enumerate(scores), key=lambda item: -item[1]
    )
    assert found.usage.input == sum(map(tokens, TEXTS[:20]))
    assert server.bodies == [("/v1/rerank", {"model": "m", **inputs})]


def test_classes_have_the_servers_best_label_and_the_labels_of_the_configuration(server: TaskServer) -> None:
    rows: list[Any] = [{"task": "classify", "inputs": {"text": text}} for text in ("short", "a long text")]
    with engine(server, "remote_vllm") as made:
        found = made.infer(rows)
    assert [row.values["label"] for row in found] == ["short", "long"]
    scores = [{"label": "long", "score": 0.75}, {"label": "LABEL_0", "score": 0.25}]
    assert found[1].values["scores"] == scores and server.bodies[0][0] == "/classify"
    with engine(server, "sglang", provider={"tasks": {"classify": {"labels": ["short", "long"]}}}) as made:
        assert made.infer(rows)[1].values["scores"][1] == {"label": "short", "score": 0.25}


def test_a_likelihood_is_that_of_the_completions_own_tokens(server: TaskServer) -> None:
    rows: list[Any] = [
        {"task": "loglikelihood", "inputs": {"prompt": "a bc", "completion": " def gh"}},
        {"task": "loglikelihood", "inputs": {"prompt": "a bc ", "completion": "def"}},  # " def" spans the end of the prompt
        {"task": "loglikelihood", "inputs": {"prompt": "", "completion": "def"}},
        {"task": "loglikelihood", "inputs": {"prompt": "", "completion": "def gh"}},
    ]
    with engine(server, "remote_vllm") as made:
        found = made.infer(rows, {"logprobs": 0})
    assert found[0].values == {"loglikelihood": -1.75, "tokens": 2, "perplexity": math.exp(1.75 / 2),
                               "token_logprobs": [-1.0, -0.75]}  # fmt: skip
    assert found[1].values["loglikelihood"] == -1.0
    assert found[2].error and found[2].error.type == "invalid_input"
    assert found[3].values["token_logprobs"] == [-0.75]  # the first token of a text has no log probability
    [(path, body)] = server.bodies
    assert path == "/v1/completions" and body["prompt"][0] == "a bc def gh"


def test_a_likelihood_of_a_conversation_is_that_of_its_last_answer(server: TaskServer) -> None:
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
    found = one(server, "remote_vllm", {"task": "loglikelihood", "messages": messages}, {"logprobs": 0})
    assert found.values["token_logprobs"] == [-0.99, -1.0] and found.values["tokens"] == 2  # c is 99, d is 100
    assert [path for path, _ in server.bodies] == ["/tokenize", "/tokenize", "/v1/completions"]
    assert server.bodies[0][1]["continue_final_message"] and server.bodies[1][1]["messages"] == messages[:1]
    assert "messages" not in server.bodies[2][1]
    same = [messages[0], {"role": "assistant", "content": " "}]
    empty = one(server, "remote_vllm", {"task": "loglikelihood", "messages": same})
    assert empty.error and empty.error.type == "invalid_input"
    refused = one(server, "fireworks", {"task": "loglikelihood", "messages": messages})
    assert refused.error and "takes no conversation for task=loglikelihood" in refused.error.message


@pytest.mark.slow
def test_a_run_asks_again_only_for_the_texts_that_failed(server: TaskServer, infer: Infer, write_jsonl: Write) -> None:
    bad, texts = {3, 404}, [f"text {i}" for i in range(600)]
    server.bad, server.plan = frozenset(texts[at] for at in bad), ["500"]
    data = write_jsonl([{"text": text} for text in texts])
    keys = (
        f"engine.base_url={server.url}",
        "engine.model=m",
        "task=embed",
        "engine.price.input=0.5",
        "run.max_error_rate=1",
    )
    first = infer(data, *keys, engine="openai_compatible")
    assert first.exit_status == WITH_FAILURES and first.manifest["rows"]["failed"] == len(bad)
    rows = infer.rows()
    assert {at for at, row in enumerate(rows) if row["error"]} == bad
    assert all(row["embedding"] == vector(text).tolist() for row, text in zip(rows, texts, strict=True) if not row["error"])
    answered = sum(tokens(text) for at, text in enumerate(texts) if at not in bad)
    assert first.manifest["tokens"]["input"] == answered and first.manifest["cost_usd"] == pytest.approx(answered * 5e-7)
    assert server.sizes().count(128) >= 4  # rows in flight are enough for full requests
    server.reset()
    again = infer(data, *keys, engine="openai_compatible")
    assert again.exit_status == 0 and again.manifest["this_run"]["asked"] == len(bad)
    assert sorted(text for _, body in server.bodies for text in body["input"]) == sorted(texts[at] for at in bad)
    assert [row["embedding"] for row in infer.rows()] == [vector(text).tolist() for text in texts]


@pytest.mark.slow
def test_a_killed_run_keeps_the_answers_of_whole_requests(server: TaskServer, tmp_path: Path) -> None:
    texts, out = [f"text {i}" for i in range(500)], tmp_path / "out"
    data = tmp_path / "in.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = "engine.provider.tasks.embed={texts: 50}"
    command = [
        sys.executable, "-m", "jobs.infer", "engine=openai_compatible", f"engine.base_url={server.url}", "engine.model=m",
        "task=embed", options, "engine.max_concurrency=1", "run.flush_s=0.2", f"dataset.path={data}", f"output.path={out}",
    ]  # fmt: skip
    server.held_after = 4
    run = subprocess.Popen(command, start_new_session=True)
    until(lambda: durable(out) == 200, run)
    relatives = family(run.pid)
    end([*relatives, psutil.Process(run.pid)])
    run.wait()
    server.reset()
    subprocess.run(command, check=True)
    asked = [text for _, body in server.bodies for text in body["input"]]
    assert len(asked) == len(set(asked)) == 300
    table = pq.read_table(out / "data")
    assert table["embedding"].to_pylist() == [vector(text).tolist() for text in texts]


def test_a_cancelled_row_leaves_the_others_their_answers(server: TaskServer) -> None:
    server.held.set()

    async def ask() -> None:
        with engine(server) as made:
            requests = [to_request({"task": "embed", "inputs": {"text": text}}, GenerationParams()) for text in TEXTS[:10]]
            asked = [asyncio.create_task(made.generate(request)) for request in requests]
            while not server.bodies:
                await asyncio.sleep(0.01)
            asked[3].cancel()
            server.held.clear()
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert isinstance(found.pop(3), asyncio.CancelledError)
            texts = [text for at, text in enumerate(TEXTS[:10]) if at != 3]
            assert all(
                np.array_equal(row.values["embedding"], vector(text)) for row, text in zip(found, texts, strict=True)
            )  # type: ignore[union-attr]

    asyncio.run(ask())


def test_an_engine_without_the_task_refuses_it_by_name(server: TaskServer) -> None:
    refused = one(server, "anthropic", {"task": "embed", "inputs": {"text": "x"}}, api_key_env=None)
    assert refused.error and "engine=anthropic does not support task=embed (it supports chat)" in refused.error.message
    with pytest.raises(ConfigError, match="there is no task 'embedd'"):
        engine(server, "openai", provider={"tasks": {"embedd": {}}})
    with pytest.raises(ConfigError, match=r"there is no key 'engine\.provider\.tasks\.embed\.text' \(did you mean 'texts'"):
        engine(server, "openai", provider={"tasks": {"embed": {"text": 3}}})


def test_the_urls_of_tasks_follow_from_that_of_the_api() -> None:
    azure = "https://r.openai.azure.com/openai/deployments/d/chat/completions?api-version=1"
    assert task_url(azure, "chat", "embeddings") == (
        "https://r.openai.azure.com/openai/deployments/d/embeddings?api-version=1"
    )
    assert task_url("http://h:8000/v1/chat/completions", "chat", "../classify") == "http://h:8000/classify"
    for base_url in ("http://h/v1", "http://h/v1/embeddings", "http://h/v1/chat/completions", "h"):
        with load_engine("openai_compatible", model="m", base_url=base_url) as made:
            shown = made.render_request(to_request({"task": "embed", "inputs": {"text": "x"}}, GenerationParams()))
            assert "://h/v1/embeddings" in shown and '"input": [' in shown


def test_an_embedding_has_a_price_for_its_input_alone() -> None:
    for kind, model in (("openai", "text-embedding-3-large"), ("gemini", "gemini-embedding-001")):
        price = priced(EngineConfig(kind, model))
        assert price.cost(Usage(1_000_000)) == price.input and price.input
    own = priced(EngineConfig("openai", "m", price=Price(input=0.5)))
    assert own.cost(Usage(1_000_000)) == 0.5 and own.cost(Usage(1, output=1)) is None


@given(
    st.tuples(*[st.integers(0, 10_000)] * 3).map(sorted),
    st.lists(st.integers(0, 500), min_size=1, max_size=40),
    st.integers(0, 1000),
)
def test_the_parts_of_a_usage_add_up(counts: list[int], weights: list[int], written: int) -> None:
    cache_write, cached, read = counts
    whole = Usage(read + cached + cache_write, cached, written, cache_write, reasoning=written // 2)
    parts = whole.divided(weights)
    assert len(parts) == len(weights)
    for name in ("input", "cached_input", "output", "cache_write", "reasoning"):
        assert sum(getattr(part, name) for part in parts) == getattr(whole, name)
