"""Kill -9 at random moments, many times over; then the output is checked row by row."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engines import load_engine
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger import list_segments
from pipeline.storage.ledger_index import Index, read_index
from tests.support.outputs import write
from tests.support.processes import PATIENCE_S, end, family, title, until, wait_gone

ROWS = 3000
KILLS = int(os.environ.get("EAGLERAY_KILLS", "6"))


def start(data: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "jobs.infer", "engine=echo", f"dataset.path={data}", f"output.path={out}",
        "engine.kwargs.latency_s=0.05", "engine.kwargs.jitter_s=0.04", "engine.max_concurrency=16",
        "run.flush_s=0.2", "hardware.replicas=2", "dataset.chunk_bytes=20000", "run.progress_s=1", *more,
    ]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def durable(out: Path) -> tuple[Index, set[str]]:
    fs, root = resolve(str(out))
    return read_index(fs, root), set(list_segments(fs, root))


@pytest.mark.slow
def test_kill_at_random_points_loses_no_row_and_asks_nothing_durable_again(tmp_path: Path) -> None:
    rng = random.Random(7)
    data, out = tmp_path / "in.jsonl", tmp_path / "out"
    rows = ROWS
    write(data, rows)
    kills = {"driver": 0, "worker": 0, "everything": 0}
    left = KILLS
    for _ in range(10 * KILLS):
        known, segments = durable(out)
        run = start(data, out)
        relatives: list[psutil.Process] = []
        if left:
            target = list(kills)[sum(kills.values()) % 3]
            # A worker is killed some time after there is one; the rest anywhere from Ray's start to the last part file,
            # sometimes before the first row.
            while target == "worker" and run.poll() is None and not workers(family(run.pid)):
                time.sleep(0.1)
            wait_until = time.monotonic() + rng.uniform(0.0, 3.0 if target == "worker" else 12.0)
            while time.monotonic() < wait_until and run.poll() is None:
                time.sleep(0.02)
            relatives = family(run.pid)
            if run.poll() is None and strike(target, run, relatives):
                kills[target] += 1
                left -= 1
        _, printed = run.communicate(timeout=PATIENCE_S)
        assert run.returncode in (0, -signal.SIGKILL), printed
        wait_gone(workers(relatives))  # each writes its last segment
        end(relatives)
        for path in durable(out)[1] - segments:
            asked = pq.read_table(path, columns=["key"])["key"].cast(pa.binary(32))
            assert (known.find(asked) < 0).all(), "a request that was durable before this run was asked again"
        if run.returncode == 0:
            if not left:
                break
            rows += 1000
            write(data, rows)  # done before the killing is over: so that there is something left to kill
    assert min(kills.values()) > 0
    table = pq.read_table(out / "data")
    assert table["id"].to_pylist() == [f"r{i}" for i in range(rows)]
    assert table["response"].to_pylist() == [f"question {i}" for i in range(rows)]
    assert table["index"].to_pylist() == list(range(rows))


def strike(target: str, run: subprocess.Popen[str], relatives: list[psutil.Process]) -> bool:
    """Kills the driver, one worker, or the driver with all its processes; tells whether there was one to kill."""
    if target == "worker":
        found = workers(relatives)
        for process in found[:1]:
            process.kill()
        return bool(found)
    run.kill()
    if target == "everything":
        for process in relatives:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    return True


def workers(relatives: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in relatives if "ray::Worker" in title(process)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_drain_say_how_to_go_on_and_resume(tmp_path: Path, number: signal.Signals) -> None:
    data, out = tmp_path / "in.jsonl", tmp_path / "out"
    write(data, ROWS)
    run = start(data, out, "engine.kwargs.latency_s=0.5")
    until(lambda: durable(out)[1], run)
    if number == signal.SIGINT:
        os.killpg(run.pid, number)  # as a terminal does
    else:
        run.send_signal(number)  # as `ray job stop` does
    _, printed = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 130, printed
    assert "in flight" in printed.partition("waiting for ")[2]
    assert "the same command continues" in printed
    done = len(durable(out)[0])
    assert 0 < done < ROWS
    assert not (out / "manifest.json").exists()
    run = start(data, out)
    _, printed = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 0, printed
    assert json.loads((out / "manifest.json").read_text())["this_run"]["asked"] == ROWS - done


@pytest.mark.slow
def test_two_runs_into_one_output_at_once(tmp_path: Path) -> None:
    data, out = tmp_path / "in.jsonl", tmp_path / "out"
    write(data, ROWS)
    first = start(data, out, "engine.max_concurrency=1")  # it would take more than a minute
    until(lambda: durable(out)[1], first)
    second = start(data, out)
    _, printed = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 2
    assert "another run is writing into" in printed
    first.send_signal(signal.SIGINT)  # it goes on until then
    _, printed = first.communicate(timeout=PATIENCE_S)
    assert first.returncode == 130, printed
    last = start(data, out)
    _, printed = last.communicate(timeout=PATIENCE_S)
    assert last.returncode == 0, printed
    assert len(durable(out)[0]) == ROWS


@pytest.mark.slow
def test_embeddings_of_a_killed_run_are_kept_and_the_others_are_asked(tmp_path: Path) -> None:
    data, out, rows = tmp_path / "in.jsonl", tmp_path / "out", 2000
    data.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(rows)))
    run = start(data, out, "task=embed", "engine.kwargs.latency_s=0.5")
    until(lambda: len(durable(out)[0]) > 100, run)
    relatives = family(run.pid)
    strike("everything", run, relatives)
    run.communicate(timeout=PATIENCE_S)
    end(relatives)
    before = len(durable(out)[0])
    assert 0 < before < rows
    run = start(data, out, "task=embed")
    _, printed = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 0, printed
    assert json.loads((out / "manifest.json").read_text())["this_run"]["asked"] == rows - before
    table = pq.read_table(out / "data")
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 8)
    with load_engine("echo") as engine:
        again = engine.infer([{"task": "embed", "inputs": {"text": text}} for text in table["text"].to_pylist()])
    vectors = np.stack(table["embedding"].to_numpy())
    assert np.array_equal(vectors, np.stack([completion.values["embedding"] for completion in again]))
