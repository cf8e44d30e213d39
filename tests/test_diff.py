"""`eagleray diff` of typed columns, and of more than two outputs. test_inspect.py has the comparison of two outputs."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import cli, diff
from tests.support.infer import Infer, ask
from tests.support.pages import ROOT, commands

Write = Callable[..., Path]
SCHEMA = json.dumps({
    "type": "object",
    "properties": {"stars": {"type": "number"}, "mood": {"type": "string"}, "why": {"type": "string"},
                   "good": {"type": ["boolean", "null"]}},
})  # fmt: skip
KEYS = (f"generation.response_format={SCHEMA}", "output.columns=schema")
STARS = {"a": [1, 2, 3, 4, 5, 5], "b": [1, 3, 3, 5, 5, 4], "c": [1, 2, 3, 4, 5, 5]}
MOODS = {"a": "calm calm angry angry calm calm", "b": "calm angry angry angry calm calm", "c": "calm " * 6}


def told(capsys: pytest.CaptureFixture[str], *argv: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert diff.main([*map(str, argv), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def shown(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    capsys.readouterr()
    assert diff.main([*map(str, argv)]) == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def outs(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three outputs of scored tables. Their rows have other orders, and `b` and `c` have a row more. `c` is JSONL."""
    folder = tmp_path_factory.mktemp("scored")
    found = {}
    for name in "abc":
        rows = []
        for at, (stars, mood) in enumerate(zip(STARS[name], MOODS[name].split(), strict=True)):
            good = None if name == "b" and at == 0 else stars > 3
            answer = json.dumps({"stars": stars, "mood": mood, "why": f"{name} {at}", "good": good})
            rows.append(ask(answer, id=f"r{at}", shop="Lyon"))
        if name != "a":
            rows = [*reversed(rows), ask('{"stars": 1}', id=f"more-{name}")]
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        infer = Infer(folder / name)
        infer(data, *KEYS, *(["output=jsonl"] if name == "c" else []))
        found[name] = infer.out
    return found


