"""Providers' batch APIs: runs, killed at every step, against a server that keeps state; and the library's calls."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from engines import ConfigError, EngineError, load_engine
from engines.config import packaged
from engines.errors import ErrorCode
from engines.remote.batch.client import Requests
from engines.remote.batch.factory import wire_of
from jobs import cost
from jobs.batch import main as batch_main
from pipeline.configuration.compose import compose
from pipeline.errors import Interrupted, Stopped
from pipeline.executors.batch import collector, executor
from pipeline.executors.batch.store import BatchStore
from pipeline.run import STOPPED, WITH_FAILURES
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger_index import read_index
from tests.support.batch_server import BatchServer, text_of
from tests.support.gemini_batches import GeminiBatchServer
from tests.support.infer import Infer, ask
from tests.support.marks import slow
from tests.support.processes import PATIENCE_S, until
from tests.support.task_server import tokens, vector

KEY = "sk-a-secret-of-some-length"
Write = Callable[..., Path]


@dataclass(frozen=True)
class Case:
    """A provider: its engine, and where the server speaks its API."""

    engine: str
    path: str

    def keys(self, server: BatchServer) -> dict[str, Any]:
        return {"model": "m-1", "base_url": f"{server.url}{self.path}"}

    def overrides(self, server: BatchServer, *more: str) -> list[str]:
        found = [f"engine.{name}={value}" for name, value in self.keys(server).items()]
        return [*found, "run.mode=batch", "run.batch_poll_s=0.2", *more]


CASES = {
    "openai": Case("openai", "/v1"),
    "parasail": Case("parasail", "/v1"),
    "anthropic": Case("anthropic", "/v1"),
    "together": Case("together", "/together/v1"),
    "fireworks": Case("fireworks", "/inference/v1"),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for provider in CASES:
        monkeypatch.setenv(f"{provider.upper()}_API_KEY", KEY)
    monkeypatch.setenv("FIREWORKS_ACCOUNT_ID", "acme")


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with BatchServer() as running:
        running.delay_s = 0.2
        yield running
        assert running.bad == []


def conversations(count: int) -> list[dict[str, Any]]:
    return [ask(f"question {i}", id=f"r{i}") for i in range(count)]


def by_text(fates: dict[str, list[str]]) -> Callable[[str, dict[str, Any], int], str]:
    """What becomes of a row, by its question and how often it was sent before."""

    def fate(custom_id: str, body: dict[str, Any], round: int) -> str:
        planned = fates.get(text_of(body), [])
        return planned[round] if round < len(planned) else "ok"

    return fate


# --- whole runs


def test_embeddings_go_in_batches(server: BatchServer, infer: Infer, write_jsonl: Write) -> None:
    server.fate = by_text({"text 1": ["expired"], "text 2": ["error400"] * 9})
    data = write_jsonl([{"text": f"text {i}"} for i in range(5)])
    case, model = CASES["openai"], "engine.model=text-embedding-3-small"
    more = ["task=embed", "generation.dimensions=4", "run.max_error_rate=1"]
    outcome = infer(data, *case.overrides(server, *more, model), engine="openai")
    assert outcome.exit_status == WITH_FAILURES
    rows = infer.rows()
    assert rows[2]["error"]["type"] == "bad_request" and rows[2]["embedding"] is None
    for at in (0, 1, 3, 4):
        assert rows[at]["embedding"] == pytest.approx(vector(f"text {at}", 4))
    assert rows[1]["attempts"] == 2
    assert outcome.manifest["cost_usd"] == pytest.approx(4 * tokens("text 0") * 0.01e-6)  # half the live price
    lines = [body for body in server.bodies if body["input"] == ["text 0"]]
    assert lines == [{"model": "text-embedding-3-small", "input": ["text 0"], "dimensions": 4, "encoding_format": "base64"}]
    with pytest.raises(ConfigError, match="the batch API of engine=together does not support task=embed"):
        infer(data, *CASES["together"].overrides(server, "task=embed"), engine="together")


def test_rows_go_in_batches_and_come_back_in_order_with_what_failed_sent_again(
    case: Case, server: BatchServer, infer: Infer, write_jsonl: Write
) -> None:
    fates = {f"question {i}": [fate] for i, fate in enumerate(("expired", "cancelled", "missing", "error500"))}
    server.fate = by_text({**fates, "question 7": ["error400"] * 9})
    data = write_jsonl([*conversations(40), "no json", ask("question 39", id="again")])
    more = ["engine.provider.batch.rows=15", "engine.price.input=2", "engine.price.output=4", "generation.max_tokens=50"]
    more.append("generation.temperature=0")  # equal rows are asked once
    outcome = infer(data, *case.overrides(server, *more), engine=case.engine)
    assert outcome.exit_status == WITH_FAILURES
    rows = infer.rows()
    assert [row["index"] for row in rows] == list(range(42))
    for i, row in enumerate(rows[:40]):
        if i == 7:
            assert row["error"]["type"] == "bad_request" and row["error"]["status"] == 400
        else:
            assert row["response"] == f"answer to: question {i}", row
            assert row["attempts"] == (2 if i < 4 else 1)
    assert rows[40]["error"]["type"] == "invalid_input"
    assert rows[41]["response"] == "answer to: question 39"  # asked once for both
    manifest = outcome.manifest
    tokens = manifest["tokens"]
    assert manifest["cost_usd"] == pytest.approx((tokens["input"] * 2 + tokens["output"] * 4) / 1e6 / 2)
    assert [b["rows"] for b in manifest["batches"]] == [15, 15, 10, 4]
    assert manifest["this_run"] == {"asked": 40, "failed": 1, "requests_sent": 44, "engine_deaths": 0}
    assert manifest["requests_sent"] == 44 and manifest["rows"]["duplicates"] == 1
    left = sorted(path.suffix for path in (infer.out / "_batches").iterdir())
    assert left == [".json"] * 4  # the copies of the dataset are gone
    report = (infer.out / "report.html").read_text()
    assert "of 42, 2 failed (1 invalid), 1 duplicate" in report
    assert "Latency" not in report and all(str(batch["id"]) in report for batch in manifest["batches"])
    sent = len(server.submitted)
    again = infer(data, *case.overrides(server, *more, "run.retry_failed=false"), engine=case.engine)
    assert again.exit_status == WITH_FAILURES and len(server.submitted) == sent
    everything = b"".join(path.read_bytes() for path in infer.out.rglob("*") if path.is_file())
    assert KEY.encode() not in everything and KEY not in infer.printed


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_a_run_killed_at_every_step_submits_no_row_twice_and_loses_none(
    case: Case, server: BatchServer, tmp_path: Path, write_jsonl: Write
) -> None:
    data, out = write_jsonl(conversations(30)), tmp_path / "out"
    points = [("upload", "before"), ("upload", "after"), ("submit", "before"), ("submit", "after"), ("results", "middle")]
    if case.engine == "anthropic":
        points = [point for point in points if point[0] != "upload"]
    planned = [point for point in points for _ in range(2)]
    struck: list[tuple[str, str]] = []
    run: list[subprocess.Popen[str]] = []

    def strike(step: str, when: str) -> None:
        if planned and (step, when) in planned:
            planned.remove((step, when))
            struck.append((step, when))
            run[0].kill()
            run[0].wait()

    server.on_step = strike
    command = [
        sys.executable, "-m", "jobs.infer", f"engine={case.engine}", f"dataset.path={data}", f"output.path={out}",
        *case.overrides(server, "engine.provider.batch.rows=11"),
    ]  # fmt: skip
    for _ in range(20):
        run[:] = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True)]
        _, printed = run[0].communicate(timeout=PATIENCE_S)
        if run[0].returncode != -signal.SIGKILL:
            break
    assert run[0].returncode == 0, printed
    assert sorted(struck) == sorted(point for point in points for _ in range(2))
    ids = [id for _, ids in server.submitted for id in ids]
    assert len(ids) == 30 and {server.times_submitted(id) for id in ids} == {1}
    rows = [row for path in sorted((out / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert [row["response"] for row in rows] == [f"answer to: question {i}" for i in range(30)]


# A run that kills itself at its next durable step: with DIE=before or DIE=after what makes it durable. The note that a
# batch is submitted again is no step: a run that is killed there each time never submits it.
SUICIDAL = """
import json, os, signal, sys
from pathlib import Path
from jobs.infer import main

