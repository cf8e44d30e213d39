"""Standard input as the dataset, and standard output for the results."""

from __future__ import annotations

import gzip
import io
import json
import os
import pty
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engines.errors import ConfigError, ErrorCode
from jobs import export, plan
from jobs import infer as job
from pipeline.storage.output_files import INPUT
from tests.support.infer import Infer, ask
from tests.support.pages import ROOT

ROWS = [ask("a", note="x"), ask("b", note="y")]
LINES = "\n".join(map(json.dumps, ROWS)).encode() + b"\n"
Pipe = Callable[[bytes], None]


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    """`pipe(data)` makes standard input a pipe with this data."""
    opened = []

    def send(data: bytes) -> None:
        echo = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert echo.stdin is not None and echo.stdout is not None
        echo.stdin.write(data)
        echo.stdin.close()
        opened.append(echo)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(echo.stdout))

    yield send
    for echo in opened:
        assert echo.stdout is not None
        echo.stdout.close()
        echo.wait()


def kept(out: Path) -> list[str]:
    return [path.name for path in (out / INPUT).iterdir()]


# --- standard input ------------------------------------------------------------------------------------------------------


def test_rows_of_standard_input_are_answered_and_kept_for_a_run_that_continues(infer: Infer, pipe: Pipe) -> None:
    pipe(LINES)
    assert infer("-").exit_status == 0
    assert [(row["id"], row["response"], row["note"]) for row in infer.rows()] == [
        ("stdin.jsonl:1", "a", "x"),
        ("stdin.jsonl:2", "b", "y"),
    ]
    (name,) = kept(infer.out)
    assert (infer.out / INPUT / name).read_bytes() == LINES
    # A terminal, and a pipe without data: the rows are those that the output has kept.
    (infer.out / "manifest.json").unlink()
    for data in (b"", LINES):
        pipe(data)
        outcome = infer("-")
        assert (outcome.manifest["this_run"]["asked"], outcome.manifest["rows"]["total"]) == (0, 2)
        assert kept(infer.out) == [name]
    assert outcome.manifest["config"]["dataset"]["path"] == "-"


def test_the_rows_of_an_output_without_parquet_files_are_exported_from_the_copy(
    infer: Infer, pipe: Pipe, tmp_path: Path
) -> None:
    pipe(LINES)
    assert infer("-", "output.format=jsonl").exit_status == 0
    assert export.main([str(infer.out), str(tmp_path / "rows.parquet")]) == 0
    assert pq.read_table(tmp_path / "rows.parquet", columns=["id", "response", "note"]).to_pylist() == [
        {"id": "stdin.jsonl:1", "response": "a", "note": "x"},
        {"id": "stdin.jsonl:2", "response": "b", "note": "y"},
    ]
    for path in (infer.out / INPUT).iterdir():
        path.unlink()
    assert export.main([str(infer.out), str(tmp_path / "more.csv")]) == 2


@pytest.mark.slow
def test_another_input_is_another_dataset(infer: Infer, pipe: Pipe) -> None:
    pipe(LINES)
    infer("-")
    pipe(LINES + LINES)
    with pytest.raises(ConfigError) as refused:
        infer("-")
    assert refused.value.code == ErrorCode.OTHER_DATASET
    before = kept(infer.out)
    pipe(LINES + json.dumps(ask("c")).encode())
    outcome = infer("-", "output.overwrite=true")
    assert (outcome.manifest["this_run"]["asked"], outcome.manifest["rows"]["total"]) == (1, 3)
    assert len(kept(infer.out)) == 1 and kept(infer.out) != before


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "data, ending",
    [
        (b"prompt,n\na,1\nb,2\n", "csv"),
        (b"prompt\tn\na\t1\nb\t2\n", "csv"),
        (gzip.compress(b"prompt,n\na,1\nb,2\n", mtime=0), "csv"),
        (b'[{"prompt": "a", "n": "1"}, {"prompt": "b", "n": "2"}]', "jsonl"),
        (gzip.compress(b'\n{"prompt": "a", "n": "1"}\n{"prompt": "b", "n": "2"}\n', mtime=0), "jsonl"),
        ('{"prompt": "a", "n": "1"}\n{"prompt": "b", "n": "2"}\n'.encode("utf-16"), "jsonl"),
        (parquet([{"prompt": "a", "n": "1"}, {"prompt": "b", "n": "2"}]), "parquet"),
    ],
)
def test_the_kind_of_the_input_is_detected(pipe: Pipe, capsys: Any, data: bytes, ending: str, tmp_path: Path) -> None:
    pipe(data)
    assert plan.main(["engine=echo", "dataset.path=-", "dataset.template={{ prompt }}{{ n }}"]) == 0
    assert "2 in 1 file: 2 requests to send" in " ".join(capsys.readouterr().out.split())


