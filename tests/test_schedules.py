"""Runs at fixed times on one machine: the lines of docs/cron.md as cron runs them, and the units as systemd runs them."""

from __future__ import annotations

import configparser
import datetime
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.env_file import load
from pipeline.configuration.compose import compose
from pipeline.configuration.run_file import RunFile
from pipeline.executors.live.live_run import GRACE_S
from pipeline.run import STOPPED, WITH_FAILURES, WRONG
from tests.support.infer import Infer
from tests.support.outputs import check, write
from tests.support.pages import blocks, commands
from tests.support.processes import PATIENCE_S, content
from tests.support.provider_server import ProviderServer

ROOT = Path(__file__).parent.parent
SERVICE, TIMER = (ROOT / f"jobs/eagleray-nightly.{kind}" for kind in ("service", "timer"))
LINES = [
    line for block in blocks(ROOT / "docs/cron.md") for line in block.text.splitlines() if re.match(r"[\d*]\S* \S+ ", line)
]


@dataclass
class Machine:
    """A machine with Eagleray in /srv/eagleray and rows in /data, both below `path`, and a provider with one good key."""

    path: Path
    server: ProviderServer
    keys: Path

    def place(self, text: str) -> str:
        return re.sub(r"/(srv/eagleray|data)\b", lambda match: f"{self.path}{match[0]}", text)

    def run(self, command: list[str], env: dict[str, str], cwd: Path) -> int:
        # PYTHONPATH: the installed command is that of the checkout which made the environment.
        env = {**env, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=env, cwd=cwd, timeout=PATIENCE_S).returncode

    def cron(self, line: str, **variables: str) -> int:
        """Runs a line of a crontab: crontab(5), with the variables that Debian's cron sets."""
        assert not re.search(r"(?<!\\)%", line)  # it would end the command
        command = self.place(line.split(maxsplit=5)[5].replace("\\%", "%"))
        env = {"SHELL": "/bin/sh", "PATH": "/usr/bin:/bin", "LOGNAME": "root", "HOME": str(Path.home())}
        return self.run(["/bin/sh", "-c", command], {**env, **variables}, self.path)

    def log(self) -> str:
        return (self.path / "srv/eagleray/nightly.log").read_text()

    def check_no_key(self) -> None:
        """The key is in its file only: in no output and no log, neither in the state that Ray keeps."""
        from ray._private import worker

        session = Path(worker._global_node.get_session_dir_path())  # type: ignore[attr-defined]
        files = [
            path for place in (self.path, session) for path in place.rglob("*") if path.is_file() and path != self.keys
        ]
        assert len(files) > 20
        key = str(self.server.key).encode()
        assert [path for path in files if key in content(path)] == []


@pytest.fixture
def machine(local_ray: None, tmp_path: Path) -> Iterator[Machine]:
    import ray

    home = tmp_path / "srv/eagleray"
    (tmp_path / "data").mkdir()
    (home / "jobs").mkdir(parents=True)
    (home / ".venv").symlink_to(sys.prefix)
    with ProviderServer(key="sk-" + secrets.token_hex(16)) as server:
        machine = Machine(tmp_path, server, home / "keys.env")
        shutil.copy(ROOT / "jobs/nightly.sh", home / "jobs")
        text = machine.place((ROOT / "jobs/nightly.yaml").read_text())
        assert "  name: openai\n" in text
        text = text.replace("  name: openai\n", f"  name: openai\n  base_url: {server.url}/v1\n")
        (home / "jobs/nightly.yaml").write_text(text)
        # The session's Ray instead of one of its own: it is started already.
        address = ray.get_runtime_context().gcs_address
        machine.keys.touch(0o600)
        machine.keys.write_text(f"# keys.env\nOPENAI_API_KEY={server.key}\nRAY_ADDRESS={address}\nRAY_AUTH_MODE=token\n")
        yield machine


def day(ago: int) -> str:
    return str(datetime.date.today() - datetime.timedelta(days=ago))


# -- the files ----------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_run_file_and_its_lines_are_right() -> None:
    (shown,) = [block.text for block in blocks(ROOT / "docs/cron.md") if block.language == "yaml"]
    text = (ROOT / "jobs/nightly.yaml").read_text()
    assert "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#")) == shown
    config = compose([], run_file=RunFile.read(str(ROOT / "jobs/nightly.yaml")))
    config.check()
    assert config.output.path == f"/data/scores/{day(0)}"
    (both,) = [command.text for command in commands(ROOT / "docs/cron.md") if command.job == "wait"]
    wait, infer = map(shlex.split, both.split("&&"))
    assert f"dataset.path={wait[2]}/data" in infer
    compose(infer[3:], run_file=RunFile.read(str(ROOT / infer[2]))).check()
    assert len(LINES) == 2 and "infer --env-file" in LINES[0] and "jobs/nightly.sh" in LINES[1]