def noted(path):
    return {**json.loads(Path(path).read_text()), "tried_at": None} if Path(path).exists() else None

def replace(source, target, real=os.replace):
    of_batch = str(target).endswith(".json") and "/_batches/" in str(target)
    durable = "/_segments/" in str(target) or of_batch and noted(source) != noted(target)
    if not (durable and os.environ["DIE"] == "before"):
        real(source, target)
    if durable:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_a_run_killed_before_and_after_every_durable_step_submits_no_row_twice_and_loses_none(
    provider: str, server: BatchServer, tmp_path: Path, write_jsonl: Write
) -> None:
    data, out, case = write_jsonl(conversations(8)), tmp_path / "out", CASES[provider]
    server.fate = by_text({"question 2": ["expired"]})  # which makes a second batch
    # Of each it becomes durable that it is spooled, uploaded, submitting, submitted, its answers, that it is fetched.
    steps = 2 * 6
    command = [
        sys.executable, "-c", SUICIDAL, f"engine={case.engine}", f"dataset.path={data}", f"output.path={out}",
        *case.overrides(server),
    ]  # fmt: skip
    killed = 0
    while killed < 4 * steps:
        die = ("before", "after")[killed % 2]
        run = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S, env={**os.environ, "DIE": die})
        if run.returncode != -signal.SIGKILL:
            break
        killed += 1
    assert run.returncode == 0, run.stderr
    assert killed >= 2 * steps
    times = {text: sum(text_of(body) == text for body in server.bodies) for text in map(text_of, server.bodies)}
    assert times == {f"question {i}": 2 if i == 2 else 1 for i in range(8)}
    assert pq.read_table(out / "data")["response"].to_pylist() == [f"answer to: question {i}" for i in range(8)]


