"""A third executor needs a class and a name, and nothing of the run, the output or the monitor knows of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from engines import ConfigError
from jobs.status import main as status_main
from pipeline.configuration.compose import compose
from pipeline.executors import registry
from pipeline.run import STOPPED, WITH_FAILURES, Outcome, run
from tests.support.infer import ask
from tests.support.length_executor import Job, LengthExecutor

Write = Callable[..., Path]


def test_a_third_executor_makes_a_whole_output(
    job: Job, length: type[LengthExecutor], write_jsonl: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl([ask("one", id="a"), ask("three", id="b"), "no json", ask("?", id="c"), ask("one", id="d")])
    outcome = job(data)
    assert outcome.exit_status == WITH_FAILURES and job.answers() == ["3", "5", None, None, "3"]
    manifest = json.loads((job.out / "manifest.json").read_text())
    assert manifest == json.loads(json.dumps(outcome.manifest))
    assert manifest["rows"] == {
        "total": 5, "done": 3, "failed": 2, "invalid": 1, "truncated": 0, "requests": 3, "duplicates": 1,
    }  # fmt: skip
    assert manifest["errors"] == {"invalid_input": 1, "bad_request": 1}
    assert manifest["this_run"] == {"asked": 3, "failed": 1, "requests_sent": 3, "engine_deaths": 0}
    assert manifest["lengths"] == 3 and manifest["batches"] == [] and manifest["cost_usd"] == 0.0
    assert (length.prepared, length.closed) == (1, 1)
    assert "of 5, 2 failed (1 invalid)" in (job.out / "report.html").read_text()
    errors = pq.read_table(job.out / "errors")
    assert [error["type"] for error in errors["error"].to_pylist()] == ["invalid_input", "bad_request"]
    assert not (job.out / "_run.json").exists()
    assert status_main([str(job.out)]) == WITH_FAILURES
    assert "complete, with failed rows" in capsys.readouterr().out


def test_a_run_goes_on_from_its_ledger(job: Job, length: type[LengthExecutor], write_jsonl: Write) -> None:
    data = write_jsonl([ask("one"), ask("?")])
    job(data)
    assert job(data, "run.retry_failed=false").manifest["rows"]["failed"] == 1
    assert length.passes == [2] and "the output is up to date" in job.printed  # it is not read again
    job(data)  # asks what failed
    assert length.passes == [2, 1]
    assert job(data, "run.resume=false").manifest["this_run"]["asked"] == 2


def test_rows_that_an_executor_leaves_out_are_asked_in_another_pass(
    job: Job, length: type[LengthExecutor], write_jsonl: Write
) -> None:
    length.skip_first = ["three"]
    outcome = job(write_jsonl([ask("one"), ask("three"), ask("?")]))
    assert length.passes == [2, 1] and "1 row has no result yet: the missing requests are sent now." in job.printed
    assert job.answers() == ["3", "5", None] and outcome.manifest["this_run"]["asked"] == 3


def test_work_that_goes_on_elsewhere_ends_the_run_without_an_output(
    job: Job, length: type[LengthExecutor], write_jsonl: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    length.unfinished = "the rows are at the post office"
    outcome = job(write_jsonl([ask("one")]))
    assert outcome == Outcome(STOPPED) and not (job.out / "manifest.json").exists()
    assert status_main([str(job.out)]) == STOPPED
    assert "the rows are at the post office" in capsys.readouterr().out


def test_a_mode_that_nobody_registered_is_refused(write_jsonl: Write, tmp_path: Path) -> None:
    data = write_jsonl([ask("a")])
    config = compose([f"dataset.path={data}", f"output.path={tmp_path}/out", "engine=echo", "run.mode=bach"])
    with pytest.raises(ConfigError, match="run.mode=bach is not known.*batch"):
        run(config, Console(quiet=True))
    assert "length" not in registry.EXECUTORS and sys.modules["pipeline.config"].RUN_MODES == ["live", "batch"]
