"""Real clusters: one that is up already, several nodes that join and leave, a dispatcher that is killed, what is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger_index import read_index
from tests.support.clusters import Raylets, standing_cluster
from tests.support.clusters import raylets as raylets
from tests.support.outputs import check, durable, write
from tests.support.processes import family, finish, folder, own_ray, title, until, wait_gone


def start(data: Path, out: Path, env: dict[str, str], *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "jobs.infer", "engine=echo", f"dataset.path={data}", f"output.path={out}",
        "engine.max_concurrency=8", "run.flush_s=0.2", "dataset.chunk_bytes=20000", "run.progress_s=1", *more,
    ]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)


# -- a cluster that is up already -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("cpus", [1, 2])
def test_a_cluster_that_is_up_is_joined_and_one_or_two_logical_cpus_are_enough(cpus: int, tmp_path: Path) -> None:
    data, out = write(tmp_path / "in.jsonl", 1000), tmp_path / "out"
    with standing_cluster(cpus) as env:
        # The replicas reserve every CPU there is: reading must not wait for one.
        greedy = ("dataset.chunk_bytes=2000", "hardware.cpus=1", f"hardware.replicas={cpus}")
        assert "1,000 of 1,000 rows done" in " ".join(finish(start(data, out, env, *greedy)).split())
        assert check(out, 1000)["this_run"]["asked"] == 1000
        assert "No request was sent" in finish(start(data, out, env, "dataset.chunk_bytes=2000"))
        write(data, 1100)
        finish(start(data, out, env))
        assert check(out, 1100)["this_run"]["asked"] == 100


@pytest.mark.slow
def test_a_cluster_that_wants_a_token_says_so_in_one_line(tmp_path: Path) -> None:
    data = write(tmp_path / "in.jsonl", 1)
    with standing_cluster(1) as env:
        stranger = {name: value for name, value in env.items() if not name.startswith("RAY_AUTH")}
        printed = finish(start(data, tmp_path / "out", stranger), 2).strip().splitlines()
    assert printed[-1].startswith(f"eagleray: cannot join the Ray cluster at RAY_ADDRESS={env['RAY_ADDRESS']}: ")
    assert "set RAY_AUTH_MODE=token" in printed[-1]


# -- several nodes ----------------------------------------------------------------------------------------------------

SPREAD = ("hardware.cpus=1", "engine.kwargs.latency_s=0.05", "engine.kwargs.jitter_s=0.04")


@pytest.mark.slow
def test_replicas_spread_over_the_nodes_and_a_node_that_joins_is_used(raylets: Raylets, tmp_path: Path) -> None:
    rows = 30_000
    data, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out"
    raylets.tell("add", "second")
    run = start(data, out, raylets.env, *SPREAD, "hardware.replicas=3")
    until(lambda: raylets.busy() == {"head", "second"}, run)
    until(lambda: durable(out) > 0, run)
    raylets.tell("add", "third")
    until(lambda: raylets.busy() == {"head", "second", "third"}, run)
    finish(run)
    assert check(out, rows)["this_run"] == {"asked": rows, "failed": 0, "requests_sent": rows, "engine_deaths": 0}


@pytest.mark.slow
def test_a_node_that_is_lost_costs_no_row_and_convicts_none(raylets: Raylets, tmp_path: Path) -> None:
    rows = 15_000
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert "the same command continues" in " ".join(finish(run, 130).split())
    wait_gone(relatives)
    ids = pq.read_table(out / "_segments", columns=["id"])["id"].to_pylist()
    assert set(answers) <= set(ids)  # some may have become durable after the look
    assert len(ids) == len(set(ids)) == durable(out) < rows


@pytest.mark.slow
def test_a_run_that_started_its_own_ray_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    data, out = write(tmp_path / "in.jsonl", 2000), tmp_path / "out"
    with folder() as scratch:
        run = start(data, out, {**own_ray(), "TMPDIR": scratch}, *SPREAD[1:])
        until(lambda: durable(out) > 0, run)
        relatives = family(run.pid)
        assert relatives
        assert list(Path(scratch).iterdir())
        finish(run)
        wait_gone(relatives)
        assert not list(Path(scratch).iterdir())
    check(out, 2000)