@pytest.mark.parametrize("case", [name if name == "openai" else slow(name) for name in CASES], indirect=True)
def test_what_a_server_does_wrong_in_passing_is_done_again(
    case: Case, server: BatchServer, infer: Infer, write_jsonl: Write
) -> None:
    server.fail_next = {"upload": 1, "submit": 1, "poll": 2, "results": 1, "list": 1}
    server.break_results_after = 3
    data = write_jsonl(conversations(12))
    outcome = infer(data, *case.overrides(server), engine=case.engine)
    assert outcome.exit_status == 0
    assert [row["response"] for row in infer.rows()] == [f"answer to: question {i}" for i in range(12)]
    ids = [id for _, ids in server.submitted for id in ids]
    assert len(ids) == len(set(ids)) == 12


def test_a_full_queue_is_waited_for(server: BatchServer, infer: Infer, write_jsonl: Write) -> None:
    server.max_queued_batches = 1
    data = write_jsonl(conversations(12))
    outcome = infer(data, *CASES["openai"].overrides(server, "engine.provider.batch.rows=4"), engine="openai")
    assert outcome.exit_status == 0 and len(server.submitted) == 3

    server.max_queued_batches = None
    fates = iter(["token_limit_exceeded"])
    server.batch_fate = lambda number: next(fates, "ok")
    data = write_jsonl([ask(f"more {i}") for i in range(4)], "more.jsonl")
    infer.out = infer.out.with_name("more")
    assert infer(data, *CASES["openai"].overrides(server), engine="openai").exit_status == 0
    assert [row["response"] for row in infer.rows()] == [f"answer to: more {i}" for i in range(4)]


def test_queued_tokens_bound_what_is_under_way_at_once(server: BatchServer, infer: Infer, write_jsonl: Write) -> None:
    most, under_way = [0], threading.Lock()

    def look(step: str, when: str) -> None:
        with under_way:
            if (step, when) == ("submit", "before"):
                most[0] = max(most[0], server.in_progress())

    server.on_step = look
    data = write_jsonl(conversations(20))
    more = ["engine.provider.batch.rows=5", "engine.provider.batch.queued_tokens=600"]
    assert infer(data, *CASES["openai"].overrides(server, *more), engine="openai").exit_status == 0
    assert len(server.submitted) >= 4 and most[0] <= 2


