"""`run.budget_usd`: what a provider would bill never passes it, and a run goes on with more; and what models cost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.config import EngineConfig, Price, config_from_keys
from engines.errors import ConfigError
from engines.identity import identity
from engines.params import GenerationParams
from engines.prices import priced
from engines.registry import REGISTRY
from pipeline.configuration.compose import compose
from pipeline.configuration.options import conf_dir
from pipeline.errors import Stopped
from pipeline.executors.cost_budget import CostBudget, read_spent
from pipeline.executors.live.admission import Admission
from pipeline.executors.live.crash_trial import CrashTrial
from pipeline.executors.live.dispatcher import Dispatcher
from pipeline.executors.live.lease_table import LeaseTable
from pipeline.executors.live.queue import PrefixQueue
from pipeline.executors.requests import PendingRequest
from pipeline.monitor.status import UsageStats
from pipeline.storage.exact_json import dumps
from pipeline.storage.filesystem import resolve
from pipeline.storage.output_files import BUDGET
from tests.support.batch_server import BatchServer
from tests.support.infer import Infer, ask
from tests.support.processes import until
from tests.support.provider_server import ProviderServer, by_hash

Write = Callable[..., Path]
PRICE = Price(3.0, None, 15.0)
PRICED = ["engine.price.input=3", "engine.price.output=15"]
# Answers that were made, and are billed, though nobody can read them.
LOST = ("reset-body", "truncated", "not-json", "null")


def billed(server: ProviderServer) -> float:
    """What a provider would ask for all that it answered, by the usage it tells; a fault without an answer is free."""
    total = 0.0
    for seen in server.requests:
        prompt = len(json.dumps(seen.body["messages"])) // 4
        total += PRICE.of(prompt, 0, len(seen.text) // 4 + 1)
    return total - FREE * sum(server.faults[fault] for fault in server.faults if fault not in LOST)


# All rows of these tests are of one length, so that each request costs the same.
TEXT = "row {:05} " + "and so on " * 20
FREE = PRICE.of(len(json.dumps(ask(TEXT.format(0))["messages"])) // 4, 0, len(TEXT.format(0)) // 4 + 1)


def remote(server: ProviderServer, *more: str) -> list[str]:
    return ["engine.model=m", f"engine.base_url={server.url}", "engine.max_concurrency=16", *PRICED, *more]


@pytest.mark.slow
@pytest.mark.parametrize("bound", [["generation.max_tokens=80"], []])
def test_the_bill_never_passes_the_budget_with_several_workers_and_retries(
    infer: Infer, write_jsonl: Write, server: ProviderServer, bound: list[str]
) -> None:
    server.fault = by_hash(0.1, ("429", "500", "reset", *LOST))
    server.latency_s = 0.01
    rows = 600
    data = write_jsonl([ask(TEXT.format(i)) for i in range(rows)])
    budgets = [rows * FREE * share for share in (0.3, 0.6, 2.0)]
    more = remote(server, *bound, "hardware.replicas=2", "engine.max_retries=9")
    for budget in budgets[:2]:
        with pytest.raises(Stopped) as stopped:
            infer(data, *more, f"run.budget_usd={budget}", engine="openai_compatible")
        assert budget * 0.7 < billed(server) <= budget
        said = str(stopped.value)
        assert f"run.budget_usd={budget:g} has no room for another request: all runs into this output spent $" in said
        assert "the same command with a higher budget continues" in said
    sent = len(server.requests)
    outcome = infer(data, *more, f"run.budget_usd={budgets[2]}", engine="openai_compatible")
    assert outcome.exit_status == 0, infer.printed
    assert billed(server) <= budgets[2]
    assert len(server.requests) > sent
    assert [row["response"] for row in infer.rows()] == [TEXT.format(i) for i in range(rows)]
    # Nothing was asked twice but what went wrong.
    assert len(server.requests) == rows + sum(server.faults.values())


@pytest.mark.slow
def test_what_was_in_flight_when_a_run_was_killed_counts_as_spent(tmp_path: Path, write_jsonl: Write) -> None:
    data, out = write_jsonl([ask(TEXT.format(i)) for i in range(400)]), tmp_path / "out"
    with ProviderServer(latency_s=0.3) as server:
        budget = 400 * FREE * 0.5
        arguments = [
            "engine=openai_compatible", *remote(server, "generation.max_tokens=80"), f"dataset.path={data}",
            f"output.path={out}", f"run.budget_usd={budget}", "run.flush_s=0.5",
        ]  # fmt: skip
        command = [sys.executable, "-m", "jobs.infer", *arguments]
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
        until(lambda: len(server.requests) > 60 or process.poll() is not None)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert read_spent(*resolve(str(out))) >= billed(server) > 0
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 4, done.stderr
        assert "has no room for another request" in " ".join(done.stderr.split())
        assert budget * 0.5 < billed(server) <= budget


def test_an_interrupted_run_pays_for_nothing_that_it_did_not_ask(
    infer: Infer, write_jsonl: Write, server: ProviderServer
) -> None:
    data = write_jsonl([ask(TEXT.format(i)) for i in range(1000)])
    server.latency_s = 0.2
    more = remote(server, "run.budget_usd=1", "generation.max_tokens=80")

    def interrupt() -> None:
        until(lambda: len(server.requests) > 40)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Exception, match="interrupted"):
        infer(data, *more, engine="openai_compatible")
    thread.join()
    # Every row that was sent was finished: what is written down is the bill.
    assert read_spent(*resolve(str(infer.out))) == pytest.approx(billed(server))


def test_a_cheap_row_behind_a_dear_one_is_asked_first(infer: Infer, write_jsonl: Write, server: ProviderServer) -> None:
    dear = ask("x" * 400_000, id="dear")
    data = write_jsonl([dear, *(ask(f"{i}", id=f"{i}") for i in range(30))])
    with pytest.raises(Stopped, match="has no room for another request"):
        infer(data, *remote(server, "run.budget_usd=0.05", "generation.max_tokens=10"), engine="openai_compatible")
    assert sorted(server.texts()) == sorted(str(i) for i in range(30))


def test_a_row_that_asks_another_model_has_no_price(infer: Infer, write_jsonl: Write, server: ProviderServer) -> None:
    data = write_jsonl([ask("a"), ask("b", model="another")])
    outcome = infer(data, *remote(server, "run.budget_usd=1"), engine="openai_compatible")
    assert outcome.exit_status == 3
    error = infer.rows()[1]["error"]
    assert (error["type"], "asks 'another'" in error["message"]) == ("budget", True)
    assert server.texts() == ["a"]


@pytest.mark.slow
def test_starting_over_forgets_what_was_spent(infer: Infer, write_jsonl: Write, server: ProviderServer) -> None:
    data = write_jsonl([ask("a")])
    infer(data, *remote(server, "run.budget_usd=1"), engine="openai_compatible")
    assert read_spent(*resolve(str(infer.out))) > 0
    assert (infer.out / BUDGET).exists()
    infer(data, *remote(server, "run.resume=false"), engine="openai_compatible")
    assert not (infer.out / BUDGET).exists()


def test_batches_are_cut_and_submitted_within_the_budget(
    infer: Infer, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    rows = 60
    data = write_jsonl([ask(TEXT.format(i)) for i in range(rows)])
    with BatchServer() as server:
        more = [
            "engine.model=m", f"engine.base_url={server.url}/v1", "run.mode=batch", "run.batch_poll_s=0.2",
            "generation.max_tokens=80", "engine.provider.batch.rows=10", *PRICED,
        ]  # fmt: skip
        budget = rows * FREE / 2 * 0.5  # half of what all cost at the price of batches
        with pytest.raises(Stopped, match=r"has no room for another request: all runs into this output spent \$"):
            infer(data, *more, f"run.budget_usd={budget}", engine="openai")
        index_cost = cost_in(infer.out)
        assert budget * 0.6 < index_cost <= budget
        outcome = infer(data, *more, f"run.budget_usd={4 * budget}", engine="openai")
        assert outcome.exit_status == 0, infer.printed
        assert outcome.manifest["cost_usd"] == pytest.approx(cost_in(infer.out))
        assert outcome.manifest["cost_usd"] <= 4 * budget


def cost_in(out: Path) -> float:
    from pipeline.storage.ledger_index import read_index

    known, unknown = read_index(*resolve(str(out))).spent()
    assert not unknown
    return known


def test_estimates_grow_with_what_answers_tell() -> None:
    engine = EngineConfig("echo", price=Price(1e6, None, 0.0))  # a dollar a token
    budget = CostBudget(1000.0, engine, GenerationParams(max_tokens=10), spent=0.0)
    request = b'{"messages":[]}' + b" " * 385
    assert budget.max_cost(request) == 150  # 400 bytes are 100 tokens, and half as many to be safe
    assert not budget.fits(1001)
    budget.reserved = 100.0  # a tenth: no more before anything is known
    assert not budget.fits(1)
    budget.seen.add(UsageStats(20, 0.5, 10))
    assert budget.max_cost(request) == pytest.approx(220)
    assert budget.fits(900)
    budget.seen.add(UsageStats(20, 0.1, 10))
    assert budget.max_cost(request) == pytest.approx(220)


# -- what models cost -------------------------------------------------------------------------------------------------


def test_every_price_list_is_of_an_engine_and_has_its_date_and_source() -> None:
    import yaml

    lists = sorted((conf_dir() / "price").glob("*.yaml"))
    assert len(lists) >= 3
    for path in lists:
        assert path.stem in REGISTRY
        listed = yaml.safe_load(path.read_text())
        assert str(listed["as_of"]) >= "2026" and listed["source"].startswith("https://")
        for model, rates in listed["models"].items():
            price = priced(EngineConfig(path.stem, model))
            assert (price.input, price.output, price.as_of) == (rates["input"], rates["output"], str(listed["as_of"]))
            assert price.input > 0 and (price.input <= price.output or price.output == 0)  # 0: it only embeds
            assert (price.cached_input or 0) < price.input


@pytest.mark.parametrize(
    ("kind", "model", "rates"),
    [
        ("openai", "gpt-4o-mini", (0.15, 0.075, 0.6)),
        ("openai", "gpt-4o-mini-2024-07-18", (0.15, 0.075, 0.6)),
        ("anthropic", "claude-sonnet-4-5-20250929", (3, 0.3, 15)),
        ("anthropic", "claude-haiku-4-5-latest", (1, 0.1, 5)),
        ("openai", "gpt-4o-mini-audio-preview", (None, None, None)),
        ("openai", "ft:gpt-4o-mini:me", (0.3, None, 1.2)),
        ("openai_compatible", "gpt-4o-mini", (None, None, None)),
        ("openai", None, (None, None, None)),
    ],
)
def test_a_price_is_found_by_engine_and_model(kind: str, model: str | None, rates: tuple[float | None, ...]) -> None:
    price = priced(EngineConfig(kind, model))
    assert (price.input, price.cached_input, price.output) == rates


def test_engine_price_and_the_users_own_lists_come_first(tmp_path: Path) -> None:
    (tmp_path / "price").mkdir()
    own = tmp_path / "price" / "openai.yaml"
    own.write_text("as_of: 2026-11-01\nmodels:\n  mine: {input: 1, output: 2}\n  gpt-4o: {input: 7, output: 8}\n")

    def price(*overrides: str) -> Price:
        return compose(["engine=openai", *overrides], str(tmp_path)).engine.price

    assert price("engine.model=mine") == Price(1, None, 2, "2026-11-01")
    assert price("engine.model=gpt-4o").input == 7
    assert price("engine.model=gpt-4o-mini").input == 0.15
    assert price("engine.model=mine", "engine.price.output=5") == Price(1, None, 5, "2026-11-01")
    assert price("engine.model=x", "engine.price.output=5") == Price(None, None, 5)
    own.write_text("as_of: 2026-11-01\nmodels:\n  mine: {inptu: 1, output: 2}\n")
    with pytest.raises(ConfigError, match=r"price/openai.yaml: 'mine' has no 'inptu' \(did you mean 'input'\?\)"):
        price("engine.model=mine")
    own.write_text("models: {}\n")
    with pytest.raises(ConfigError, match="a price list has 'as_of', a date, and 'models'"):
        price("engine.model=mine")


def test_a_price_changes_no_key() -> None:
    assert identity(EngineConfig("openai", "m")) == identity(EngineConfig("openai", "m", price=Price(1, None, 2)))


@pytest.mark.slow
def test_a_cost_that_is_not_known_is_null_and_that_of_a_local_engine_nothing(
    infer: Infer, write_jsonl: Write, server: ProviderServer
) -> None:
    data = write_jsonl([ask("a")])
    plain = ["engine.model=m", f"engine.base_url={server.url}"]
    manifest = infer(data, *plain, engine="openai_compatible").manifest
    assert (manifest["cost_usd"], manifest["price_as_of"]) == (None, None)
    manifest = infer(data, *plain, *PRICED, "run.resume=false", engine="openai_compatible").manifest
    assert manifest["cost_usd"] == pytest.approx(PRICE.of(manifest["tokens"]["input"], 0, manifest["tokens"]["output"]))
    assert infer(data, "run.resume=false").manifest["cost_usd"] == 0


def test_the_manifest_tells_of_which_day_a_list_price_is(
    infer: Infer, write_jsonl: Write, server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    more = ["engine.model=gpt-4o-mini", f"engine.base_url={server.url}"]
    manifest = infer(write_jsonl([ask("a")]), *more, engine="openai").manifest
    assert manifest["price_as_of"] == priced(config_from_keys("openai", {"model": "gpt-4o-mini"})).as_of
    assert manifest["cost_usd"] > 0
    assert manifest["config"]["engine"]["price"]["input"] == 0.15


def test_the_price_lists_are_in_the_wheel() -> None:
    import tomllib

    with (Path(__file__).parent.parent / "pyproject.toml").open("rb") as file:
        about = tomllib.load(file)
    assert "conf.price" in about["tool"]["setuptools"]["packages"]
    with contextlib.suppress(ImportError):
        from importlib.resources import files

        assert (files("conf") / "price" / "openai.yaml").is_file()


def test_turns_and_further_tries_of_a_shape_are_reserved_too() -> None:
    engine = EngineConfig("echo", price=Price(0.0, None, 1e6))  # a dollar an output token
    budget = CostBudget(1e9, engine, GenerationParams(max_tokens=10), spent=0.0)
    shape = {"type": "object", "properties": {}}
    plain, multi_turn, shaped = (
        budget.max_cost(dumps({"messages": [], **more}))
        for more in ({}, {"turns": ["a", "b"]}, {"generation": {"response_format": shape, "schema_retries": 3}})
    )
    assert (plain, multi_turn, shaped) == (10, 30, 40)


def test_what_was_reserved_and_given_back_is_nothing() -> None:
    budget = CostBudget(1.0, EngineConfig("echo", price=Price(1.0, None, 1.0)), GenerationParams(max_tokens=1), spent=0.0)
    for cost in (0.01, 0.02, 0.03):
        budget.reserved += cost
    for cost in (0.01, 0.02, 0.03):
        budget.reserved -= cost
    assert budget.reserved != 0 and budget.fits(0.5)


def test_a_worker_learns_that_the_budget_has_no_room_for_a_row_before_the_whole_input_is_read() -> None:
    """Otherwise it would hold back refused rows for ever, and the run would never end."""
    budget = CostBudget(1.0, EngineConfig("echo", price=Price(0.0, None, 1.0)), GenerationParams(), spent=0.5)
    dispatcher = Dispatcher([], None, [None], False, budget=budget)  # type: ignore[arg-type]  # nothing is read here
    dear = dumps({"messages": [], "generation": {"max_tokens": 1_000_000}})
    dispatcher.queue.add([PendingRequest(b"dear", "dear", dear, 0, 0)])

    async def last() -> bool:
        lease = await dispatcher.pull("w1", 1, 0, [])
        assert lease is not None and not lease
        return lease.last

    assert asyncio.run(last()) and not dispatcher.run_status.fed
    dispatcher = Dispatcher([], None, [None], False, budget=budget)  # type: ignore[arg-type]
    assert not asyncio.run(last())  # the input may have a cheaper row


def test_a_dear_suspect_does_not_keep_a_cheap_one_waiting() -> None:
    budget = CostBudget(1.0, EngineConfig("echo", price=Price(0.0, None, 1.0)), GenerationParams(), spent=0.0)
    trial = CrashTrial()
    for name, limit in (("cheap", 10), ("dear", 10_000_000)):
        request = dumps({"messages": [], "generation": {"max_tokens": limit}})
        trial.accuse([PendingRequest(name.encode(), name, request, 0, 0)])
    table = LeaseTable(PrefixQueue(), trial, Admission(budget, ""))
    lease = table.lend("w1", 10, 0, True)
    assert lease is not None and lease.ids == ["cheap"] and [row.id for row in trial.suspects()] == ["dear"]
    assert table.lend("w2", 10, 0, True) is None


def test_a_provider_that_counts_more_from_its_cache_than_there_was_gives_nothing_back() -> None:
    assert Price(1.0, 0.1, 0.0).of(10, 10**9, 0) == Price(1.0, 0.1, 0.0).of(10, 10, 0) > 0
