"""`eagleray wait`: a job that reads the output of another job starts when that output is complete."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.wait import main as wait
from pipeline.configuration.compose import compose
from pipeline.monitor.run_state import keep_run_state
from pipeline.storage.filesystem import child, resolve
from pipeline.storage.lock import run_lock
from pipeline.storage.output_files import STATE
from tests.support.infer import Infer, ask
from tests.support.pages import ROOT
from tests.support.processes import PATIENCE_S
from tests.support.s3_server import S3Server

Write = Callable[..., Path]
CapSys = pytest.CaptureFixture[str]


class Waiter(threading.Thread):
    """`eagleray wait` beside a run; `found` are the files of the output when the command ended."""

    def __init__(self, *args: str, out: Path) -> None:
        super().__init__(daemon=True)
        self.args, self.out, self.status, self.found = args, out, -1, set[str]()
        self.start()

    def run(self) -> None:
        self.status = wait(list(self.args))
        self.found = {path.name for path in self.out.iterdir()}


def test_it_waits_for_a_run_that_has_not_begun_and_returns_when_the_run_is_complete(
    infer: Infer, write_jsonl: Write, capsys: CapSys
) -> None:
    data = write_jsonl([ask(f"question {i}") for i in range(40)])
    waiters = [Waiter(str(infer.out), out=infer.out), Waiter(f"{infer.out}/data", "--timeout", "10min", out=infer.out)]
    assert infer(data, "engine.kwargs.latency_s=0.3", "engine.max_concurrency=8").exit_status == 0
    for waiter in waiters:
        waiter.join(60)
        assert waiter.status == 0 and "manifest.json" in waiter.found and STATE not in waiter.found
    shown = capsys.readouterr()
    assert f"{infer.out}: nothing is there yet; waiting\n" in shown.out
    assert shown.out.count(f"{infer.out}: complete, 40 of 40 rows done, 0 failed\n") == 2 and not shown.err


def test_a_complete_output_is_found_at_once_by_each_of_its_names(
    infer: Infer, write_jsonl: Write, capsys: CapSys, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer(write_jsonl([ask("a"), "no json"]))
    monkeypatch.chdir(infer.out)
    for name in (str(infer.out), f"output.path={infer.out}", ".", "manifest.json", "data", f"{infer.out}/data/*.parquet",
                 f"{infer.out}/errors"):  # fmt: skip
        assert wait([name, "--timeout", "0s"]) == 3, name  # one row failed
        assert ": complete, " in capsys.readouterr().out
    assert wait([str(infer.out), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["rows"]["failed"] == 1


def test_the_time_ends_with_status_4_and_the_state(
    infer: Infer, write_jsonl: Write, tmp_path: Path, capsys: CapSys
) -> None:
    assert wait([str(tmp_path / "new"), "--timeout", "0.1s"]) == 4
    assert "new is not complete, and --timeout is over: nothing is there yet" in capsys.readouterr().err
    infer(write_jsonl([ask("a")]))
    fs, root = resolve(str(infer.out))
    with run_lock(fs, root), keep_run_state(compose(["engine=echo", f"output.path={infer.out}"]), fs, root) as state:
        state.write()
        # The manifest of the earlier run is still there.
        assert wait([str(infer.out), "--timeout", "0s"]) == 4
        assert "a run is in progress" in capsys.readouterr().err
        left = (infer.out / STATE).read_bytes()
    (infer.out / STATE).write_bytes(left)  # as kill -9 leaves it
    assert wait([str(infer.out), "--timeout", "0s", "--json"]) == 4
    shown = capsys.readouterr()
    assert "the run stopped and was not continued (it was killed, or its machine was lost)" in shown.err and not shown.out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "missing: OUT"),
        (["else"], "else is not an output directory of Eagleray"),
        (["else/data"], "else/data is not an output directory of Eagleray"),
        (["out", "--timeout", "6 hours"], "must be a number with a unit, such as 90s, 30min, 6h or 2d, not '6 hours'"),
        (["s4://x/y"], "there is no reader for 's4://' paths"),
    ],
)
def test_what_is_wrong_ends_the_command_at_once(
    args: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: CapSys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "else" / "data").mkdir(parents=True)
    (tmp_path / "else" / "data" / "notes.txt").write_text("a user's own")
    assert wait(args) == 2
    assert said in capsys.readouterr().err


def test_the_keys_of_a_store_come_from_a_file(
    s3: S3Server, tmp_path: Path, capsys: CapSys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also through jobs/nightly.sh, in the environment that cron has."""
    keys = tmp_path / "keys.env"
    keys.touch(0o600)
    given = {**S3Server.environment, "AWS_ENDPOINT_URL": s3.endpoint, "AWS_REGION": "us-east-1"}
    keys.write_text("".join(f"{name}={value}\n" for name, value in given.items()))
    for name in given:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert wait(["s3://bucket/answers", "--timeout", "0s", "--env-file", str(keys)]) == 4
    assert "nothing is there yet" in capsys.readouterr().err
    home, script = tmp_path / "srv", ROOT / "jobs/nightly.sh"
    (home / "jobs").mkdir(parents=True)
    (home / ".venv").symlink_to(sys.prefix)
    shutil.copy(script, home / "jobs")
    env = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "PYTHONPATH": str(ROOT), "TIMEOUT": "0s"}
    command = ["jobs/nightly.sh", "s3://bucket/answers", "s3://bucket/scores", f"--env-file={keys}", "run.yaml"]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, "nothing is there yet" in done.stderr) == (4, True), done.stderr


def test_it_waits_for_an_output_in_a_store_and_goes_on_while_the_store_fails(
    infer: Infer, s3: S3Server, write_jsonl: Write, capsys: CapSys, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer(write_jsonl([ask("a")]))
    out = s3.uri("scores/2026-11-25")
    assert wait([out, "--timeout", "0s"]) == 4
    fs, root = resolve(out)

    def send(*names: str) -> None:
        for name in names:
            for path in [infer.out / name] if (infer.out / name).is_file() else sorted((infer.out / name).rglob("*.*")):
                with fs.open_output_stream(f"{root}/{path.relative_to(infer.out)}") as file:
                    file.write(path.read_bytes())

    send("_eagleray.json", "_segments", "data")
    s3.failing = 0.3
    done: list[int] = []
    waiter = threading.Thread(target=lambda: done.append(wait([child(out, "data")])), daemon=True)
    waiter.start()
    waiter.join(1)
    assert not done
    s3.failing = 0.0
    send("report.html", "manifest.json")
    waiter.join(60)
    assert done == [0]
    assert f"{out}: complete, 1 of 1 row done" in capsys.readouterr().out