def test_a_batch_that_fails_whole_fails_its_rows_with_its_reason(
    server: BatchServer, infer: Infer, write_jsonl: Write
) -> None:
    server.batch_fate = lambda number: "failed"
    outcome = infer(write_jsonl(conversations(3)), *CASES["openai"].overrides(server), engine="openai")
    assert outcome.exit_status == WITH_FAILURES and len(server.submitted) == 1
    assert {row["error"]["type"] for row in infer.rows()} == {"bad_request"}


def test_rows_that_never_come_back_fail_after_so_many_rounds(server: BatchServer, infer: Infer, write_jsonl: Write) -> None:
    server.fate = by_text({"question 1": ["expired"] * 9, "question 2": ["missing"] * 9})
    more = CASES["openai"].overrides(server, "engine.max_retries=1")
    outcome = infer(write_jsonl(conversations(3)), *more, engine="openai")
    assert outcome.exit_status == WITH_FAILURES and len(server.submitted) == 2
    assert [row["error"] and row["error"]["type"] for row in infer.rows()] == [None, "timeout", "bad_response"]


def test_what_a_batch_leaves_unanswered_goes_live_with_the_same_settings(
    server: BatchServer, infer: Infer, write_jsonl: Write
) -> None:
    server.fate = by_text({"question 1": ["expired"], "question 2": ["error400"] * 9})
    more = ["run.batch_fallback=live", "generation.temperature=0.5", "generation.seed=3", "engine.price.input=2",
            "engine.price.output=0"]  # fmt: skip
    outcome = infer(write_jsonl(conversations(3)), *CASES["openai"].overrides(server, *more), engine="openai")
    assert outcome.exit_status == WITH_FAILURES
    assert [row["response"] for row in infer.rows()] == ["answer to: question 0", "answer to: question 1", None]
    assert len(server.submitted) == 1 and len(server.live) == 1
    sent = [body for body in server.bodies if body["messages"][-1]["content"] == "question 1"]
    assert sent == [server.live[0]] and sent[0]["temperature"] == 0.5
    usage = [row["usage"]["input"] for row in infer.rows() if row["usage"]]
    assert outcome.manifest["cost_usd"] == pytest.approx((usage[0] + usage[1] * 2) / 1e6)


def test_rows_that_no_batch_takes_fail_alone(server: BatchServer, infer: Infer, write_jsonl: Write) -> None:
    rows = [ask("fine"), ask("x" * 3000), ask("odd", generation={"top_k": 3}), ask("other model", model="m-2")]
    more = CASES["openai"].overrides(server, "engine.provider.batch.bytes=2000")
    assert infer(write_jsonl(rows), *more, engine="openai").exit_status == WITH_FAILURES
    fine, large, odd, other = infer.rows()
    assert fine["response"] == "answer to: fine" and other["response"] == "answer to: other model"
    assert other["model"] == "m-2" and len(server.submitted) == 2  # one model to a batch
    assert "a batch holds 2,000" in large["error"]["message"] and "top_k" in odd["error"]["message"]


