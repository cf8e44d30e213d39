"""Every surface shows the same counts: the live view, the closing lines, status, show, errors, the report, the manifest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from engines.text import counted
from jobs import errors, show, status
from pipeline.executors.row_counter import RowCounter
from pipeline.monitor.status import RunStatus
from tests.support.infer import ask
from tests.support.outputs import figure
from tests.support.provider_server import ProviderServer
from tests.support.terminal import Terminal

# 40 requests, each of three rows, and a row that cannot be read.
REQUESTS, COPIES = 40, 3
ROWS = REQUESTS * COPIES + 1
REFUSED, RETRIED, CUT = ("text 03", "text 17"), "text 05", "text 07"
FAILED, TRUNCATED = len(REFUSED) * COPIES + 1, COPIES
COUNTS = re.compile(r"([\d,]+) of ([\d,]+)\+? rows done\W+([\d,]+) failed(?:\W+([\d,]+) open)?")


def counts(text: str) -> tuple[int, int, int, int]:
    """The last counts in a text: rows done, all rows, failed and open ones."""
    found = list(COUNTS.finditer(" ".join(re.sub(r"\(.*?\)", "", text).split())))
    assert found, text
    done, rows, failed, open = (int((number or "0").replace(",", "")) for number in found[-1].groups())
    return done, rows, failed, open


class Runs:
    """The command on a terminal, run after run, into one output."""

    def __init__(self, data: Path, out: Path, server: ProviderServer) -> None:
        self.out, self.server, self.sent = out, server, 0
        self.argv = [
            "engine=openai_compatible", "engine.model=m", f"engine.base_url={server.url}", "engine.price.input=1",
            "engine.price.output=1", "engine.max_concurrency=4", "generation.temperature=0", "generation.max_tokens=5",
            "run.flush_s=0.1", f"dataset.path={data}", f"output.path={out}",
        ]  # fmt: skip

    def __call__(self, *more: str, exit_status: int) -> str:
        """Runs it. Checks each frame of the live view. Returns the text after the live view."""
        before = len(self.server.requests)
        terminal = Terminal("jobs.infer", *self.argv, *more, columns=160)
        frames = []

        def look(text: str) -> bool:
            if " rows done" in text and "━" in text:
                frames.append((text, len(self.server.requests)))
            return terminal.shown.endswith("<the end>")

        terminal.until(look)
        assert terminal.end() == exit_status, terminal.text
        assert frames or len(self.server.requests) == before
        for text, asked in frames:
            done, rows, failed, open = counts(text)
            assert done + failed + open == rows
            assert done + failed <= COPIES * asked + 1, text  # no row is done before its request was sent
            in_flight = [int(n) for n in re.findall(r"(\d+) requests? in flight", text)]
            replicas = [int(n) for n in re.findall(r"w\d+ .*? (\d+) in flight", text)]
            assert not replicas or sum(in_flight) == sum(replicas), text  # a frame may be read before it is whole
        self.sent = len(self.server.requests) - before
        return terminal.text


def look_at(job: Any, out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    capsys.readouterr()
    job.main([str(out), *more])
    return capsys.readouterr().out


@pytest.mark.slow
def test_all_surfaces_agree_over_a_budget_stop_and_a_resume(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    data, out = tmp_path / "in.jsonl", tmp_path / "out"
    texts = [f"text {i % REQUESTS:02}" for i in range(REQUESTS * COPIES)]
    data.write_text("".join(json.dumps(ask(text, id=f"r{at}")) + "\n" for at, text in enumerate(texts)) + "no json\n")
    with ProviderServer(latency_s=0.2) as server:
        server.plan = {text: ["400"] * 9 for text in REFUSED} | {RETRIED: ["500"], CUT: ["length"]}
        runs = Runs(data, out, server)
        one = 15 / 1e6  # at most: 10 tokens in, 5 out

        stopped = runs(f"run.budget_usd={20 * one}", exit_status=4)
        assert 0 < runs.sent < REQUESTS
        done, rows, failed, open = counts(stopped)
        assert (rows, done + failed + open) == (ROWS, ROWS) and open > 0
        assert f"This run sent {runs.sent} requests." in stopped
        told = json.loads(look_at(status, out, capsys, "--json"))
        assert [told["rows"][name] for name in ("done", "total", "failed", "open")] == [done, rows, failed, open]
        assert (told["requests_sent"], told["scope"]) == (runs.sent, "this run")
        assert counts(look_at(status, out, capsys)) == (done, rows, failed, open)

        first = runs.sent
        finished = runs(exit_status=3)
        _agree(out, finished, runs.sent, first + runs.sent, capsys)
        again = runs("run.retry_failed=false", exit_status=3)
        assert runs.sent == 0 and "No request was sent: the output is up to date." in again
        _agree(out, again, 0, len(server.requests), capsys)


def _agree(out: Path, closing: str, sent: int, all_sent: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Compares the closing lines of a complete run with the surfaces that read the output."""
    expected = (ROWS - FAILED, ROWS, FAILED, 0)
    assert counts(closing) == expected and f"{TRUNCATED} truncated" in closing
    assert f"This run sent {sent} request" in closing and f"All runs: {all_sent} sent" in closing
    manifest = json.loads((out / "manifest.json").read_text())
    rows = manifest["rows"]
    assert (rows["done"], rows["total"], rows["failed"], 0) == expected
    assert (rows["invalid"], rows["truncated"], rows["requests"]) == (1, TRUNCATED, REQUESTS)
    assert rows["duplicates"] == REQUESTS * (COPIES - 1)
    assert manifest["errors"] == {"bad_request": FAILED - 1, "invalid_input": 1}
    assert manifest["requests_sent"] == all_sent
    shown = look_at(status, out, capsys)
    assert counts(shown) == expected and f"{TRUNCATED} truncated" in shown and f"{all_sent} requests (all runs)" in shown
    assert f"{FAILED - 1} bad_request, 1 invalid_input" in shown
    page = (out / "report.html").read_text()
    assert figure(page, "Rows done") == str(ROWS - FAILED) and figure(page, "Rows truncated") == str(TRUNCATED)
    assert figure(page, "Rows failed") == str(FAILED)
    assert f"of {ROWS}, {FAILED} failed (1 invalid), {rows['duplicates']} duplicates" in page
    assert figure(page, "Requests sent") == str(all_sent)
    last = page[page.index('id="last-run"') :]
    assert figure(last, "Requests sent") == str(manifest["this_run"]["requests_sent"])
    assert f"{FAILED} of {ROWS} rows failed." in look_at(errors, out, capsys)
    chat = look_at(show, out, capsys, "--row", "1")
    assert "r0 · row 1" in chat and "text 00" in chat
    assert look_at(show, out, capsys, "--index", "0") == chat