def test_numbers_and_labels_of_two_outputs_are_compared(outs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    columns = told(capsys, outs["a"], outs["b"])["columns"]
    assert list(columns) == ["stars", "mood", "why", "good"]
    stars = columns["stars"]
    assert (stars["kind"], stars["rows"], stars["agreement"]) == ("number", 6, 0.5)
    assert stars["means"] == pytest.approx([20 / 6, 21 / 6])
    (pair,) = stars["pairs"]
    assert pair["mean_difference"] == pytest.approx(1 / 6) and pair["mean_absolute_difference"] == pytest.approx(0.5)
    assert pair["correlation"] == pytest.approx(0.8883, abs=1e-4)
    mood = columns["mood"]
    assert (mood["kind"], mood["agreement"]) == ("label", pytest.approx(5 / 6))
    assert mood["pairs"][0]["confusion"] == [
        {"values": ["angry", "angry"], "rows": 2}, {"values": ["calm", "angry"], "rows": 1},
        {"values": ["calm", "calm"], "rows": 3},
    ]  # fmt: skip
    assert (columns["why"]["kind"], columns["why"]["agreement"]) == ("text", 0)
    assert "confusion" not in columns["why"]["pairs"][0]
    good = columns["good"]  # a row without a value in one output is not compared
    assert (good["kind"], good["rows"], good["without_value"], good["agreement"]) == ("label", 5, 1, 1.0)
    printed = shown(capsys, outs["a"], outs["b"], "--limit", "0")
    assert "stars (number): 50.0% agreement of 6 rows" in printed and "+0.1667" in printed and "0.8883" in printed
    assert "good (label): 100.0% agreement of 5 rows, 1 more lack a value" in printed
    assert [line.split() for line in printed.splitlines() if line.startswith(("A \\ B", "calm"))] == [
        ["A", "\\", "B", "1", "2", "3", "4", "5"], ["A", "\\", "B", "angry", "calm"], ["calm", "1", "3"],
        ["A", "\\", "B", "false", "true"],
    ]  # fmt: skip


def test_more_than_two_outputs_are_compared(outs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, outs["a"], outs["b"], outs["c"], "--limit", "1")
    assert found["matched_by"] == "id"
    assert found["rows"] == {
        "in_all": 6, "answered_in_all": 6, "equal": 0, "differ": 6, "failed_in_some": 0, "failed_in_all": 0,
    }  # fmt: skip
    assert [(out["output"], out["rows"], out["only_here"]) for out in found["outputs"]] == [
        (str(outs["a"]), 6, 0), (str(outs["b"]), 7, 1), (str(outs["c"]), 7, 1),
    ]  # fmt: skip
    stars = found["columns"]["stars"]
    assert stars["agreement"] == 0.5
    assert [(p["outputs"], p["agreement"], p["mean_difference"]) for p in stars["pairs"]] == [
        ([0, 1], 0.5, pytest.approx(1 / 6)), ([0, 2], 1.0, 0), ([1, 2], 0.5, pytest.approx(-1 / 6)),
    ]  # fmt: skip
    assert [set(row) for row in found["shown"]] == [{"A", "B", "C"}]
    assert [found["shown"][0][letter]["id"] for letter in "ABC"] == ["r0"] * 3
    assert set(found["settings"]) == {"dataset.path"}
    printed = shown(capsys, outs["a"], outs["b"], outs["c"], outs["a"], "--limit", "1", "--column", "mood")
    assert "6 rows in all" in printed and "equal answers" in printed and "5 more rows differ" in printed
    assert "A D  {" in printed and "mood (label): 50.0% agreement of 6 rows" in printed and "stars (" not in printed


@pytest.mark.slow
def test_a_row_that_failed_in_one_of_several_outputs_differs(
    outs: dict[str, Path], infer: Infer, write_jsonl: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (outs["a"].parent / "a.jsonl").read_text().splitlines()]
    infer(write_jsonl([rows[0], {**rows[1], "generation": {"temperature": -1}}]), *KEYS)
    found = told(capsys, outs["a"], infer.out, outs["a"])
    assert (found["rows"]["equal"], found["rows"]["failed_in_some"]) == (1, 1)
    assert [row["A"]["id"] for row in found["shown"]] == ["r1"]
    assert [(pair["answered"], pair["equal"]) for pair in found["pairs"]] == [(1, 1), (2, 2), (1, 1)]
    assert found["columns"]["stars"]["rows"] == 1
    printed = shown(capsys, outs["a"], infer.out, outs["a"])
    assert "A C  {" in printed and "B    (invalid_input: " in printed


def test_columns_of_a_run_that_is_not_complete_come_from_its_answers(
    outs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(outs["b"], copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    state = {"phase": "asking", "pid": 1, "host": "elsewhere", "started_at": 1.0, "began_at": 1.0, "beat_at": 1.0,
             "status": {}, "recent": [[1.0, 0, 0, 0]], "ended": "stopped", "config": manifest["config"]}  # fmt: skip
    (copy / "_run.json").write_text(json.dumps(state))
    (copy / "manifest.json").unlink()
    whole, part = (told(capsys, outs["a"], out)["columns"] for out in (outs["b"], copy))
    assert part == whole


def test_any_column_can_be_named(outs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, outs["a"], "--column", "shop", outs["b"], "--column", "finish_reason")["columns"]
    assert {name: (column["kind"], column["agreement"]) for name, column in found.items()} == {
        "shop": ("label", 1.0), "finish_reason": ("label", 1.0),
    }  # fmt: skip
    assert diff.main([str(outs["a"]), str(outs["b"]), "--column", "star"]) == 2
    assert "--column star: there is no column 'star' (did you mean 'stars'?)" in capsys.readouterr().err


def test_labels_with_control_characters_reach_no_terminal(
    infer: Infer, write_jsonl: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    infer(write_jsonl([ask(json.dumps({"mood": "\x1b[31m[red]\u202e"}), id=f"{i}") for i in range(2)]), *KEYS)
    printed = shown(capsys, infer.out, infer.out) + shown(capsys, *[infer.out] * 3)
    assert "\\x1b[31m[red]" in printed and not {"\x1b", "\u202e"} & set(printed)


def test_the_commands_of_the_page_on_looking_run(
    outs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    Path("out").mkdir()
    for name, source in {"first": "a", "other": "b", "a": "a", "b": "b", "c": "c"}.items():
        Path("out", name).symlink_to(outs[source])
    elsewhere = {"localhost", "wait"}  # a server, and a run that others make
    found = [c for c in commands(ROOT / "docs" / "looking.md") if not elsewhere & set(re.split(r"\W", c.text))]
    assert {command.job for command in found} >= {"engines", "models", "cost", "diff", "export"}
    for command in found:
        argv = [path for word in command.words[1:] for path in (sorted(map(str, Path().glob(word))) or [word])]
        monkeypatch.setattr(sys, "argv", ["eagleray", *itertools.takewhile(lambda word: word != "|", argv)])
        assert cli.main() == (3 if command.job == "models" else 0), command
        assert "".join(capsys.readouterr())
