"""Rare states of an output directory: a moved working directory, two runs that start together, damaged and foreign files,
and outputs of earlier versions that were killed near their end."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from engines.errors import ConfigError, ErrorCode
from pipeline.executors.cost_budget import read_spent
from pipeline.output.jsonl_styles import STYLES
from pipeline.output.ownership import NEW, OLD, Ownership
from pipeline.storage.filesystem import write_if_absent
from pipeline.storage.output_files import BUDGET, MARKER
from tests.support.infer import Infer
from tests.test_ownership import OLD_OUTPUTS, line, look, put


def marker(out: Path) -> Any:
    return json.loads((out / MARKER).read_text())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- the working directory is another one -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_job_that_is_submitted_again_resumes_from_its_new_copy_of_the_working_directory(
    infer: Infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = [tmp_path / f"session_{n}" / f"_ray_pkg_{n}23abc" for n in (1, 2)]
    for folder in (*copies, tmp_path / "a", tmp_path / "b"):
        put(folder, {"in.jsonl": line("a"), "other.jsonl": line("a")})
    monkeypatch.chdir(copies[0])
    infer("in.jsonl")
    assert marker(infer.out)["dataset"] == "ray-working-dir://in.jsonl"
    monkeypatch.chdir(copies[1])
    assert infer("in.jsonl").manifest["this_run"]["asked"] == 0
    with pytest.raises(ConfigError, match="another dataset"):
        infer("other.jsonl")
    monkeypatch.chdir(tmp_path / "a")  # a file of the same name elsewhere is another dataset
    with pytest.raises(ConfigError, match="another dataset"):
        infer("in.jsonl")


# -- two runs start in one new directory ------------------------------------------------------------------------------


def first_of_two(tmp_path: Path) -> tuple[Ownership, Path]:
    """Two runs look at a new directory. The first begins, gets the lock and has an answer. Returns the second."""
    put(tmp_path, {"a.jsonl": line("a"), "b.jsonl": line("b")})
    out = tmp_path / "out"
    a, b = look(tmp_path / "a.jsonl", out), look(tmp_path / "b.jsonl", out)
    assert a.state == b.state == NEW
    a.begin()
    look(tmp_path / "a.jsonl", out).settle()
    return b, out


def test_a_run_that_comes_second_keeps_the_marker_of_the_first(tmp_path: Path) -> None:
    b, out = first_of_two(tmp_path)
    before = (out / MARKER).read_bytes()
    b.begin()
    assert (out / MARKER).read_bytes() == before and names(out) == [MARKER]
    put(out, {"_segments/w1-0123456789ab.parquet": ""})
    with pytest.raises(ConfigError, match=r"another dataset \(.*a.jsonl\)"):  # b got the lock after the end of a
        look(tmp_path / "b.jsonl", out)
    assert look(tmp_path / "a.jsonl", out).marked["dataset"] == os.path.realpath(tmp_path / "a.jsonl")


def test_a_run_that_comes_second_takes_a_directory_without_answers(tmp_path: Path) -> None:
    b, out = first_of_two(tmp_path)
    b.begin()
    look(tmp_path / "b.jsonl", out).settle()
    assert marker(out)["dataset"] == os.path.realpath(tmp_path / "b.jsonl")


def test_a_run_writes_no_marker_into_a_directory_that_is_no_longer_empty(tmp_path: Path) -> None:
    put(tmp_path, {"a.jsonl": line("a")})
    own = look(tmp_path / "a.jsonl", tmp_path / "out")
    put(tmp_path, {"out/notes.txt": "n"})
    with pytest.raises(ConfigError, match=r"is not empty, and is not an output of Eagleray \(it contains notes.txt\)"):
        own.begin()
    assert names(tmp_path / "out") == ["notes.txt"]


def test_of_two_writers_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "new" / "x")
    for data in (b"1", b"2"):
        write_if_absent(path, data)
    assert Path(path).read_bytes() == b"1" and names(tmp_path / "new") == ["x"]

    def no_links(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)  # as on exFAT
    for name, expected in (("x", b"1"), ("y", b"2")):
        write_if_absent(str(tmp_path / "new" / name), b"2")
        assert (tmp_path / "new" / name).read_bytes() == expected
    assert names(tmp_path / "new") == ["x", "y"]


# -- damaged and foreign files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ['{"usd', "[]", "mine"])
def test_a_damaged_budget_file_stops_only_runs_with_a_budget(tmp_path: Path, content: str) -> None:
    put(tmp_path, {"in.jsonl": line("a")})
    out = tmp_path / "out"
    look(tmp_path / "in.jsonl", out).begin()
    put(out, {BUDGET: content})
    own = look(tmp_path / "in.jsonl", out)  # a run without a budget goes on
    own.clear()  # of run.resume=false
    assert (out / BUDGET).read_text() == content
    with pytest.raises(ConfigError, match=r"_budget\.json cannot be read: it says how many US dollars"):
        read_spent(own.fs, own.root)
    (out / BUDGET).write_text('{"usd": 1}')
    own.clear()
    assert not (out / BUDGET).exists()


# -- outputs of before the marker -------------------------------------------------------------------------------------


def old_output(tmp_path: Path, parts: dict[str, str]) -> Path:
    """An output of before the marker, killed between its parts and its manifest."""
    shutil.copytree(OLD_OUTPUTS / "complete" / "_segments", tmp_path / "out" / "_segments")
    put(tmp_path / "out", parts)
    return tmp_path / "out"


@pytest.mark.parametrize("style", sorted(STYLES))
def test_parts_in_each_style_are_eaglerays(tmp_path: Path, style: str) -> None:
    rows = pq.read_table(OLD_OUTPUTS / "complete" / "data").to_pylist()
    failed = next(row for row in rows if row["error"] is not None)
    parts = {f"data/part-{i:05d}.jsonl": json.dumps(STYLES[style](row)) + "\n" for i, row in enumerate((rows[0], failed))}
    parts["errors/part-00000.jsonl"] = json.dumps(failed) + "\n"
    out = old_output(tmp_path, parts)
    more = () if style == "eagleray" else (f"output.style={style}",)
    own = look(OLD_OUTPUTS / "in.jsonl", out, "output.format=jsonl", *more)
    assert own.state == OLD and own.files == set(parts)


def test_a_part_with_a_long_first_line_is_eaglerays(tmp_path: Path) -> None:
    parts = {"data/part-00000.jsonl": json.dumps({"prompt": "x" * 2**20}) + "\n"}
    mine = {
        "data/part-00001.jsonl": "x" * 2**21, "data/part-00002.jsonl": line("short"), "data/notes.jsonl": "{" * 2**21,
    }  # fmt: skip
    out = old_output(tmp_path, parts | mine)
    assert look(OLD_OUTPUTS / "in.jsonl", out, "output.format=jsonl").files == set(parts)


def test_an_old_output_with_a_foreign_marker_is_refused(tmp_path: Path) -> None:
    out = old_output(tmp_path, {MARKER: '{"mine": 1}'})
    with pytest.raises(ConfigError, match="_eagleray.json was not written by Eagleray and would be overwritten") as raised:
        look(OLD_OUTPUTS / "in.jsonl", out)
    assert raised.value.code == ErrorCode.FILE_IN_THE_WAY
    (out / MARKER).unlink()
    assert look(OLD_OUTPUTS / "in.jsonl", out).state == OLD
