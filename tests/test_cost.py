"""`eagleray cost`: the sums of several runs. An unknown cost is reported, and never counted as 0."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.errors import Failure
from engines.types import Choice, Completion, answer
from engines.usage import Usage
from jobs import cost
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger import Record, list_segments, write_segment
from tests.support.infer import Infer, ask
from tests.support.provider_server import ProviderServer

Write = Callable[..., Path]
DAY = 1_772_323_200.0  # 2026-03-01T00:00:00Z


def told(capsys: pytest.CaptureFixture[str], *argv: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert cost.main([*map(str, argv), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def record(number: int, usd: float | None, at: float, model: str | None = "m-1", **more: Any) -> Record:
    error = None if model else Failure("server", "broken")
    choices = [] if error else [Choice(answer("x", None), "stop")]
    completion = Completion(choices, Usage(10, 4, 2), model, "openai", error=error, cost_usd=usd)
    return Record(number.to_bytes(8, "big") * 4, f"r{number}", completion, at, **more)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """An output whose ledger has live answers and those of batches, of two days and two models, and a try that was paid."""
    fs, root = resolve(str(tmp_path / "ledger"))
    write_segment(fs, root, "w1", [record(1, 1.0, DAY), record(2, 2.0, DAY + 86_400), record(3, 4.0, DAY, "m-2")])
    write_segment(fs, root, "w1", [record(4, 8.0, DAY, superseded=True), record(4, 16.0, DAY + 1)])
    write_segment(fs, root, "batch", [record(5, 0.5, DAY), record(6, None, DAY, None)])
    return tmp_path / "ledger"


def test_costs_are_added_by_lane_model_and_day(ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, ledger, "--by", "lane,model,day")
    groups = {tuple(g[name] for name in found["by"]): (g["requests"], g["cost_usd"]) for g in found["groups"]}
    assert groups == {
        ("batch", None, "2026-03-01"): (1, None),  # unknown, not 0
        ("batch", "m-1", "2026-03-01"): (1, 0.5),
        ("live", "m-1", "2026-03-01"): (2, 25.0),  # with the superseded try
        ("live", "m-1", "2026-03-02"): (1, 2.0),
        ("live", "m-2", "2026-03-01"): (1, 4.0),
    }
    total = found["total"]
    assert (total["requests"], total["cost_usd"], total["cost_known_usd"]) == (6, None, 31.5)
    assert (total["cost_unknown_requests"], total["tokens"]) == (1, {"input": 70, "cached_input": 28, "output": 14})
    assert found["runs"] == [{"output": str(ledger), "state": "stopped", "requests_in_batches": 0}]
    assert cost.main([str(ledger), "--by", "lane"]) == 0
    printed = capsys.readouterr().out
    assert "0.5000 + unknown" in printed and "31.50 + unknown" in printed
    assert "The cost of 1 request is unknown and not in the sums of US$." in printed
    assert cost.main([str(ledger), "--by", "model"]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("-")] == ["unknown"]


def test_a_record_counts_once_while_segments_are_merged(ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = told(capsys, ledger)["total"]
    fs, root = resolve(str(ledger))
    path = next(path for path in list_segments(fs, root) if "/w1-" in path)
    shutil.copy(path, path.replace("/w1-", "/w2-"))  # as a merged segment, before the old ones are removed
    (ledger / "_segments" / f"w3-{'0' * 12}.parquet").write_bytes(b"torn")
    assert told(capsys, ledger)["total"] == before


@pytest.mark.slow
def test_several_runs_are_added_and_each_counts_once(
    infer: Infer, write_jsonl: Write, server: ProviderServer, ledger: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data = write_jsonl([ask(f"question {i}", id=f"r{i}") for i in range(5)])
    infer(data, "engine.price.input=10", "engine.price.output=1000")
    unpriced = Infer(tmp_path / "unpriced")
    url = f"engine.base_url={server.url}/v1"
    unpriced(data, url, "engine.model=m", engine="openai_compatible")
    manifest = json.loads((infer.out / "manifest.json").read_text())
    found = told(capsys, infer.out, unpriced.out, f"{infer.out}/", ledger, "--by", "run,engine")
    groups = {group["run"]: group for group in found["groups"]}
    assert list(groups) == [f"{infer.out}/", str(unpriced.out), str(ledger)]  # in the order of the arguments
    mine, other = groups[f"{infer.out}/"], groups[str(unpriced.out)]
    assert (mine["engine"], mine["requests"]) == ("echo", 5)
    assert mine["cost_usd"] == pytest.approx(manifest["spent_usd"]) and mine["cost_usd"] > 0
    assert (other["cost_usd"], other["cost_unknown_requests"]) == (None, 5)
    assert found["total"]["cost_known_usd"] == pytest.approx(manifest["spent_usd"] + 31.5)
    assert {run["state"] for run in found["runs"]} == {"complete", "stopped"}
    # Without its ledger, an output has the sums of its manifest.
    shutil.rmtree(infer.out / "_segments")
    (group,) = told(capsys, infer.out)["groups"]
    assert (group["model"], group["lane"], group["requests"]) == ("echo", None, 5)
    assert group["cost_usd"] == pytest.approx(manifest["cost_usd"])


def test_an_old_ledger_without_costs_is_of_unknown_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow.parquet as pq

    fs, root = resolve(str(tmp_path / "old"))
    path = write_segment(fs, root, "w1", [record(1, 1.0, DAY)])
    table = pq.read_table(path).drop_columns(["cost_usd", "superseded"])
    pq.write_table(table, path)
    total = told(capsys, tmp_path / "old")["total"]
    assert (total["cost_usd"], total["cost_known_usd"], total["cost_unknown_requests"]) == (None, 0, 1)
    old = Path(__file__).parent / "data" / "output_v0" / "complete"  # its manifest has the cost
    (group,) = told(capsys, old)["groups"]
    manifest = json.loads((old / "manifest.json").read_text())
    assert (group["cost_usd"], group["requests"]) == (manifest["cost_usd"], 37) and group["cost_usd"] > 0


def test_hostile_names_reach_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fs, root = resolve(str(tmp_path / "out"))
    write_segment(fs, root, "w1", [record(1, 1.0, time.time(), "\x1b[31mred\u202egnp [bold]x[/bold]")])
    assert cost.main([str(tmp_path / "out"), "--by", "model"]) == 0
    printed = capsys.readouterr().out
    assert "\\x1b[31mred" in printed and "[bold]x" in printed and not {"\x1b", "\u202e"} & set(printed)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "missing: OUT"),
        (["nowhere"], "there is no directory nowhere"),
        (["."], ". is not an output directory of Eagleray"),
        (["x", "--by", "modle"], "there is no 'modle'; choose from run, lane, engine, model, day"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    argv: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cost.main(argv) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out
