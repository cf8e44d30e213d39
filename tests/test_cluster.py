"""Real clusters: one that is up already, several nodes that join and leave, a dispatcher that is killed, what is left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger_index import read_index
from tests.conftest import ask

PATIENCE_S = 120  # how long to wait for what must come; nothing here measures time

# A cluster of several raylets on this machine, in a process of its own; told over stdin, answers over stdout.
HOST = """
import json, subprocess, sys
from pathlib import Path
from ray.cluster_utils import Cluster
small = {"num_cpus": 1, "object_store_memory": 100 << 20}
cluster = Cluster(initialize_head=True, head_node_args=small)
nodes = {"head": cluster.head_node}
for line in sys.stdin:
    verb, name = line.split()
    if verb == "add":
        nodes[name] = cluster.add_node(**small)
    elif verb == "drain":
        address = ["--address", cluster.address, "--node-id", nodes[name].node_id]
        why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a spot notice"]
        drain = ["ray", "drain-node", *address, *why, "--deadline-remaining-seconds", "120"]
        subprocess.run([str(Path(sys.executable).with_name(drain[0])), *drain[1:]], check=True, stdout=sys.stderr)
    elif verb == "kill":
        cluster.remove_node(nodes.pop(name), allow_graceful=False)
    raylets = {name: node.all_processes["raylet"][0].process.pid for name, node in nodes.items()}
    ids = {node.node_id: name for name, node in nodes.items()}
    print("=>" + json.dumps({"address": cluster.address, "raylets": raylets, "ids": ids}), flush=True)
cluster.shutdown()
"""


class Raylets:
    def __init__(self, folder: str) -> None:
        self.env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder}
        self.env.pop("RAY_ADDRESS", None)
        with (Path(folder) / "host.log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", HOST], env=self.env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log,
            )  # fmt: skip
        self.raylets: dict[str, int] = {}
        self.ids: dict[str, str] = {}  # Ray's names of the nodes: ours
        self.env["RAY_ADDRESS"] = self.tell("list", "all")["address"]

    def tell(self, verb: str, name: str) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{verb} {name}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("=>"):
                answer: dict[str, Any] = json.loads(line[2:])
                self.raylets, self.ids = answer["raylets"], answer["ids"]
                return answer
        raise AssertionError("the cluster's process ended")

    def busy(self) -> set[str]:
        """The nodes on which a replica of a run is at work."""
        return {name for name, pid in self.raylets.items() if any("ray::Worker" in title(p) for p in family(pid))}


@pytest.fixture
def raylets() -> Iterator[Raylets]:
    with folder() as path:
        host = Raylets(path)
        relatives = family(host.process.pid)
        try:
            yield host
        finally:
            relatives += family(host.process.pid)
            with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
                host.process.communicate(timeout=30)
            end([*relatives, psutil.Process(host.process.pid)] if host.process.poll() is None else relatives)


@contextlib.contextmanager
def folder() -> Iterator[str]:
    """A directory with a short path: Ray makes sockets in it, whose paths may have 107 bytes."""
    path = tempfile.mkdtemp(prefix="r-", dir="/tmp")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def start(data: Path, out: Path, env: dict[str, str], *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "jobs.infer", "engine=echo", f"dataset.path={data}", f"output.path={out}",
        "engine.max_concurrency=8", "run.flush_s=0.2", "dataset.chunk_bytes=20000", "run.progress_s=1", *more,
    ]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)


def finish(run: subprocess.Popen[str], status: int = 0) -> str:
    _, printed = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == status, printed
    return printed


def until(true: Callable[[], Any], run: subprocess.Popen[str]) -> None:
    """Waits for what must happen while the run goes on."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert run.poll() is None, f"the run ended first: {run.communicate()[1]}"
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def write(path: Path, rows: int) -> Path:
    path.write_text("".join(json.dumps(ask(f"question {i}", id=f"r{i}")) + "\n" for i in range(rows)))
    return path


def check(out: Path, rows: int) -> dict[str, Any]:
    """Every row is there once, in order, answered. Returns the manifest."""
    table = pq.read_table(out / "data")
    assert table["id"].to_pylist() == [f"r{i}" for i in range(rows)]
    assert table["index"].to_pylist() == list(range(rows))
    assert table["response"].to_pylist() == [f"question {i}" for i in range(rows)]
    assert table["error"].null_count == rows
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return manifest


def durable(out: Path) -> int:
    return len(read_index(*resolve(str(out))))


def own_ray() -> dict[str, str]:
    """The environment of a run that starts its own Ray."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


# -- a cluster that is up already -------------------------------------------------------------------------------------


@contextlib.contextmanager
def standing_cluster(cpus: int) -> Iterator[dict[str, str]]:
    """`ray start --head` with token authentication; the environment in which to join it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**own_ray(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    with folder() as path:
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", f"--num-cpus={cpus}", f"--port={port}",
            f"--temp-dir={path}", "--include-dashboard=false", "--disable-usage-stats",
        ]  # fmt: skip
        try:
            subprocess.run(command, env=env, check=True, capture_output=True, timeout=PATIENCE_S)
            yield {**env, "RAY_ADDRESS": f"127.0.0.1:{port}"}
        finally:
            ours = [process for process in psutil.process_iter() if path in title(process)]
            end([*(child for process in ours for child in family(process.pid)), *ours])


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_cluster_that_is_up_is_joined_and_one_or_two_logical_cpus_are_enough(cpus: int, tmp_path: Path) -> None:
    data, out = write(tmp_path / "in.jsonl", 1000), tmp_path / "out"
    with standing_cluster(cpus) as env:
        # The replicas reserve every CPU there is: reading must not wait for one.
        greedy = ("dataset.chunk_bytes=2000", "hardware.cpus=1", f"hardware.replicas={cpus}")
        assert "1,000 of 1,000 rows answered" in " ".join(finish(start(data, out, env, *greedy)).split())
        assert check(out, 1000)["this_run"]["asked"] == 1000
        assert "Nothing new to ask" in finish(start(data, out, env, "dataset.chunk_bytes=2000"))
        write(data, 1100)
        finish(start(data, out, env))
        assert check(out, 1100)["this_run"]["asked"] == 100