def test_a_refused_key_stops_at_once_and_the_run_goes_on_later(
    server: BatchServer, infer: Infer, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = KEY
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-but-long-enough")
    data = write_jsonl(conversations(3))
    with pytest.raises(Stopped, match="refuses the key"):
        infer(data, *CASES["openai"].overrides(server), engine="openai")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert infer(data, *CASES["openai"].overrides(server), engine="openai").exit_status == 0
    assert len(server.submitted) == 1


@pytest.mark.parametrize("whole", [False, True])
def test_an_account_without_money_fails_no_row_and_the_run_goes_on_later(
    case: Case, whole: bool, server: BatchServer, infer: Infer, write_jsonl: Write
) -> None:
    if whole and case.engine == "anthropic":
        pytest.skip("its batches do not fail whole")
    if whole:
        server.batch_fate = lambda number: "billing_hard_limit_reached" if number == 0 else "ok"
    else:
        server.fate = by_text({f"question {i}": ["error402"] for i in (1, 2, 5)})
    data = write_jsonl(conversations(9))
    with pytest.raises(Stopped, match="the account has no money") as stopped:
        infer(data, *case.overrides(server, "engine.max_retries=0"), engine=case.engine)
    assert stopped.value.code == ErrorCode.ACCOUNT_EMPTY
    server.batch_fate = lambda number: "ok"
    assert infer(data, *case.overrides(server), engine=case.engine).exit_status == 0
    assert [row["response"] for row in infer.rows()] == [f"answer to: question {i}" for i in range(9)]
    again = [] if whole and case.engine == "fireworks" else [9] if whole else [3]  # its failed jobs keep their answers
    assert [len(ids) for _, ids in server.submitted] == [9, *again]


def test_starting_over_does_not_forget_batches_under_way(server: BatchServer, infer: Infer, write_jsonl: Write) -> None:
    server.delay_s = 3600

    def interrupt() -> None:
        until(lambda: server.submitted)
        os.kill(os.getpid(), signal.SIGINT)

    data = write_jsonl(conversations(3))
    threading.Thread(target=interrupt).start()
    with pytest.raises(Interrupted, match="go on at the provider"):
        infer(data, *CASES["openai"].overrides(server), engine="openai")
    with pytest.raises(ConfigError, match="would forget 1 batch under way"):
        infer(data, *CASES["openai"].overrides(server, "run.resume=false"), engine="openai")


def test_a_short_file_of_results_is_fetched_again(
    case: Case, server: BatchServer, infer: Infer, write_jsonl: Write
) -> None:
    if case.engine == "together":
        pytest.skip("it does not tell how many rows are answered")
    server.lose_results_after = 3
    assert infer(write_jsonl(conversations(9)), *case.overrides(server), engine=case.engine).exit_status == 0
    assert len(server.submitted) == 1 and [row["attempts"] for row in infer.rows()] == [1] * 9


@pytest.mark.parametrize("fate", [[], ["missing"]], ids=["all rows there", "one row missing"])
def test_files_decide_where_the_provider_counts_more_answers_than_rows(
    fate: list[str], case: Case, server: BatchServer, infer: Infer, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "INCOMPLETE_S", 0.0)
    server.overcount, server.fate = 2, by_text({"question 3": fate})
    assert infer(write_jsonl(conversations(5)), *case.overrides(server), engine=case.engine).exit_status == 0
    assert [row["attempts"] for row in infer.rows()] == [1, 1, 1, 2 if fate else 1, 1]


def test_a_fetch_that_does_not_wait_ends_with_overcounted_batches_and_so_does_a_cancelled_one(
    server: BatchServer, write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "INCOMPLETE_S", 0.0)
    server.overcount, server.delay_s, server.fate = 2, 0.0, by_text({"question 1": ["missing"] * 9})
    data, case = write_jsonl(conversations(3)), CASES["openai"]
    for end in ("fetch", "cancel"):
        out = tmp_path / end
        keys = case.overrides(server, f"dataset.path={data}", f"output.path={out}", "engine.max_retries=0")
        args = ["engine=openai", *(key for key in keys if not key.startswith("run.mode"))]
        assert batch_main(["submit", *args]) == 0
        if end == "cancel":
            server.jobs[server.submitted[-1][0]].cancelled = 1.0
        statuses = [batch_main(["fetch", *args]) for _ in range(collector.INCOMPLETE_READS)]
        assert statuses[-1] == WITH_FAILURES


def test_a_dry_run_says_how_many_batches_there_will_be_and_sends_nothing(
    server: BatchServer, infer: Infer, write_jsonl: Write
) -> None:
    rows = [*conversations(25), *({**row, "model": "m-2"} for row in conversations(3))]
    more = ["engine.provider.batch.rows=10", "run.dry_run=true"]
    infer(write_jsonl(rows), *CASES["openai"].overrides(server, *more), engine="openai")
    said = " ".join(infer.printed.split())
    assert (
        "batches about 4, with 28 requests and 0.0 MB in all; one holds at most 10 requests and 200 MB of one model" in said
    )
    assert "answers come within 24 h" in said and not server.asked


def test_the_steps_take_the_output_alone(
    server: BatchServer, write_jsonl: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out, server.delay_s = write_jsonl(conversations(3)), tmp_path / "out", 3600.0
    keys = CASES["openai"].overrides(server, f"dataset.path={data}", f"output.path={out}", "engine=openai")
    assert batch_main(["submit", *(key for key in keys if not key.startswith("run.mode"))]) == 0
    assert batch_main(["status", str(out)]) == 0
    assert "3 rows under way in 1 batch" in capsys.readouterr().err.splitlines()[-1]
    assert cost.main([str(out)]) == 0
    assert "3 requests are in batches at the provider; the cost is not known yet." in capsys.readouterr().out
    server.jobs[server.submitted[0][0]].delay_s = 0.0
    assert batch_main(["fetch", str(out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["rows"]["done"] == 3
    capsys.readouterr()
    assert cost.main([str(out), "--by", "lane", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(group["lane"], group["requests"], group["cost_usd"]) for group in told["groups"]] == [
        ("batch", 3, manifest["cost_usd"])
    ]


def test_the_url_of_results_may_be_relative(server: BatchServer, infer: Infer, write_jsonl: Write) -> None:
    server.relative_urls = True
    assert infer(write_jsonl(conversations(3)), *CASES["anthropic"].overrides(server), engine="anthropic").exit_status == 0


def test_the_ledger_is_read_once_a_round_and_not_for_each_batch(
    server: BatchServer, infer: Infer, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    for module in (collector, executor):
        monkeypatch.setattr(module, "read_index", lambda *args: reads.append(args) or read_index(*args))
    more = ["engine.provider.batch.rows=3"]
    assert (
        infer(write_jsonl(conversations(30)), *CASES["openai"].overrides(server, *more), engine="openai").exit_status == 0
    )
    assert len(server.submitted) == 10 and len(reads) <= 3


def test_odd_characters_in_an_answer_do_not_cut_its_line(
    case: Case, server: BatchServer, infer: Infer, write_jsonl: Write
) -> None:
    odd = "a\u2028b\u2029c\u0085d"
    assert infer(write_jsonl([ask(odd), ask("plain")]), *case.overrides(server), engine=case.engine).exit_status == 0
    assert [row["response"] for row in infer.rows()] == [f"answer to: {odd}", "answer to: plain"]


def test_a_key_that_an_error_repeats_is_cut_out(server: BatchServer, infer: Infer, write_jsonl: Write) -> None:
    server.refuse_results = f"the key {KEY} may not read files"
    with pytest.raises(Stopped, match="refuses the key") as stopped:
        infer(write_jsonl(conversations(2)), *CASES["openai"].overrides(server), engine="openai")
    assert KEY not in str(stopped.value) and KEY not in infer.printed


def test_batches_under_way_are_gone_on_with_as_they_were_made(
    server: BatchServer, tmp_path: Path, write_jsonl: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    server.delay_s = 60
    data = write_jsonl(conversations(3))
    args = ["engine=openai", f"dataset.path={data}", f"output.path={tmp_path}/out", *CASES["openai"].overrides(server)]
    assert batch_main(["submit", *args, "generation.temperature=0.5"]) == 0
    assert batch_main(["fetch", *args]) == 2
    assert "were made with generation={'temperature': 0.5}: go on with that" in " ".join(capfd.readouterr().err.split())
    assert len(server.submitted) == 1


def test_a_queue_that_is_full_without_us_is_told(server: BatchServer, infer: Infer, write_jsonl: Write) -> None:
    fates = iter(["token_limit_exceeded"] * 3)
    server.batch_fate = lambda number: next(fates, "ok")
    more = CASES["openai"].overrides(server, "run.progress_s=0.01")
    assert infer(write_jsonl(conversations(3)), *more, engine="openai").exit_status == 0
    assert "the provider takes no batch: the batch is token_limit_exceeded (engine.provider.batch" in infer.printed


def test_rounds_are_counted_over_steps(server: BatchServer, tmp_path: Path, write_jsonl: Write, local_ray: None) -> None:
    server.fate = by_text({"question 1": ["expired"] * 99})
    data = write_jsonl(conversations(3))
    args = ["engine=openai", f"dataset.path={data}", f"output.path={tmp_path}/out", *CASES["openai"].overrides(server)]
    args.append("engine.max_retries=2")
    status = until(lambda: (found := batch_main(["fetch", *args])) != STOPPED and found)
    assert status == WITH_FAILURES and len(server.submitted) == 3
    assert list_rows(tmp_path / "out")[0]["attempts"] == 1


# --- step by step


@pytest.mark.parametrize("case", [name if name == "openai" else slow(name) for name in CASES], indirect=True)
def test_the_steps_of_eagleray_batch(
    case: Case, server: BatchServer, tmp_path: Path, write_jsonl: Write, capfd: pytest.CaptureFixture[str], local_ray: None
) -> None:
    server.delay_s = 3600
    data, out = write_jsonl(conversations(10)), tmp_path / "out"
    args = [f"engine={case.engine}", f"dataset.path={data}", f"output.path={out}", *case.overrides(server)]
    args.append("engine.provider.batch.rows=6")

    def do(step: str) -> tuple[int, str]:
        status = batch_main([step, *args])
        return status, capfd.readouterr().err

    assert do("submit")[0] == 0 and len(server.submitted) == 2
    assert do("submit")[0] == 0 and len(server.submitted) == 2
    status, printed = do("status")
    assert status == 0 and "10 rows under way in 2 batches" in printed and "in_progress" in printed
    assert do("fetch")[0] == STOPPED
    printed = do("list")[1]
    assert all(batch.id in printed for batch in BatchStore(*resolve(str(out))).batches if batch.id)
    assert do("cancel")[0] == 0
    server.delay_s = 0.2  # for those that are submitted later
    found = until(lambda: (told := do("fetch"))[0] != STOPPED and told)
    assert found[0] == WITH_FAILURES and len(server.submitted) == 2, found  # nothing goes again by itself
    assert {row["error"]["type"] for row in list_rows(out)} == {"cancelled"}
    assert batch_main(args) == 0
    rows = list_rows(out)
    assert [row["response"] for row in rows] == [f"answer to: question {i}" for i in range(10)]


def list_rows(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((out / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_an_unknown_step_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert batch_main(["fetsch"]) == 2
    assert "there is no step 'fetsch' of eagleray batch (did you mean 'fetch'?)" in capsys.readouterr().err


# --- for programs


def test_a_program_submits_and_fetches_by_what_was_asked(case: Case, server: BatchServer) -> None:
    asked = [*conversations(5), ask("question 0", id="again")]
    server.fate = by_text({"question 3": ["error400"]})
    with load_engine(case.engine, **case.keys(server)) as engine:
        id = engine.infer_batch(asked, {"max_tokens": 9})
        with contextlib.suppress(EngineError):
            engine.get_batch_results(id, asked, {"max_tokens": 9})
        status = until(lambda: (told := engine.get_batch_status(id)).status.value != "in_progress" and told)
        assert status.status.value == "completed"
        assert id in [batch.id for batch in engine.list_batches()]
        wanted = [*reversed(asked), ask("never asked")]
        found = engine.get_batch_results(id, wanted, {"max_tokens": 9})
    texts = [completion.text for completion in found]
    assert texts == [
        "answer to: question 0",
        "answer to: question 4",
        None,
        *[f"answer to: question {i}" for i in (2, 1, 0)],
        None,
    ]
    assert found[2].error is not None and found[2].error.type == "bad_request"
    assert found[-1].error is not None and found[-1].error.type == "not_found"
    assert found[0].engine == case.engine


def test_a_program_gets_embeddings_of_a_batch(server: BatchServer) -> None:
    asked: list[Any] = [{"task": "embed", "inputs": {"text": f"text {i}"}} for i in range(3)]
    with load_engine("openai", **CASES["openai"].keys(server)) as engine:
        id = engine.infer_batch(asked)
        until(lambda: engine.get_batch_status(id).status.value != "in_progress")
        found = engine.get_batch_results(id, asked)
        assert [row.values["embedding"].tolist() for row in found] == [vector(f"text {i}").tolist() for i in range(3)]
        with pytest.raises(ConfigError, match="infer_batch takes one task at a time, not chat, embed"):
            engine.infer_batch([*asked, ask("a")])


def test_embeddings_go_in_geminis_own_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    texts = [f"text {i}" for i in range(4)]
    rows: list[Any] = [{"task": "embed", "inputs": {"text": text}} for text in texts]
    with (
        GeminiBatchServer(bad=frozenset(["text 2"])) as gemini,
        load_engine("gemini", model="gemini-embedding-001", base_url=f"{gemini.url}/v1beta/openai") as engine,
    ):
        first, second = (engine.infer_batch(rows, {"dimensions": 4}) for _ in range(2))
        assert engine.get_batch_status(first).status.value == "in_progress"
        until(lambda: engine.get_batch_status(first).status.value == "completed")
        found = engine.get_batch_results(first, rows, {"dimensions": 4})
        for at in (0, 1, 3):
            assert found[at].values["embedding"] == pytest.approx(vector(texts[at], 4))
            assert found[at].cost_usd == pytest.approx(tokens(texts[at]) * 0.075e-6)  # half the live price
        assert found[2].error is not None and found[2].error.type == "bad_request"
        assert [batch.id for batch in engine.list_batches()] == [second, first]
        engine.cancel_batch(second)
        assert engine.get_batch_status(second).status.value == "cancelled"
        assert gemini.keys == {KEY} and gemini.batches["batches/0"]["metadata"]["model"] == "gemini-embedding-001"
        with pytest.raises(ConfigError, match=r"engine=gemini does not support task=chat \(it supports embed\)"):
            engine.infer_batch([ask("a")])
        wire = wire_of(engine, "embed")[1]
        made = gemini.batches[f"batches/{first}"]["metadata"]
        name = Requests(made["displayName"], "m", 4, 1, io.BytesIO)
        assert wire.find(name, None, 0.0, set()) == first and wire.find(name, None, 0.0, {first}) is None
        wire.client.close()


def test_a_program_cancels(case: Case, server: BatchServer) -> None:
    server.delay_s = 60
    with load_engine(case.engine, **case.keys(server)) as engine:
        id = engine.infer_batch(conversations(4))
        engine.cancel_batch(id)
        status = until(lambda: (told := engine.get_batch_status(id)).status.value != "in_progress" and told)
        assert status.status.value == "cancelled"
        results = engine.get_batch_results(id, conversations(4))
    assert {result.error.type for result in results if result.error} <= {"cancelled", "not_found"}


def test_a_batch_of_a_program_has_one_model(server: BatchServer) -> None:
    with (
        load_engine("fireworks", **CASES["fireworks"].keys(server)) as engine,
        pytest.raises(ConfigError, match="one model at a time, not m-1, m-2"),
    ):
        engine.infer_batch([ask("a"), ask("b", model="m-2")])


def test_a_batch_of_a_program_keeps_to_the_declared_limit(server: BatchServer) -> None:
    keys = CASES["openai"].keys(server)
    section = packaged("openai")["provider"]
    provider = {**section, "batch": {**section["batch"], "rows": 2}}
    with (
        load_engine("openai", **keys, provider=provider) as engine,
        pytest.raises(ConfigError, match="holds at most 2 requests .* not 3"),
    ):
        engine.infer_batch(conversations(3))
    assert server.submitted == []


def test_engines_without_a_batch_api_name_those_that_have_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEEPSEEK_API_KEY", KEY)
    able = "anthropic, fireworks, gemini, openai, openai_compatible, parasail, together"
    for engine in (load_engine("echo"), load_engine("deepseek", model="m")):
        with pytest.raises(ConfigError, match=f"engine={engine.kind} has no batch API; these have one: {able}"):
            engine.infer_batch(conversations(1))
    from rich.console import Console

    from pipeline.run import run

    (tmp_path / "in.jsonl").write_text(json.dumps(ask("a")) + "\n")
    config = compose(["engine=echo", f"dataset.path={tmp_path}/in.jsonl", f"output.path={tmp_path}/out", "run.mode=batch"])
    with pytest.raises(ConfigError, match="engine=echo has no batch API"):
        run(config, Console(quiet=True))
