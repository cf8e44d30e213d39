"""The processes of a Ray that a run starts on this machine, and starting it in the background."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from engines.errors import ConfigError
from jobs.infer import _check_clash, main
from pipeline.executors.live.background_start import BackgroundStart
from pipeline.executors.live.ray_processes import _kill, few_processes
from tests.support.processes import PATIENCE_S, family, own_ray, title


def test_ray_has_no_process_that_a_run_does_not_need(local_ray: None) -> None:
    mine = [title(process) for process in family(os.getpid())]
    others = [name for name in mine if "/raylet/raylet " not in name]  # raylet has the commands of all others
    assert len(others) == len(mine) - 1
    assert sum("ray_agent.py" in name for name in others) == 2
    scripts = ("dashboard/", "DashboardAgent", "RuntimeEnvAgent", "log_monitor.py", "monitor.py")
    assert not [name for name in others if "ray_agent.py" not in name and any(script in name for script in scripts)]


@pytest.mark.slow
def test_a_runtime_environment_is_still_made(local_ray: None) -> None:
    """Ray's own agent takes the place of its stand-in, and the worker is started by Ray's own script."""
    import ray

    task = ray.remote(num_cpus=0, runtime_env={"env_vars": {"COLOUR": "green"}})(lambda: os.environ["COLOUR"])
    assert ray.get(task.remote(), timeout=120) == "green"


def test_no_fork_handler_of_a_library_runs_while_ray_starts(tmp_path: Path) -> None:
    """Such as huggingface_hub's, which waits for a lock that a thread holds while it reads a dataset."""
    code = """
import os, time
os.register_at_fork(after_in_child=lambda: time.sleep(600))
import ray
from pipeline.executors.live.ray_session import running_ray
with running_ray():
    assert ray.get(ray.remote(num_cpus=0)(lambda: 1).remote()) == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240, env=own_ray())


@pytest.mark.slow
def test_ray_ends_with_the_process_that_started_it() -> None:
    code = """
import time
from pipeline.executors.live.ray_session import running_ray
with running_ray():
    print(flush=True)
    time.sleep(600)
"""
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=own_ray())
    assert run.stdout is not None and run.stdout.readline() == b"\n"
    members = family(run.pid)
    assert {"gcs_server", "raylet"} <= {process.name() for process in members}
    run.kill()
    run.wait()
    assert psutil.wait_procs(members, timeout=PATIENCE_S)[1] == []


def test_a_process_that_got_the_number_of_an_ended_one_is_left_alone() -> None:
    with subprocess.Popen(["sh", "-c", "sleep 60 & echo; wait"], stdout=subprocess.PIPE, process_group=0) as other:
        assert other.stdout is not None
        other.stdout.readline()  # its child runs
        with subprocess.Popen(["true"]) as ended:
            ended.wait()
        ended.pid = other.pid
        _kill([ended])
        of_other = psutil.Process(other.pid)
        states = {of_other.status(), *(child.status() for child in of_other.children())}
        os.killpg(other.pid, signal.SIGKILL)
    assert states.isdisjoint((psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE))


@pytest.mark.parametrize("module, name", [("services", "ConsolePopen"), ("node", "Node")])
def test_a_ray_with_other_names_starts_as_usual(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import node, services

    monkeypatch.delattr({"node": node, "services": services}[module], name)
    before = vars(services).copy()
    with few_processes():
        assert vars(services) == before


def test_a_background_start_is_ended_even_if_nobody_waits_for_it() -> None:
    steps = []

    @contextlib.contextmanager
    def opened() -> Iterator[str]:
        steps.append(threading.current_thread().name)
        yield "open"
        steps.append("closed")

    with BackgroundStart(opened) as found:
        assert (found, steps) == ("open", ["start"])
    assert steps == ["start", "closed"]
    unused = BackgroundStart(opened)
    unused.give_up()
    unused.give_up()
    assert steps == ["start", "closed"] * 2


def test_a_background_start_that_fails_raises_where_it_is_waited_for() -> None:
    @contextlib.contextmanager
    def broken() -> Iterator[None]:
        raise ConfigError("no room")
        yield

    start = BackgroundStart(broken)
    with pytest.raises(ConfigError, match="no room"), start:
        pass
    start.give_up()


@pytest.mark.parametrize("listed", [("RECORD", "other/a.py,,\njobs/b.py,,\n"), ("top_level.txt", "other\njobs\n")])
def test_another_distribution_with_a_package_of_our_name_is_named(
    listed: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (info := tmp_path / "Other_Jobs-1.0.dist-info").mkdir()
    (info / listed[0]).write_text(listed[1])
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert main(["engine=echo", f"dataset.path={tmp_path}/in.jsonl", f"output.path={tmp_path}/out"]) == 2
    assert "'Other_Jobs' also installs a package 'jobs': run pip uninstall Other_Jobs" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["eagleray.egg-info", "eagleray-0.1.0.egg-info", "eagleray-0.1.0.dist-info"])
def test_the_own_distribution_is_no_other_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "top_level.txt").write_text("engines\njobs\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    _check_clash()