def test_the_units_are_what_systemd_takes(tmp_path: Path) -> None:
    service = unit()["Service"]
    assert float(service["TimeoutStopSec"]) >= compose([]).run.drain_s + GRACE_S
    assert service["SuccessExitStatus"] == str(WITH_FAILURES)
    assert service["RestartPreventExitStatus"] == str(WRONG)
    assert "Environment" not in service  # systemctl show prints it
    if verify := shutil.which("systemd-analyze"):  # what it says of a key or a value that it does not know is a warning
        for path in (SERVICE, TIMER):
            text = path.read_text().replace("/srv/eagleray/jobs/nightly.sh", "/bin/true")
            (tmp_path / path.name).write_text(text)
        done = subprocess.run([verify, "verify", *map(str, tmp_path.iterdir())], capture_output=True, text=True)
        assert done.returncode == 0 and "eagleray" not in done.stderr, done.stderr


def unit() -> configparser.RawConfigParser:
    units = configparser.RawConfigParser(strict=True, interpolation=None)
    units.optionxform = str  # type: ignore[assignment,method-assign]
    units.read([SERVICE, TIMER], encoding="utf-8")
    return units


# -- runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cron_runs_the_rows_of_the_day_with_the_key_of_a_file(machine: Machine) -> None:
    rows, scores = machine.path / "data/in" / day(0), machine.path / "data/scores" / day(0)
    rows.mkdir(parents=True)
    write(rows / "rows.jsonl", 3)
    machine.keys.chmod(0o640)
    assert machine.cron(LINES[0]) == WRONG
    assert "keys.env can be read by other users: run chmod 600 keys.env" in machine.log()
    machine.keys.chmod(0o600)
    assert machine.cron(LINES[0]) == 0, machine.log()
    check(scores, 3)
    assert len(machine.server.requests) == 3
    machine.check_no_key()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["cron", "systemd"])
def test_a_nightly_job_waits_for_the_output_of_yesterday(way: str, machine: Machine) -> None:
    answers, scores = machine.path / "data/answers" / day(1), machine.path / "data/scores" / day(1)
    start = (lambda: machine.cron(LINES[1])) if way == "cron" else (lambda: as_systemd_does(machine))
    if way == "cron":  # nobody writes the output
        assert machine.cron(LINES[1], TIMEOUT="1s") == STOPPED
        assert f"{answers} is not complete, and --timeout is over: nothing is there yet" in machine.log()
    data, other, ended = write(machine.path / "in.jsonl", 3), Infer(answers), list[int]()
    data.write_text(data.read_text() + "no json\n")
    job = threading.Thread(target=lambda: ended.append(start()), daemon=True)
    job.start()
    assert other(data, "engine.kwargs.latency_s=1").exit_status == WITH_FAILURES
    job.join(PATIENCE_S)
    assert ended == [WITH_FAILURES]
    found = Infer(scores).rows()
    assert [row["id"] for row in found] == ["r0", "r1", "r2", "in.jsonl:4"]
    assert [row["error"] is None for row in found] == [True, True, True, False]
    assert len(machine.server.requests) == 3
    machine.check_no_key()


def as_systemd_does(machine: Machine) -> int:
    """Runs ExecStart of the unit as systemd does: systemd.service(5), systemd.exec(5). The user has no home directory."""
    service = unit()["Service"]
    name, _, source = service["LoadCredential"].partition(":")
    assert source == "/etc/eagleray.env"
    folder = machine.path / "credentials"
    folder.mkdir(mode=0o700)
    machine.keys = machine.keys.rename(folder / name)
    machine.keys.write_text(machine.keys.read_text().partition("RAY_ADDRESS")[0])  # it starts its own Ray
    machine.keys.chmod(0o440)  # as an access list for the service's user makes it look
    folder.chmod(0o500)
    env = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "USER": service["User"], "LOGNAME": service["User"],
        "HOME": "/proc/eagleray", "SHELL": "/bin/sh", "CREDENTIALS_DIRECTORY": str(folder),
    }  # fmt: skip
    words = shlex.split(machine.place(service["ExecStart"]))
    words = [re.sub(r"\$\{(\w+)\}", lambda match: env[match[1]], word) for word in words]
    assert not any({"$", "%"} & set(word) for word in words)
    return machine.run(words, env, Path(machine.place(service["WorkingDirectory"])))


def test_a_credential_of_systemd_may_be_readable_by_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.errors import ConfigError

    file = tmp_path / "keys.env"
    file.touch(0o440)
    with pytest.raises(ConfigError, match="can be read by other users"):
        load(str(file))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    load(str(file))
    file.chmod(0o444)
    with pytest.raises(ConfigError, match="can be read by other users"):
        load(str(file))
