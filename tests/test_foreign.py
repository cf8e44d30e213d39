"""Files in an output directory that another program wrote, or that are torn: named or passed over, never a crash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from engines.errors import ConfigError
from pipeline.executors.batch.store import Batch, BatchStore
from pipeline.executors.cost_budget import read_spent, write_spent
from pipeline.storage.ledger_index import read_index

OURS = "eagleray-0123abcd-00001"
FOREIGN = {
    "notes.json": "[1, 2]", "torn.json": '{"name": ', "eagleray.json": "{}", "eagleray-xyz-00001.json": "{}",
    "notes.jsonl": "mine", "rows.parquet": "mine", ".keep": "", f".{'0' * 32}.tmp": "",
}  # fmt: skip


def store_of(folder: Path) -> BatchStore:
    return BatchStore(pafs.LocalFileSystem(), str(folder))


def batch_file(folder: Path, text: str) -> Path:
    (folder / "_batches").mkdir(parents=True, exist_ok=True)
    file = folder / "_batches" / f"{OURS}.json"
    file.write_text(text)
    return file


def test_files_among_the_batches_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    made = store_of(tmp_path)
    made.save(Batch(OURS, "m", 1, 1, {}, state="fetched"))
    for name, text in FOREIGN.items():
        (tmp_path / "_batches" / name).write_text(text)
    leftovers = [f"{OURS}.jsonl", f"{OURS}.parquet", f".eagleray-{'0' * 32}.tmp"]
    for name in leftovers:  # of a batch that is done, and of a write that was killed
        (tmp_path / "_batches" / name).write_text("")
    found = store_of(tmp_path)
    assert [batch.name for batch in found.batches] == [OURS]
    found.sweep()
    assert {path.name for path in (tmp_path / "_batches").iterdir()} == {*FOREIGN, f"{OURS}.json"}


@pytest.mark.parametrize(
    "text", ["", '{"name": ', "[]", "3", '{"name": "x"}', '{"other": 1}',
             json.dumps({"name": OURS, "model": "m", "round": 1, "first": 1, "settings": {}, "state": "odd"}),
             json.dumps({"name": OURS, "model": "m", "round": "1", "first": 1, "settings": {}})]
)  # fmt: skip
def test_a_damaged_batch_is_an_error_that_names_its_file(tmp_path: Path, text: str) -> None:
    file = batch_file(tmp_path, text)
    with pytest.raises(
        ConfigError, match=r"_batches/eagleray-0123abcd-00001\.json cannot be read: .*paid.*delete"
    ) as error:
        store_of(tmp_path)
    assert "\n" not in str(error.value)
    assert file.read_text() == text


@pytest.mark.parametrize("content", [None, "not parquet", "other columns"])
def test_damaged_keys_of_a_batch_are_an_error_that_names_their_file(tmp_path: Path, content: str | None) -> None:
    found = store_of(tmp_path)
    batch = Batch(OURS, "m", 1, 1, {}, state="submitted", id="batch_7")
    found.save(batch)
    path = tmp_path / "_batches" / f"{OURS}.parquet"
    if content == "other columns":
        pq.write_table(pa.table({"a": [1]}), path)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"00001\.parquet cannot be read: .*batch_7"):
        found.keys(batch)


@pytest.mark.parametrize("table", [{"a": [1]}, {"key": ["x"], "error": [None], "done_at": ["x"], "usage": [1]}, {}])
def test_a_parquet_file_of_another_program_is_no_segment(tmp_path: Path, table: dict[str, Any]) -> None:
    (tmp_path / "_segments").mkdir()
    named_as_ours = tmp_path / "_segments" / "w1-0123456789ab.parquet"
    for file in (named_as_ours, tmp_path / "_segments" / "theirs.parquet"):
        pq.write_table(pa.table(table), file)
    index = read_index(pafs.LocalFileSystem(), str(tmp_path))
    assert (len(index), index.torn) == (0, [str(named_as_ours)])
    shown = eagleray("status", tmp_path, "--json")
    assert json.loads(shown.stdout)["state"] == "empty", shown.stderr


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"usd": null}', '{"usd": "much"}', '{"usd": -1}', '{"usd": NaN}', "7"])
def test_a_damaged_budget_is_an_error_that_names_its_file(tmp_path: Path, text: str) -> None:
    fs = pafs.LocalFileSystem()
    assert read_spent(fs, str(tmp_path)) == 0
    (tmp_path / "_budget.json").write_text(text)
    with pytest.raises(ConfigError, match=r"_budget\.json cannot be read: .*delete it"):
        read_spent(fs, str(tmp_path))
    write_spent(fs, str(tmp_path), 1.5)
    assert read_spent(fs, str(tmp_path)) == 1.5


def eagleray(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "jobs.cli", *map(str, args)], capture_output=True, text=True, timeout=120)


MANIFEST = {"rows": {}, "config": {}, "files": {}, "finished_at": 0}
RUN = {
    "config": {"engine": {}, "run": {}, "output": {}}, "status": {}, "recent": [[0, 0, 0, 0]], "started_at": 0,
    "began_at": 0, "beat_at": 0, "pid": 1, "host": "h", "phase": "asking", "ended": None,
}  # fmt: skip


@pytest.mark.parametrize("job", ["status", "show", "errors", "diff"])
@pytest.mark.parametrize(
    ("name", "content"),
    [("manifest.json", [1]), ("manifest.json", {"name": "an extension"}), ("manifest.json", {**MANIFEST, "files": 3}),
     ("manifest.json", {**MANIFEST, "config": "x"}), ("manifest.json", {**MANIFEST, "finished_at": "today"}),
     ("_run.json", "text"), ("_run.json", {"a": 1}), ("_run.json", {**RUN, "recent": []}),
     ("_run.json", {**RUN, "config": {}}), ("_run.json", {**RUN, "status": [1]})],
)  # fmt: skip
def test_a_file_of_ours_by_name_only_is_said_in_one_line(
    job: str, name: str, content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib

    (tmp_path / "_segments").mkdir()
    (tmp_path / name).write_text(json.dumps(content))
    paths = [str(tmp_path)] * (2 if job == "diff" else 1)
    assert importlib.import_module(f"jobs.{job}").main(paths) == 2
    shown = capsys.readouterr()
    assert name in shown.err
    assert shown.err.startswith("eagleray: ")
    assert (shown.err.count("\n"), shown.out) == (1, "")


def test_a_manifest_without_figures_is_no_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from jobs.status import main

    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    assert main([str(tmp_path)]) == 2
    assert "manifest.json was not written by Eagleray" in capsys.readouterr().err