# -- the counter ------------------------------------------------------------------------------------------------------


def keys(text: str) -> list[bytes]:
    return [letter.encode() * 32 for letter in text]


def test_duplicates_have_the_result_of_their_request_whenever_they_are_read() -> None:
    counted = RunStatus()
    counter = RowCounter(counted)
    counter.read(keys("abc"), keys("aab"))
    assert (counted.duplicates, counted.rows_done, counted.rows_failed) == (3, 0, 0)
    counter.finish(keys("ab"), {keys("b")[0]: "server"}, keys("a"))
    assert (counted.rows_done, counted.rows_failed, counted.rows_truncated) == (3, 2, 3)
    counter.read([], keys("abc"))  # of a, of b, and of c, which has no result yet
    assert (counted.rows_done, counted.rows_failed, counted.rows_truncated) == (4, 3, 4)
    counter.finish(keys("abc"), {}, [])  # the first two have been counted
    assert (counted.rows_done, counted.rows_failed) == (6, 3)
    assert counted.errors == {"server": 3}


def test_a_counter_that_reads_ahead_counts_each_request_once() -> None:
    counted = RunStatus()
    counter = RowCounter(counted, reads_ahead=True)
    counter.read((), keys("aab"))
    counter.finish(keys("ac"), {keys("c")[0]: "server"}, [])
    counter.finish(keys("ac"), {keys("c")[0]: "server"}, [])  # a batch's results that are read again
    assert (counted.rows_done, counted.rows_failed, counted.errors) == (3, 1, {"server": 1})


def test_a_number_and_its_noun_agree() -> None:
    found = [counted(0, "row"), counted(1, "row"), counted(1234, "row"), counted(1.0, "CPU"), counted(0.5, "GPU")]
    assert found == ["0 rows", "1 row", "1,234 rows", "1 CPU", "0.5 GPUs"]
    verbs = ("batch is", "batches are")
    assert [counted(1, *verbs), counted(2, *verbs)] == ["1 batch is", "2 batches are"]
