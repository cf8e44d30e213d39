"""Outputs that an earlier version wrote are read, resumed and finished by this one.

`tests/data/output_v0` was written by commit 7b0ceee (engine=echo, prices 1000 and 2000 US$ per million tokens):
`complete` came to its end; `stopped` was killed while rows were asked. 39 lines: 37 distinct requests, one duplicate, one
line that is no JSON; 12 rows are sampled, 6 of them without an id. The host's name in `stopped/_run.json` was changed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import errors, show, status
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger_index import read_index
from tests.support.infer import Infer

OLD = Path(__file__).parent / "data" / "output_v0"
PRICE = ("engine.price.input=1000", "engine.price.output=2000")
REQUESTS, LINES = 37, 39


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy, in another place than where it was written."""
    return Path(shutil.copytree(OLD, tmp_path / "project"))


def told(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], *args: Any) -> Any:
    capsys.readouterr()
    main([*map(str, args), "--json"])
    return capsys.readouterr().out


def manifest(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((OLD / name / "manifest.json").read_text())
    return found


def test_an_old_complete_output_is_looked_at(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, before = json.loads(told(status.main, capsys, project / "complete")), manifest("complete")
    assert found["state"] == "complete"
    # Its version counted neither truncated answers nor open rows.
    assert (found["rows"], found["cost_usd"]) == (before["rows"] | {"open": 0, "truncated": 0}, before["cost_usd"])
    rows = [json.loads(line) for line in told(show.main, capsys, project / "complete", "--limit", "50").splitlines()]
    assert len(rows) == LINES and sum(row["error"] is not None for row in rows) == 5
    assert errors.main([str(project / "complete")]) == 0


def test_an_old_stopped_output_is_looked_at(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = read_index(*resolve(str(OLD / "stopped")))
    assert 0 < len(index) < REQUESTS and 0 < index.failed.sum() < len(index)
    found = json.loads(told(status.main, capsys, project / "stopped"))
    assert (found["state"], found["rows"]["total"]) == ("stopped", LINES)
    # With the bad line. Its version did not write whether the request of the duplicate has a result.
    assert found["rows"]["done"] + found["rows"]["failed"] == len(index) + 1 and found["rows"]["at_least"]
    rows = told(show.main, capsys, project / "stopped", "--limit", "50").splitlines()
    assert len(rows) == len(index)


def test_an_old_complete_output_asks_nothing_and_costs_what_it_did(infer: Infer, project: Path) -> None:
    infer.out = project / "complete"
    old = pq.read_table(OLD / "complete" / "data")
    outcome = infer(project / "in.jsonl", *PRICE, "run.retry_failed=false")
    before = manifest("complete")
    assert outcome.manifest["this_run"]["asked"] == 0
    assert (outcome.exit_status, outcome.manifest["rows"]) == (3, before["rows"] | {"truncated": 0, "duplicates": 1})
    assert outcome.manifest["cost_usd"] == pytest.approx(before["cost_usd"])
    assert outcome.manifest["tokens"] == {**before["tokens"], "cache_write": 0, "reasoning": 0}
    table: pa.Table = infer.table()
    for name in ("id", "index", "response", "error", "topic"):
        assert table[name].to_pylist() == old[name].to_pylist()
    unknown = {"cache_write": None, "reasoning": None}  # that version did not count them
    assert table["usage"].to_pylist() == [usage and {**usage, **unknown} for usage in old["usage"].to_pylist()]


def test_the_failed_rows_of_an_old_output_are_asked_again(infer: Infer, project: Path) -> None:
    infer.out = project / "complete"
    outcome = infer(project / "in.jsonl", *PRICE)
    assert outcome.manifest["this_run"]["asked"] == manifest("complete")["errors"]["server"]
    assert outcome.manifest["rows"]["failed"] == 1


# `tests/data/keys_v1` has the segments of a run of commit 779e283 (engine=echo): three rows name an image by its path.
KEYS = Path(__file__).parent / "data" / "keys_v1"


@pytest.mark.slow
def test_answers_under_keys_of_an_earlier_version_are_found_unless_an_image_changed_since(
    infer: Infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Path(shutil.copytree(KEYS, tmp_path / "project"))
    monkeypatch.chdir(project)  # the paths in the rows are relative
    infer.out = project / "out"
    images = sorted((project / "images").iterdir())
    for image in images:
        os.utime(image, (1_700_000_000, 1_700_000_000))
    first = infer("in.jsonl").manifest
    assert (first["this_run"]["asked"], first["rows"]["done"], first["rows"]["requests"]) == (0, 4, 4)
    assert "earlier version" not in infer.printed
    (project / "images" / "red.png").write_bytes((project / "images" / "blue.png").read_bytes())
    assert infer("in.jsonl").manifest["this_run"]["asked"] == 1
    assert "1 answer of an earlier version matches no row any more" in infer.printed
    infer("in.jsonl")
    assert "No request was sent" in infer.printed


@pytest.mark.parametrize("retry_failed", [True, False])
def test_an_old_stopped_output_goes_on_without_asking_again(infer: Infer, project: Path, retry_failed: bool) -> None:
    infer.out = project / "stopped"
    index = read_index(*resolve(str(OLD / "stopped")))
    known = len(index) - (int(index.failed.sum()) if retry_failed else 0)
    outcome = infer(project / "in.jsonl", *PRICE, f"run.retry_failed={str(retry_failed).lower()}")
    assert outcome.manifest["this_run"]["asked"] == REQUESTS - known
    done = LINES - 1 - (0 if retry_failed else int(index.failed.sum()))
    assert outcome.manifest["rows"]["done"] == done
    words = sum(len((row["response"] or "").split()) for row in {r["id"]: r for r in infer.rows()}.values())
    words -= 4  # the duplicate, "the same question twice", is paid once
    assert outcome.manifest["cost_usd"] == pytest.approx(words * 3000 / 1e6)