def test_a_cluster_that_wants_a_token_says_so_in_one_line(tmp_path: Path) -> None:
    data = write(tmp_path / "in.jsonl", 1)
    with standing_cluster(1) as env:
        stranger = {name: value for name, value in env.items() if not name.startswith("RAY_AUTH")}
        printed = finish(start(data, tmp_path / "out", stranger), 2).strip().splitlines()
    assert printed[-1].startswith(f"eagleray: cannot join the Ray cluster at RAY_ADDRESS={env['RAY_ADDRESS']}: ")
    assert "set RAY_AUTH_MODE=token" in printed[-1]


# -- several nodes ----------------------------------------------------------------------------------------------------

SPREAD = ("hardware.cpus=1", "engine.kwargs.latency_s=0.05", "engine.kwargs.jitter_s=0.04")


def test_replicas_spread_over_the_nodes_and_a_node_that_joins_is_used(raylets: Raylets, tmp_path: Path) -> None:
    rows = 10_000
    data, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out"
    raylets.tell("add", "second")
    run = start(data, out, raylets.env, *SPREAD, "hardware.replicas=3")
    until(lambda: raylets.busy() == {"head", "second"}, run)
    until(lambda: durable(out) > 0, run)
    raylets.tell("add", "third")
    until(lambda: raylets.busy() == {"head", "second", "third"}, run)
    finish(run)
    assert check(out, rows)["this_run"] == {"asked": rows, "failed": 0, "engine_deaths": 0}


def test_a_node_that_is_lost_costs_no_row_and_convicts_none(raylets: Raylets, tmp_path: Path) -> None:
    rows = 6000
    data, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out"
    for name in ("second", "third"):
        raylets.tell("add", name)
    run = start(data, out, raylets.env, *SPREAD, "hardware.replicas=3")
    until(lambda: raylets.busy() == {"head", "second", "third"}, run)
    before = durable(out)
    until(lambda: durable(out) > before + 100, run)
    raylets.tell("kill", "third")
    finish(run)
    manifest = check(out, rows)
    assert manifest["errors"] == {}
    assert manifest["this_run"]["engine_deaths"] == 0


# -- the dispatcher ---------------------------------------------------------------------------------------------------


def test_a_dispatcher_that_is_killed_costs_no_row_and_nothing_durable_is_asked_again(tmp_path: Path) -> None:
    rows = 4000
    data, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out"
    run = start(data, out, own_ray(), "hardware.replicas=2", *SPREAD[1:])
    until(lambda: durable(out) > 100, run)
    dispatchers = [process for process in family(run.pid) if "ray::Dispatcher" in title(process)]
    assert len(dispatchers) == 1
    known = read_index(*resolve(str(out)))
    dispatchers[0].kill()
    assert "The dispatcher died" in finish(run)
    check(out, rows)
    keys = pq.read_table(out / "_segments", columns=["key"])["key"].cast(pa.binary(32))
    again = Counter(keys.filter(pa.array(known.find(keys) >= 0)).to_pylist())
    assert len(again) == len(known) and set(again.values()) == {1}


# -- what a run shows and leaves --------------------------------------------------------------------------------------


def test_answers_are_readable_while_others_are_still_on_their_way_and_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    rows = 200
    data, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out"
    # About every second row would take an hour, all of them at once.
    never = ("engine.kwargs.slow_every=2", "engine.kwargs.slow_s=3600", "engine.max_concurrency=200", "run.drain_s=0.5")
    run = start(data, out, own_ray(), *never)
    answers: list[str] = []

    def readable() -> bool:
        if not list((out / "_segments").glob("*.parquet")):
            return False
        frame = pd.read_parquet(out / "_segments")
        table = pq.read_table(out / "_segments", columns=["id", "response"])
        assert table["response"].to_pylist() == [f"question {id[1:]}" for id in table["id"].to_pylist()]
        answers[:] = frame["id"]
        return len(answers) >= rows // 3

    until(readable, run)
    assert len(set(answers)) == len(answers) < rows
    assert not (out / "manifest.json").exists()
    relatives = family(run.pid)
    assert any("ray::Worker" in title(process) for process in relatives)
    os.killpg(run.pid, signal.SIGINT)
    assert "the same command goes on from here" in " ".join(finish(run, 130).split())
    assert psutil.wait_procs(relatives, timeout=30)[1] == []
    assert durable(out) == len(set(answers))


def test_a_run_that_started_its_own_ray_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    data, out = write(tmp_path / "in.jsonl", 2000), tmp_path / "out"
    with folder() as scratch:
        run = start(data, out, {**own_ray(), "TMPDIR": scratch}, *SPREAD[1:])
        until(lambda: durable(out) > 0, run)
        relatives = family(run.pid)
        assert relatives
        assert list(Path(scratch).iterdir())
        finish(run)
        assert psutil.wait_procs(relatives, timeout=30)[1] == []
        assert not list(Path(scratch).iterdir())
    check(out, 2000)
