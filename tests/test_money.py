"""Costs: read on each wire, priced where the answer arrives, written on each ledger record, only added elsewhere."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import importlib.resources
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import engines.remote.sender
from engines import load_engine
from engines.config import RATES, EngineConfig, Price, config_from_keys
from engines.errors import ConfigError, Failure
from engines.fallback_prices import most_expensive
from engines.params import GenerationParams
from engines.prices import listed_prices, price_of, priced
from engines.registry import preflight
from engines.remote import anthropic_messages, bedrock_converse, openai_chat
from engines.remote.engine import RemoteEngine
from engines.remote.provider import Provider
from engines.types import Completion
from engines.usage import Usage
from jobs import status as status_job
from jobs.infer import changed
from jobs.infer import main as infer_main
from jobs.reading import open_output
from pipeline.configuration.compose import compose
from pipeline.errors import Interrupted, Stopped
from pipeline.executors.cost_budget import CostBudget, read_spent
from pipeline.executors.live.recorder import LeasedRow
from pipeline.executors.live.refusals import RefusalGate
from pipeline.executors.live.worker import Worker, WorkerConfig
from pipeline.output.cost import old_costs
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger import TOKENS, Record, list_segments, read_segment, write_segment
from pipeline.storage.ledger_index import UNKNOWN, read_index
from tests.support.batch_server import BatchServer
from tests.support.infer import Infer, ask
from tests.support.outputs import figure
from tests.support.provider_server import ProviderServer

Write = Callable[..., Path]
PRICED = ["engine.price.input=3", "engine.price.output=15"]
PRICE = Price(3.0, None, 15.0)
SHAPE = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.remote.sender, "BACKOFF_FIRST_S", 0.005)
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "sk-0123456789")
    monkeypatch.setenv("AWS_REGION", "us-east-1")


@pytest.fixture
def server() -> Iterator[ProviderServer]:
    with ProviderServer() as running:
        yield running


def chat_answer(usage: Any, text: str | None = "yes", model: str = "m") -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"id": "c", "model": model, "choices": [choice], "usage": usage}


def said(server: ProviderServer, text: str, usage: Any, answer: str | None = "yes", model: str = "m") -> None:
    """The next request for this text gets this answer with this usage."""
    server.plan.setdefault(text, []).append("body=" + json.dumps(chat_answer(usage, answer, model)))


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def remote(server: ProviderServer, *more: str) -> list[str]:
    return ["engine.model=m", f"engine.base_url={server.url}", *more]


def manifest_of(infer: Infer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((infer.out / "manifest.json").read_text())
    return found


# -- usage, by the providers' documented examples ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            {"prompt_tokens": 2006, "completion_tokens": 300, "total_tokens": 2306,
             "prompt_tokens_details": {"cached_tokens": 1920},
             "completion_tokens_details": {"reasoning_tokens": 256}},
            Usage(2006, 1920, 300, 0, 256),
        ),
        # xAI: the total is prompt, completion and reasoning.
        (
            {"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 135,
             "prompt_tokens_details": {"cached_tokens": 6}, "completion_tokens_details": {"reasoning_tokens": 94}},
            Usage(32, 6, 103, 0, 94),
        ),
        # Gemini's compatible API: thoughts are in the total only.
        ({"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 530}, Usage(10, 0, 520, 0, 500)),
        # DeepSeek.
        (
            {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105, "prompt_cache_hit_tokens": 64,
             "prompt_cache_miss_tokens": 36},
            Usage(100, 64, 5),
        ),
        # OpenRouter, of a model that charges for writing to its cache.
        (
            {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105,
             "prompt_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 80}},
            Usage(100, 0, 5, 80),
        ),
        # A total that nothing explains adds nothing.
        (
            {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 99,
             "completion_tokens_details": {"reasoning_tokens": 7}},
            Usage(10, 0, 20, 0, 7),
        ),
        # More from the cache than there was.
        ({"prompt_tokens": 10, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 50}}, Usage(10, 10, 2)),
        (None, Usage(known=False)),
        ({"prompt_tokens": 10}, Usage(10, known=False)),
        # Three keys, of which one says more than the counts.
        (
            {"prompt_tokens": 10, "total_tokens": 10, "prompt_tokens_details": {"cached_tokens": 4}},
            Usage(10, 4, known=False),
        ),
    ],
)  # fmt: skip
def test_the_usage_of_chat_completions(found: Any, expected: Usage) -> None:
    assert openai_chat.completion(chat_answer(found), Provider()).usage == expected


def test_the_usage_of_messages_and_of_converse() -> None:
    content = {"content": [{"type": "text", "text": "x"}], "stop_reason": "end_turn"}
    found = {"input_tokens": 50, "cache_read_input_tokens": 100_000, "cache_creation_input_tokens": 248,
             "cache_creation": {"ephemeral_5m_input_tokens": 148, "ephemeral_1h_input_tokens": 100},
             "output_tokens": 503}  # fmt: skip
    expected = Usage(100_298, 100_000, 503, 248, cache_write_1h=100)
    assert anthropic_messages.completion({**content, "usage": found}, Provider()).usage == expected
    assert not anthropic_messages.completion(content, Provider()).usage.known
    output = {"output": {"message": {"content": [{"text": "x"}]}}, "stopReason": "end_turn"}
    found = {"inputTokens": 50, "outputTokens": 5, "totalTokens": 155, "cacheReadInputTokens": 70}
    found["cacheWriteInputTokens"] = 30
    found["cacheDetails"] = [{"ttl": "1h", "inputTokens": 10}, {"ttl": "5m", "inputTokens": 20}]
    expected = Usage(150, 70, 5, 30, cache_write_1h=10)
    assert bedrock_converse.completion({**output, "usage": found}, Provider()).usage == expected
    assert not bedrock_converse.completion({**output, "usage": None}, Provider()).usage.known


# -- prices -----------------------------------------------------------------------------------------------------------


def test_writing_to_the_prompt_cache_of_claude_costs_more_and_for_an_hour_more_still() -> None:
    price = priced(EngineConfig("anthropic", "claude-sonnet-4-6"))
    assert (price.input, price.cached_input, price.cache_write) == (3, 0.3, 3.75)
    # 50 plain, 1,000 read, 148 written for 5 minutes, 100 for an hour (2.0 times the input), 503 out.
    cost = price.cost(Usage(1298, 1000, 503, 248, cache_write_1h=100))
    assert cost == pytest.approx((50 * 3 + 1000 * 0.3 + 148 * 3.75 + 100 * 6 + 503 * 15) / 1e6)
    bedrock = EngineConfig("bedrock", "us.anthropic.claude-sonnet-4-6-v1:0", price=Price(3, 0.3, 15))
    assert priced(bedrock).cache_write == 3.75
    given = EngineConfig("anthropic", "claude-sonnet-4-6", price=Price(3, None, 15, cache_write=3))
    assert priced(given).cache_write == 3
    assert priced(EngineConfig("openai", "gpt-4o")).cache_write is None
    assert Price(2, None, 0).cost(Usage(10, 0, 0, 4)) == pytest.approx(20 / 1e6)  # as input


def test_a_cost_needs_the_usage_and_each_rate_that_it_uses() -> None:
    assert Price(1, None, 2).cost(Usage(known=False)) is None
    assert Price(0, None, 0).cost(Usage(known=False)) == 0
    assert Price(None, None, 2).cost(Usage(5, 0, 5)) is None
    assert Price(1, None, None).cost(Usage(5, 0, 0)) == pytest.approx(5e-6)
    assert Price().cost(Usage()) == 0


def test_a_row_costs_what_the_model_costs_that_it_asked() -> None:
    config = EngineConfig("openai", "gpt-4o-mini", price=Price(7, None, 8), provider={"wire": "chat"})
    assert price_of(config, None, "gpt-4o-mini-2024-07-18").input == 7
    assert price_of(config, "gpt-4o", "gpt-4o-2024-08-06").input == 2.5  # engine.price is of engine.model only
    assert price_of(config, "a-router", "gpt-4o").input == 2.5
    assert not price_of(config, "unheard-of", "unheard-of").known
    own = EngineConfig("openai", "m", provider={"wire": "chat", "prices": {"x": {"input": 1, "output": 2}}})
    assert price_of(own, "x", None) == Price(1, None, 2)


def test_price_lists_of_the_user_reach_row_models_and_fallbacks(tmp_path: Path) -> None:
    (tmp_path / "price").mkdir()
    (tmp_path / "price" / "openai.yaml").write_text("as_of: 2026-11-01\nmodels:\n  gpt-4o: {input: 7, output: 8}\n")
    engine = compose(["engine=openai", "engine.model=gpt-4o-mini"], str(tmp_path)).engine
    assert price_of(engine, "gpt-4o", None) == Price(7, None, 8, "2026-11-01")
    other = ["engine=anthropic", "engine.model=claude-sonnet-4-6", "engine.fallback=[{engine: openai, model: gpt-4o}]"]
    assert compose(other, str(tmp_path)).engine.fallback[0]["price"]["input"] == 7


HAIKU = {"input": 0.1, "cached_input": 0.01, "cache_write": 0.125, "output": 0.5}
LONG = {"tokens": 100_000, "input": 0.5, "cached_input": 0.05, "cache_write": 0.625, "output": 2.5}


def test_a_long_request_has_the_rates_of_long_requests_for_all_its_tokens() -> None:
    price = Price(**HAIKU, above=LONG)
    assert price.cost(Usage(100_000, 0, 10)) == pytest.approx((100_000 * 0.1 + 10 * 0.5) / 1e6)
    assert price.cost(Usage(100_001, 1, 10, 1000)) == pytest.approx((99_000 * 0.5 + 0.05 + 1000 * 0.625 + 10 * 2.5) / 1e6)
    with_batch = Price(
        **HAIKU, above=LONG, batch={"input": 0.04, "output": 0.2, "above": {"tokens": 7, "input": 1, "output": 2}}
    )
    assert with_batch.in_batch(0.5).cost(Usage(5, 0, 1)) == pytest.approx((5 * 0.04 + 0.2) / 1e6)
    assert with_batch.in_batch(0.5).cost(Usage(8, 0, 1)) == pytest.approx((8 * 1 + 2) / 1e6)
    assert price.in_batch(0.5).cost(Usage(100_001, 0, 0)) == pytest.approx(100_001 * 0.25 / 1e6)
    assert price.in_batch(1.0) == price


def test_a_price_of_ones_own_is_that_of_batches_and_long_requests_too() -> None:
    listed = EngineConfig("openai", "m", provider={"prices": {"m": {**HAIKU, "above": LONG, "batch": HAIKU}}})
    assert priced(listed) == Price(**HAIKU, above=LONG, batch=HAIKU)
    price = priced(dataclasses.replace(listed, price=Price(input=0.2)))
    assert price == Price(**{**HAIKU, "input": 0.2})
    assert price.in_batch(0.5).input == 0.1


@pytest.mark.parametrize(("day", "read"), [("2027-04-01", "2027-04-01"), ('"2027-04-01"', "2027-04-01"), ("soon", None)])
def test_the_last_day_of_a_model_may_have_quotes(day: str, read: str | None, tmp_path: Path) -> None:
    (tmp_path / "openai.yaml").write_text(f"as_of: 2026-11-01\nmodels:\n  m: {{input: 7, output: 8, ends: {day}}}\n")
    config = EngineConfig("openai", "m")
    if read is not None:
        assert priced(config, tmp_path).ends == read
        return
    with pytest.raises(ConfigError, match="ends must be a day such as 2027-04-01, not 'soon'"):
        priced(config, tmp_path)


def test_the_packaged_prices_have_long_requests_batches_and_last_days() -> None:
    haiku = priced(EngineConfig("anthropic", "claude-haiku-5-5"))
    assert (haiku.input, haiku.above) == (0.1, LONG) and haiku.batch["input"] == 0.05
    assert priced(EngineConfig("anthropic", "claude-sonnet-4-5")).ends == "2026-11-30"
    own = priced(EngineConfig("openai", "ft:gpt-4o-mini-2024-07-18:my-org::abc"))
    assert (own.input, own.output) == (0.3, 1.2)
    assert not priced(EngineConfig("anthropic", "claude-opus-4-10")).known
    # A model that the provider switched off has no price.
    assert not priced(EngineConfig("openai", "o1")).known


@pytest.mark.parametrize("kind", ["anthropic", "gemini", "openai"])
def test_a_packaged_list_leaves_no_rate_out_where_a_neighbour_has_it(kind: str) -> None:
    """A rate that is missing would be charged as plain input."""
    listed = listed_prices(importlib.resources.files("conf") / "price" / f"{kind}.yaml")["models"]
    assert len(listed) > 10
    for model, entry in listed.items():
        named = set(entry) & set(RATES)
        for part in (entry.get("above"), entry.get("batch"), entry.get("batch", {}).get("above")):
            assert not part or named <= set(part), (kind, model)


def test_a_budget_expects_the_rates_of_the_lane_and_of_long_prompts() -> None:
    config = EngineConfig(
        "anthropic", "claude-haiku-5-5", price=Price(**HAIKU, above=LONG, batch={"input": 1, "output": 2})
    )
    live, batch = most_expensive(config), most_expensive(config, batch=True)
    assert (live.at(100_000).input, live.at(100_001).input, live.at(100_001).output) == (0.1, 0.5, 2.5)
    assert (batch.input, batch.output, batch.above) == (1, 2, {})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("engine.price.batch.input=1", "engine.price.batch needs input and output"),
        ("engine.price.above.input=1 engine.price.above.output=2", "engine.price.above needs tokens"),
        (
            "engine.price.batch.input=1 engine.price.batch.output=2 engine.price.batch.outputs=3",
            "engine.price.batch has no 'outputs'",
        ),
        (
            "engine.price.batch.input=-1 engine.price.batch.output=2",
            "engine.price.batch.input must be a number of at least 0",
        ),
    ],
)
def test_a_wrong_price_is_refused(keys: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        compose(["engine=openai", "engine.model=x", "dataset.path=x", "output.path=y", *keys.split()]).check()


def test_preflight_warns_of_a_models_last_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    today = datetime.date.today()
    for days, expected in ((400, []), (59, ["the provider switches m off on"]), (0, ["the provider switched m off on"])):
        ends = str(today + datetime.timedelta(days=days))
        found = preflight(
            config_from_keys("openai", {"model": "m", "price": {"input": 1, "output": 2, "ends": ends}}), thorough=False
        )
        assert [finding.is_warning for finding in found] == [True] * len(expected)
        assert all(finding.text.startswith(text) for finding, text in zip(found, expected, strict=True))


def test_lambda_says_that_it_ended_and_still_asks_a_given_server(server: ProviderServer) -> None:
    with pytest.raises(ConfigError, match="ended on 2025-09-25.*engine=together"):
        load_engine("lambda", model="m", api_key_env="PATH")
    with load_engine("lambda", model="m", base_url=server.url, api_key_env="PATH") as engine:
        assert engine.infer([ask("a")])[0].error is None


def test_the_key_cache_write_is_known() -> None:
    engine = compose(["engine=openai", "engine.model=x", "engine.price.cache_write=2"]).engine
    assert engine.price.cache_write == 2


# -- one answer -------------------------------------------------------------------------------------------------------


def test_tries_without_an_answer_are_priced_by_their_usage(server: ProviderServer) -> None:
    said(server, "null", usage(100, 10), answer=None)  # paid, though nobody can use it
    said(server, "null", usage(100, 20))
    said(server, "silent", None)
    server.plan["lost"] = ["reset-body"]
    said(server, "lost", usage(100, 20))
    server.plan["busy"] = ["429", "500"]
    said(server, "busy", usage(100, 20))
    with load_engine("openai_compatible", model="m", base_url=server.url, price={"input": 3, "output": 15}) as engine:
        null, silent, lost, busy, refused = engine.infer(
            [*(ask(text) for text in ("null", "silent", "lost", "busy")), ask("x", generation={"n": 1}, adapter="no")]
        )
    assert null.attempts == 2 and null.cost_usd == pytest.approx(PRICE.of(200, 0, 30))
    assert (silent.text, silent.cost_usd, silent.usage.known) == ("yes", None, False)
    assert (lost.attempts, lost.cost_usd, lost.usage.output) == (2, None, 20)  # nobody knows what the lost answer cost
    assert busy.attempts == 3 and busy.cost_usd == pytest.approx(PRICE.of(100, 0, 20))  # such refusals are free
    assert refused.error is not None and (refused.attempts, refused.cost_usd) == (0, 0)


def test_tries_of_a_row_do_not_add_up_to_a_long_prompt(server: ProviderServer) -> None:
    said(server, "null", usage(60, 10), answer=None)
    said(server, "null", usage(60, 20))
    price = {"input": 1, "output": 2, "above": {"tokens": 100, "input": 5, "output": 10}}
    with load_engine("openai_compatible", model="m", base_url=server.url, price=price) as engine:
        [completion] = engine.infer([ask("null")])
    assert (completion.attempts, completion.usage.input) == (2, 120)
    assert completion.cost_usd == pytest.approx((120 * 1 + 30 * 2) / 1e6)


def test_a_refusal_is_paid(server: ProviderServer) -> None:
    message = {"role": "assistant", "content": None, "refusal": "I cannot."}
    whole = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage(40, 4)}
    server.plan["bad"] = ["body=" + json.dumps(whole)]
    with load_engine("openai_compatible", model="m", base_url=server.url, price={"input": 3, "output": 15}) as engine:
        [completion] = engine.infer([ask("bad")])
    assert completion.error is not None and completion.error.type == "content_filter"
    assert completion.usage == Usage(40, 0, 4) and completion.cost_usd == pytest.approx(PRICE.of(40, 0, 4))


def test_further_tries_of_a_shape_and_turns_add_up(server: ProviderServer) -> None:
    said(server, "number?", usage(10, 5), answer="no json")
    server.fault = lambda text, attempt: "body=" + json.dumps(chat_answer(usage(30, 7), '{"a": 1}'))
    format = {"type": "json_schema", "json_schema": {"schema": SHAPE}}
    with load_engine("openai_compatible", model="m", base_url=server.url, price={"input": 3, "output": 15}) as engine:
        [shaped] = engine.infer([ask("number?")], {"response_format": format})
        [multi_turn] = engine.infer([ask("one", turns=["two", "three"])])
    assert shaped.error is None and shaped.cost_usd == pytest.approx(PRICE.of(40, 0, 12))
    assert multi_turn.attempts == 3 and multi_turn.cost_usd == pytest.approx(PRICE.of(90, 0, 21))


def test_a_fallbacks_answer_has_its_own_price_beside_what_was_paid_before(server: ProviderServer) -> None:
    whole = {"choices": [{"message": {"content": None, "refusal": "No."}, "finish_reason": "stop"}], "usage": usage(40, 4)}
    server.plan["bad"] = ["body=" + json.dumps(whole)]
    with ProviderServer() as other:
        said(other, "bad", usage(50, 6), model="dear")
        second = {"engine": "openai_compatible", "model": "dear", "base_url": other.url,
                  "price": {"input": 1000, "output": 2000}}  # fmt: skip
        keys: dict[str, Any] = {"price": {"input": 3, "output": 15}, "fallback": [second]}
        with load_engine("openai_compatible", model="m", base_url=server.url, **keys) as engine:
            [completion] = engine.infer([ask("bad")])
    assert completion.text == "yes"
    assert completion.cost_usd == pytest.approx(PRICE.of(40, 0, 4) + (50 * 1000 + 6 * 2000) / 1e6)


def test_what_a_local_engine_with_a_paid_fallback_may_have_cost_is_unknown() -> None:
    paid = {
        "engine": "openai_compatible",
        "model": "m",
        "base_url": "http://localhost:1",
        "price": {"input": 1, "output": 2},
    }
    unknown = Usage(known=False)
    with load_engine("echo") as local, load_engine("echo", fallback=[paid]) as mixed:
        assert (local.cost(unknown, None), mixed.cost(unknown, None), mixed.cost(Usage(10, 0, 5), None)) == (0, None, 0)
    free = {**paid, "price": {"input": 0, "output": 0}}
    with load_engine("echo", fallback=[free]) as engine:
        assert engine.cost(unknown, None) == 0


def test_a_bug_after_a_paid_request_has_an_unknown_cost(server: ProviderServer, tmp_path: Path) -> None:
    class Buggy(RemoteEngine):
        def read(self, answer: Any, *_: Any) -> Completion:
            raise KeyError("a bug of ours")

    keys = {"model": "m", "base_url": server.url, "price": {"input": 3, "output": 15}}
    config = config_from_keys("openai_compatible", keys)
    worker = Worker(WorkerConfig(config, GenerationParams(), str(tmp_path), 1.0, 1.0, 1.0, 0), "w1", None)
    worker.waiting.rows.append(LeasedRow(1, 0, 0, b"k" * 32, "a", json.dumps(ask("a")).encode()))
    worker.waiting.ended = True
    with Buggy(config) as engine:
        worker.gate = RefusalGate(worker.recorder, engine, False)
        asyncio.run(worker._slot(engine, 0))
    [found] = worker.recorder.records
    assert len(server.requests) == 1 and "a bug of ours" in found.completion.error.message  # type: ignore[union-attr]
    assert found.completion.cost_usd is None


def test_an_unknown_cost_stays_unknown() -> None:
    known, unknown = Completion(cost_usd=0.5), Completion(cost_usd=None)
    known.accumulate(unknown)
    assert known.cost_usd is None
    unknown.accumulate(Completion(cost_usd=0.5))
    assert unknown.cost_usd is None


# -- the ledger -------------------------------------------------------------------------------------------------------


def record(key: int, at: float, cost: float | None, *, failed: bool = False, superseded: bool = False) -> Record:
    error = Failure("server", "down") if failed or superseded else None
    completion = Completion(usage=Usage(10, 2, 5, 3, 1), error=error, cost_usd=cost)
    return Record(bytes([key]) * 32, f"r{key}", completion, at, superseded)


def test_the_index_adds_all_records_of_a_request(tmp_path: Path) -> None:
    fs, root = resolve(str(tmp_path))
    first = [record(1, 1.0, 0.25, failed=True), record(2, 1.0, None, failed=True), record(3, 1.0, 0.5, superseded=True)]
    path = write_segment(fs, root, "w", first)
    write_segment(fs, root, "w", [record(1, 2.0, 0.5), record(2, 2.0, 1.0), record(4, 2.0, 2.0, failed=True)])
    assert read_segment(fs, path)["cost_usd"].to_pylist() == [0.25, None, 0.5]
    write_segment(fs, root, "w", first)  # merged, but not yet deleted: each of its records counts once
    index = read_index(fs, root)
    one, two, three = index.find([bytes([n]) * 32 for n in (1, 2, 3)])
    assert three == -1  # its try answers nothing, so it is asked
    assert (index.cost_usd[one], index.flags[one], index.attempts[one]) == (0.75, 0, 2)
    assert index.tokens[one].tolist() == [20, 4, 10, 6, 2] and len(TOKENS) == 5
    assert (index.cost_usd[two], index.flags[two]) == (1.0, UNKNOWN)
    assert index.spent() == (0.75 + 1.0 + 0.5 + 2.0, 1)
    left = index.only(failed_count_as_answered=False)
    assert left.find([bytes([4]) * 32])[0] == -1 and left.spent() == index.spent()


def as_before(out: Path) -> None:
    """Makes the segments what an earlier version wrote: without a cost, and with three counts of tokens."""
    fs, root = resolve(str(out))
    for path in list_segments(fs, root):
        table = read_segment(fs, path)
        counts = [[row and {n: row[n] for n in TOKENS[:3]} for row in table["usage"].to_pylist()]]
        old = pa.struct([(name, pa.int64()) for name in TOKENS[:3]])
        table = table.set_column(table.column_names.index("usage"), "usage", pa.chunked_array(counts, old))
        pq.write_table(table.drop_columns(["cost_usd", "superseded"]), path)


@pytest.mark.slow
def test_an_old_ledger_is_priced_as_before_and_the_manifest_says_so(
    infer: Infer, write_jsonl: Write, server: ProviderServer
) -> None:
    more = remote(server, *PRICED)
    assert infer(write_jsonl([ask(f"row {i}") for i in range(4)]), *more, engine="openai_compatible").exit_status == 0
    before = manifest_of(infer)
    assert before["cost_repriced_requests"] == 0
    as_before(infer.out)
    rows = [ask(f"row {i}") for i in range(5)]
    assert infer(write_jsonl(rows), *more, engine="openai_compatible").exit_status == 0
    after = manifest_of(infer)
    assert after["this_run"]["asked"] == 1 and after["cost_repriced_requests"] == 4
    assert after["cost_usd"] == pytest.approx(before["cost_usd"] / 4 * 5)
    table = infer.table()
    assert table["cost_usd"].to_pylist()[:4] == [None] * 4 and table["cost_usd"][4].as_py() > 0
    assert table["usage"][0].as_py()["cache_write"] is None and table["usage"][0].as_py()["output"] == 2
    fs, root = resolve(str(infer.out))
    assert read_index(fs, root).spent()[1] == 4  # without a price nobody knows


def test_old_batches_are_known_by_their_writer(tmp_path: Path) -> None:
    provider = {"wire": "chat", "batch": {"wire": "openai", "price": 0.5}}
    engine = EngineConfig("openai", "m", price=Price(3, 1, 15), provider=provider)
    fs, root = resolve(str(tmp_path))
    for writer in ("batch", "w1"):
        write_segment(fs, root, writer, [record(len(writer), 1.0, None)])
    as_before(tmp_path)
    index = read_index(fs, root, old_costs(engine))
    whole = (8 * 3 + 2 * 1 + 5 * 15) / 1e6
    assert sorted(index.cost_usd.tolist()) == pytest.approx([whole / 2, whole])


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_manifest_adds_failed_tries_and_counts_all_requests(
    infer: Infer, write_jsonl: Write, server: ProviderServer
) -> None:
    """The first run's answer fails for its shape, and is paid; the second run's is good, and both count."""
    shape = f"generation.response_format={json.dumps(json.dumps(SHAPE))}"
    more = remote(server, *PRICED, shape, "generation.schema_retries=1")
    server.fault = lambda text, attempt: "body=" + json.dumps(chat_answer(usage(100, 10), "no json"))
    data = write_jsonl([ask("a"), ask("b")])
    infer(data, *more, engine="openai_compatible")
    first = manifest_of(infer)
    assert (first["rows"]["failed"], first["requests_sent"], len(server.requests)) == (2, 4, 4)
    assert first["cost_usd"] == pytest.approx(PRICE.of(400, 0, 40))
    assert sum(first["cost_parts_usd"].values()) == first["cost_usd"]
    server.fault = lambda text, attempt: "body=" + json.dumps(chat_answer(usage(100, 5), '{"a": 1}'))
    infer(data, *more, engine="openai_compatible")
    second = manifest_of(infer)
    assert (second["rows"]["done"], second["requests_sent"], len(server.requests)) == (2, 6, 6)
    assert second["cost_usd"] == pytest.approx(PRICE.of(600, 0, 50)) == pytest.approx(second["spent_usd"])
    assert second["tokens"] == {"input": 600, "cached_input": 0, "output": 50, "cache_write": 0, "reasoning": 0}
    assert [row["cost_usd"] for row in infer.rows()] == pytest.approx([PRICE.of(100, 0, 5)] * 2)
    # Rows that this output does not use were paid all the same.
    infer(write_jsonl([ask("a")]), *more, engine="openai_compatible")
    third = manifest_of(infer)
    assert third["cost_usd"] == pytest.approx(second["cost_usd"] / 2)
    assert third["spent_usd"] == pytest.approx(second["spent_usd"])


def test_a_row_of_unknown_cost_makes_the_sum_null_and_the_rest_stays_known(
    infer: Infer, write_jsonl: Write, server: ProviderServer
) -> None:
    for text, told in (("a", usage(100, 10)), ("b", None)):
        said(server, text, told)
    infer(write_jsonl([ask("a"), ask("b")]), *remote(server, *PRICED), engine="openai_compatible")
    manifest = manifest_of(infer)
    assert manifest["cost_usd"] is None and manifest["cost_unknown_requests"] == 1
    assert manifest["cost_known_usd"] == pytest.approx(PRICE.of(100, 0, 10)) == pytest.approx(manifest["spent_usd"])
    assert manifest["cost_parts_usd"] is None
    assert [row["usage"] and row["usage"]["output"] for row in infer.rows()] == [10, None]
    page = (infer.out / "report.html").read_text()
    assert figure(page, "Cost") == figure(page, "Cost of a million rows") == "unknown" and "for 1 request; " in page
    assert [(cost["requests"], cost["cost_usd"]) for cost in manifest["costs"]] == [(2, None)]


def test_row_models_and_several_prices_in_one_output(infer: Infer, write_jsonl: Write, server: ProviderServer) -> None:
    said(server, "a", usage(100, 10))
    said(server, "b", usage(100, 10), model="gpt-4o-2024-08-06")
    rows = [ask("a"), ask("b", model="gpt-4o")]
    infer(write_jsonl(rows), "engine.model=gpt-4o-mini", f"engine.base_url={server.url}", engine="openai")
    manifest = manifest_of(infer)
    assert manifest["cost_usd"] == pytest.approx((100 * 0.15 + 10 * 0.6 + 100 * 2.5 + 10 * 10) / 1e6)
    assert manifest["cost_parts_usd"] is None  # no one price adds up to it


@pytest.mark.slow
def test_a_later_price_does_not_change_what_was_paid(infer: Infer, write_jsonl: Write, server: ProviderServer) -> None:
    for text in ("a", "b"):
        said(server, text, usage(100, 10))
    infer(write_jsonl([ask("a")]), *remote(server, *PRICED), engine="openai_compatible")
    dear = ["engine.price.input=300", "engine.price.output=1500"]
    infer(write_jsonl([ask("a"), ask("b")]), *remote(server, *dear), engine="openai_compatible")
    assert manifest_of(infer)["cost_usd"] == pytest.approx(PRICE.of(100, 0, 10) * 101)


@pytest.mark.slow
def test_an_answer_without_usage_counts_against_the_budget_as_the_most_it_can_cost(
    infer: Infer, write_jsonl: Write, server: ProviderServer
) -> None:
    server.fault = lambda text, attempt: "body=" + json.dumps(chat_answer(None))
    more = remote(server, *PRICED, "generation.max_tokens=100", "engine.max_concurrency=1")
    each = CostBudget(
        1.0, compose(["engine=openai_compatible", *more]).engine, GenerationParams(max_tokens=100), 0.0
    ).max_cost(json.dumps(ask("row 00")).encode())
    limit = 20 * each
    with pytest.raises(Stopped) as stopped:
        infer(write_jsonl([ask(f"row {i:02}") for i in range(60)]), *more, f"run.budget_usd={limit}",
              engine="openai_compatible")  # fmt: skip
    assert 15 <= len(server.requests) <= 21
    assert read_spent(*resolve(str(infer.out))) >= len(server.requests) * each * 0.9
    assert stopped.value.changes == {"run.budget_usd": f"{2 * limit:g}"}
    told = status_job.look(open_output(str(infer.out)))
    assert told["cost_usd"] is None and f"run.budget_usd={2 * limit:g}" in told["command"]


@pytest.mark.slow
def test_the_command_after_a_budget_stop_has_a_higher_budget(
    local_ray: None, tmp_path: Path, write_jsonl: Write, server: ProviderServer, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl([ask(f"row {i}") for i in range(40)])
    argv = ["engine=openai_compatible", *remote(server, *PRICED, "generation.max_tokens=10"), f"dataset.path={data}",
            f"output.path={tmp_path / 'out'}", "run.budget_usd=0.001"]  # fmt: skip
    assert infer_main(argv) == 4
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("To continue: ")]
    assert line.endswith(" run.budget_usd=0.002") and "run.budget_usd=0.001" not in line
    assert changed("eagleray infer 'a=b c'", {}) == "eagleray infer 'a=b c'"


def test_batches_cost_their_share_and_so_do_their_paid_tries(infer: Infer, write_jsonl: Write) -> None:
    with BatchServer() as server:
        more = ["engine.model=m", f"engine.base_url={server.url}/v1", "run.mode=batch", "run.batch_poll_s=0.2", *PRICED]
        shape = {"response_format": {"type": "json_schema", "json_schema": {"schema": SHAPE}}, "schema_retries": 1}
        rows = [ask("plain"), ask("say: no json", generation=shape)]
        infer(write_jsonl(rows), *more, "engine.provider.batch.price=0.3", engine="openai")
    manifest = manifest_of(infer)
    plain, shaped = infer.rows()
    assert len(server.submitted) == 2 and shaped["error"]["type"] == "schema_mismatch"
    assert plain["cost_usd"] == pytest.approx(0.3 * PRICE.of(plain["usage"]["input"], 0, plain["usage"]["output"]))
    # The second row was asked, and is paid, twice.
    assert manifest["cost_usd"] == pytest.approx(plain["cost_usd"] + 2 * shaped["cost_usd"])
    assert manifest["requests_sent"] == 3 and manifest["cost_unknown_requests"] == 0


def test_a_batchs_answer_with_an_unknown_finish_reason_is_paid_once(infer: Infer, write_jsonl: Write) -> None:
    with BatchServer() as server:
        more = ["engine.model=m", f"engine.base_url={server.url}/v1", "run.mode=batch", "run.batch_poll_s=0.2", *PRICED]
        infer(write_jsonl([ask("a"), ask("ends with: eos")]), *more, "engine.provider.batch.price=0.5", engine="openai")
    plain, odd = infer.rows()
    assert len(server.submitted) == 1 and plain["error"] is None
    assert (odd["error"]["type"], odd["attempts"]) == ("bad_response", 1) and "{eos: stop}" in odd["error"]["message"]
    assert odd["cost_usd"] == pytest.approx(PRICE.of(odd["usage"]["input"], 0, odd["usage"]["output"]) / 2) != 0


def test_batches_of_a_library_user_are_priced(write_jsonl: Write) -> None:
    with BatchServer() as server:
        price = {"input": 3, "output": 15}
        with load_engine("anthropic", model="claude-x", base_url=f"{server.url}/v1", price=price) as engine:
            batch = engine.infer_batch([ask("a")])
            [completion] = engine.get_batch_results(batch, [ask("a")])
    used = completion.usage
    assert completion.text == "answer to: a"
    assert completion.cost_usd == pytest.approx(PRICE.of(used.input, 0, used.output) / 2)


def test_the_batch_price_is_data_by_provider_and_model_and_has_a_date() -> None:
    rule = {"match": "^dear", "batch": {"price": 0.75}}
    for kind in ("openai", "anthropic", "together", "fireworks", "parasail"):
        batch = compose([f"engine={kind}", "engine.model=m"]).engine.provider["batch"]
        assert 0 < batch["price"] <= 1 and str(batch["price_as_of"]) >= "2026-11"
    assert (
        "price" not in compose(["engine=openai_compatible", "engine.model=m"]).engine.provider["batch"]
    )  # unknown servers
    provider = {**compose(["engine=openai", "engine.model=m"]).engine.provider, "models": [rule]}
    price = {"input": 4, "output": 8}
    with load_engine("openai", model="m", base_url="http://localhost:1", provider=provider, price=price) as engine:
        assert engine.cost(Usage(10, 0, 5), None, batch=True) == pytest.approx(0.5 * 80 / 1e6)
        assert engine.cost(Usage(10, 0, 5), None) == pytest.approx(80 / 1e6)
        assert (engine.batch_share("dear-1"), engine.batch_share("m")) == (0.75, 0.5)


@pytest.mark.slow
def test_paid_tries_of_a_row_that_goes_back_when_the_run_ends_are_not_forgotten(
    infer: Infer, write_jsonl: Write, server: ProviderServer
) -> None:
    said(server, "a", usage(100, 10), answer=None)  # paid, and asked again
    server.plan["a"].append("429-after=600")
    data, more = write_jsonl([ask("a")]), remote(server, *PRICED)

    def interrupt() -> None:
        deadline = time.monotonic() + 120
        while len(server.requests) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted):
        infer(data, *more, engine="openai_compatible")
    thread.join()
    assert read_index(*resolve(str(infer.out))).spent() == (pytest.approx(PRICE.of(100, 0, 10)), 0)
    said(server, "a", usage(100, 20))
    infer(data, *more, engine="openai_compatible")
    manifest = manifest_of(infer)
    assert manifest["requests_sent"] == len(server.requests) == 3
    assert manifest["cost_usd"] == pytest.approx(PRICE.of(200, 0, 30))
    assert infer.rows()[0]["cost_usd"] == pytest.approx(PRICE.of(100, 0, 20))
