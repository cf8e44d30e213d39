"""`eagleray export`: the finished rows of a run that is not complete, in input order, in one file."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from jobs import export
from jobs.infer import saved_config
from pipeline.configuration.compose import compose
from pipeline.errors import Stopped
from pipeline.output.export import LedgerExport
from pipeline.run import run
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger import list_segments
from tests.support.infer import Infer, ask
from tests.support.terminal import Terminal

Write = Callable[..., Path]
SCHEMA = '{"type": "object", "properties": {"stars": {"type": "integer"}}}'
ROWS = 600


@pytest.fixture(scope="module")
def stopped(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Infer:
    """An output of a run that stopped early: some rows have an answer, some failed, most are open, one cannot be read."""
    folder = tmp_path_factory.mktemp("stopped")
    rows = [
        json.dumps(ask(json.dumps({"stars": n % 5, "n": n}), id=f"r{n}", note=f"n, {n}\n", tags=["a", n]))
        for n in range(ROWS)
    ]
    (folder / "in.jsonl").write_text("\n".join([*rows[:7], "no json", *rows[7:]]) + "\n")
    infer = Infer(folder / "out")
    keys = (f"generation.response_format={SCHEMA}", "output.columns=schema", "engine.kwargs.latency_s=0.2",
            "engine.max_concurrency=4", "engine.kwargs.failure_rate=0.3", "run.max_errors=3")  # fmt: skip
    with pytest.raises(Stopped, match=r"run\.max_errors is 3"):
        infer(folder / "in.jsonl", *keys)
    return infer


def told(capsys: pytest.CaptureFixture[str], *argv: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert export.main([*map(str, argv), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_finished_rows_of_a_stopped_run_are_those_of_the_complete_output(
    stopped: Infer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path for path in stopped.out.rglob("*") if path.is_file())
    found = {form: tmp_path / f"rows.{form}" for form in ("jsonl", "parquet", "csv")}
    counts = {form: told(capsys, stopped.out, path)["rows"] for form, path in found.items()}
    assert counts["jsonl"] == counts["parquet"] == counts["csv"]
    done, failed, left = (counts["csv"][name] for name in ("done", "failed", "open"))
    assert counts["csv"]["total"] == ROWS + 1 == done + failed + left and done >= 4 and failed >= 4 and left > 50
    assert sorted(path for path in stopped.out.rglob("*") if path.is_file()) == before

    copy = Infer(tmp_path / "copy")
    shutil.copytree(stopped.out, copy.out)
    keys = ["engine.kwargs.latency_s=0", "run.max_errors=null", "engine.kwargs.failure_rate=0"]
    run(compose(keys, saved=saved_config(str(copy.out))), Console(quiet=True))
    whole = copy.table()
    parquet = pq.read_table(found["parquet"])
    assert parquet.schema == whole.schema
    rows = parquet.to_pylist()
    assert [row["index"] for row in rows] == sorted(row["index"] for row in rows) and len(rows) == done + failed
    answered = [row for row in rows if row["error"] is None]
    by_index = {row["index"]: row for row in whole.to_pylist()}
    assert answered == [by_index[row["index"]] for row in answered]
    assert [row["error"]["type"] for row in rows if row["index"] == 7] == ["invalid_input"]

    lines = [json.loads(line) for line in found["jsonl"].read_text().splitlines()]
    assert [line["index"] for line in lines] == [row["index"] for row in rows]
    first = next(line for line in lines if line["error"] is None)
    assert first["tags"] == ["a", int(first["id"][1:])] and first["messages"][-1]["role"] == "assistant"
    with found["csv"].open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert [int(cell["index"]) for cell in cells] == [row["index"] for row in rows]
    for cell, row in zip(cells, rows, strict=True):
        assert cell["response"] == (row["response"] or "") and cell["note"] == (row["note"] or "")
        assert cell["error.type"] == (row["error"]["type"] if row["error"] else "")
        if row["error"] is None:
            assert int(cell["stars"]) == row["stars"] and int(cell["usage.output"]) == row["usage"]["output"]


def test_failed_rows_can_be_left_out(stopped: Infer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = told(capsys, stopped.out, tmp_path / "done.parquet", "--done")["rows"]
    table = pq.read_table(tmp_path / "done.parquet")
    assert len(table) == counts["done"] and table["error"].null_count == len(table)


def test_segments_that_are_merged_meanwhile_lose_no_row(stopped: Infer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(stopped.out, out)
    fs, root = resolve(str(out))
    reader = LedgerExport(compose([], saved=saved_config(str(out))), fs, root, Console(quiet=True))
    for number, path in enumerate(list_segments(fs, root)):  # as a merge leaves them
        Path(path).rename(Path(path).with_name(f"merged-{number:012x}.parquet"))
    ids = [id for rows in reader.rows() for id in rows.table["id"].to_pylist()]
    assert len(ids) == len(set(ids)) == reader.count.done + reader.count.failed > 8


def test_rows_with_one_id_are_exported_each_with_its_own_answer(
    infer: Infer, tmp_path: Path, capsys: pytest.CaptureFixture[str], write_jsonl: Write
) -> None:
    rows = [ask("the same", id="x", generation={"temperature": 1.0}) for _ in range(4)]
    data = [write_jsonl(rows[:3], "a.jsonl"), write_jsonl(rows[3:], "b.jsonl")]
    infer(f"[{data[0]},{data[1]}]", "output=jsonl")  # so the rows come from the ledger, although the output is complete
    assert told(capsys, infer.out, tmp_path / "rows.jsonl")["rows"] == {"total": 4, "done": 4, "failed": 0, "open": 0}
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2, 3] and len({line["latency_s"] for line in lines}) == 4


@pytest.mark.slow
def test_a_complete_output_is_exported_without_its_input(
    infer: Infer, tmp_path: Path, capsys: pytest.CaptureFixture[str], write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl([ask("a", id="a", meta={"k": 1}), "no json", ask("b", id="b")])
    infer(data)
    oumi = Infer(tmp_path / "oumi")
    oumi(data, "output=jsonl", "output.style=oumi")
    moved = data.rename(tmp_path / "moved.jsonl")
    monkeypatch.chdir(tmp_path)
    assert export.main([str(infer.out)]) == 0
    assert "out.csv: 2 of 3 rows done, 1 failed." in capsys.readouterr().out
    assert (tmp_path / "out.csv").read_text().splitlines()[1].startswith('"a",0,')
    found = told(capsys, infer.out, "rows.jsonl")
    assert found == {"output": str(infer.out), "file": "rows.jsonl", "format": "jsonl", "complete": True,
                     "rows": {"total": 3, "done": 2, "failed": 1, "open": 0}}  # fmt: skip
    lines = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a", "in.jsonl:2", "b"] and lines[0]["messages"][-1]["content"] == "a"
    # JSON lines in another style have no types: the input is read again, from another place if that is said.
    assert export.main([str(oumi.out), "oumi.parquet"]) == 2
    assert "in.jsonl" in capsys.readouterr().err and not Path("oumi.parquet").exists()
    assert told(capsys, oumi.out, "oumi.parquet", f"dataset.path={moved}")["rows"]["done"] == 2
    assert pq.read_table("oumi.parquet")["id"].to_pylist() == ["a", "moved.jsonl:2", "b"]


def test_a_store_gets_the_whole_file(stopped: Infer, capsys: pytest.CaptureFixture[str]) -> None:
    import fsspec

    told(capsys, stopped.out, "memory://export/rows.csv")
    assert fsspec.filesystem("memory").cat("/export/rows.csv").startswith(b'"id","index"')
    assert export.main([str(stopped.out), "memory://export/rows.csv"]) == 2
    assert "memory://export/rows.csv exists" in capsys.readouterr().err


def test_a_file_that_exists_is_replaced_only_if_that_is_said(
    stopped: Infer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("mine")
    assert export.main([str(stopped.out), str(file)]) == 2
    assert "mine.csv exists: name another file, or add --overwrite to replace it" in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert export.main([str(stopped.out), str(file), "--overwrite"]) == 0
    assert file.read_text().startswith('"id"') and [path.name for path in tmp_path.iterdir()] == ["mine.csv"]


def test_a_secret_that_shapes_answers_must_be_given_again(
    infer: Infer, tmp_path: Path, capsys: pytest.CaptureFixture[str], write_jsonl: Write
) -> None:
    infer(write_jsonl([ask("a", id="a")]), "engine.extra_body.user.token=secret", "engine.headers.authorization=secret")
    (infer.out / "data" / "part-00000.parquet").unlink()
    manifest = json.loads((infer.out / "manifest.json").read_text())
    (infer.out / "manifest.json").write_text(json.dumps({**manifest, "files": {"data/x.jsonl": 1}}))
    assert export.main([str(infer.out), str(tmp_path / "x.csv")]) == 2
    assert "add engine.extra_body.user.token=…" in capsys.readouterr().err
    found = told(capsys, infer.out, tmp_path / "x.csv", "engine.extra_body.user.token=secret")
    assert found["rows"]["done"] == 1
    found = told(capsys, infer.out, tmp_path / "y.csv", "engine.extra_body.user.token=other")
    assert found["rows"] == {"total": 1, "done": 0, "failed": 0, "open": 1}
    assert export.main([str(infer.out), str(tmp_path / "z.csv"), "engine.extra_body.user.token=other"]) == 0
    assert "No answer in the ledger belongs to a row of this input." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "missing: OUT"),
        (["nowhere"], "there is no directory nowhere"),
        (["{out}", "x.xls"], "--format is missing: the name of x.xls ends with none of .csv, .jsonl, .parquet"),
        (["{out}", "{out}/data/x.csv"], "is inside the output, where only Eagleray's own files belong"),
        (["{out}", "--format", "xls"], "argument --format: invalid choice: 'xls'"),
        (["{out}", "-", "--json"], "--json and the rows cannot both go to standard output"),
        (["{out}", "a.csv", "b.csv"], "unexpected argument b.csv"),
        (["{out}", "a.csv", "dataset.pth=x"], "did you mean 'dataset.path'?"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    argv: list[str], said: str, stopped: Infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert export.main([word.format(out=stopped.out) for word in argv]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out and not list(tmp_path.iterdir())


def test_rows_go_to_a_pipe_and_never_to_a_terminal(stopped: Infer) -> None:
    words = ["jobs.export", str(stopped.out), "-", "--format", "jsonl"]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) > 8 and "standard output: " in done.stderr
    terminal = Terminal(*words)
    assert terminal.end() == 2 and "rows are not written to a terminal" in terminal.text and "r0" not in terminal.text