def test_a_terminal_is_one_error(infer: Infer, monkeypatch: pytest.MonkeyPatch) -> None:
    main, other = pty.openpty()
    with os.fdopen(main), os.fdopen(other) as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        with pytest.raises(ConfigError, match="standard input is a terminal: send rows to it") as refused:
            infer("-")
    assert refused.value.code == ErrorCode.INPUT_FILES
    assert not infer.out.exists()


def test_a_dry_run_of_standard_input_writes_nothing(infer: Infer, pipe: Pipe) -> None:
    pipe(LINES)
    assert infer("-", "run.dry_run=true").exit_status == 0
    assert "2 rows in 1 file" in infer.printed and not infer.out.exists()


def test_an_empty_input_is_no_row(infer: Infer, pipe: Pipe) -> None:
    pipe(b"")
    assert infer("-").manifest["rows"]["total"] == 0


# --- standard output -----------------------------------------------------------------------------------------------------


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def to_stdout(*keys: str) -> int:
    return job.main(["engine=echo", "output.path=-", "run.flush_s=0.2", *keys])


def test_results_are_lines_in_input_order_and_nothing_else(
    local_ray: None, pipe: Pipe, capfd: pytest.CaptureFixture[str], temporary: Path
) -> None:
    pipe(LINES + b"{\n" + LINES)
    assert to_stdout("dataset.path=-") == 3
    printed = capfd.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [(row["index"], row["response"]) for row in rows] == [(0, "a"), (1, "b"), (2, None), (3, "a"), (4, "b")]
    assert rows[2]["error"]["type"] == "invalid_input"
    assert "4 of 5 rows done, 1 failed" in printed.err
    assert list(temporary.iterdir()) == []


def test_a_reader_that_closes_the_pipe_gets_no_traceback(
    local_ray: None, pipe: Pipe, capfd: pytest.CaptureFixture[str], temporary: Path
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    before = os.dup(1)
    os.dup2(writer, 1)
    try:
        pipe(LINES)
        assert to_stdout("dataset.path=-") == 0
    finally:
        os.dup2(before, 1)
        os.close(before)
        os.close(writer)
    (folder,) = [path for path in temporary.iterdir() if "stdout" in path.name]
    printed = " ".join(capfd.readouterr().err.split())
    assert f"The reader closed standard output. All rows are in {folder}/data." in printed
    assert "Traceback" not in printed and "Broken" not in printed
    assert len((folder / "data" / "part-00000.jsonl").read_text().splitlines()) == 2


def test_a_run_that_stops_keeps_its_answers_and_says_how_to_continue(
    local_ray: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], temporary: Path
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(json.dumps(ask(f"q{i}")) for i in range(20)))
    assert to_stdout(f"dataset.path={path}", "engine.kwargs.failure_rate=1", "run.max_errors=1") == 4
    printed = capfd.readouterr()
    (folder,) = temporary.iterdir()
    assert printed.out == ""
    command = next(line for line in printed.err.splitlines() if line.startswith("To continue: "))
    assert command.endswith(f"output.path={folder} output.format=jsonl") and "output.path=-" not in command


def test_standard_output_is_for_live_runs_of_one_machine(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], temporary: Path, infer: Infer, tmp_path: Path
) -> None:
    assert to_stdout("dataset.path=in.jsonl", "run.mode=batch") == 2
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert to_stdout("dataset.path=in.jsonl") == 2
    assert "is for small runs on this machine; with the Ray cluster at RAY_ADDRESS" in capfd.readouterr().err
    assert list(temporary.iterdir()) == []


def test_a_disk_that_is_full_stops_the_run(
    local_ray: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], temporary: Path
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(LINES)
    before = os.dup(1)
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        os.dup2(full.fileno(), 1)
        try:
            assert to_stdout(f"dataset.path={path}") == 4
        finally:
            os.dup2(before, 1)
            os.close(before)
    assert "cannot write to standard output (No space left on device)" in " ".join(capfd.readouterr().err.split())


# --- a shell --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_pipeline_of_the_docs_runs_in_a_shell(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "input.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("head -4 ")]
    script = f'eagleray() {{ {sys.executable} -m jobs.cli "$@"; }}; {line}; echo ${{PIPESTATUS[@]}}'
    script = script.replace("log.txt", f"{tmp_path}/log.txt")
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    first, statuses = done.stdout.splitlines()
    assert json.loads(first)["index"] == 0 and statuses == "0 0 0" and done.stderr == ""
    assert "4 of 4 rows done, 0 failed." in (tmp_path / "log.txt").read_text()
