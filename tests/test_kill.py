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

import psutil
import pyarrow.parquet as pq

from pipeline.fs import resolve
from pipeline.ledger import Index, list_segments, read_index
from tests.conftest import ask

ROWS = 3000
KILLS = int(os.environ.get("EAGLERAY_KILLS", "8"))


def start(data: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "jobs.infer", "engine=echo", f"dataset.path={data}", f"output.path={out}",
        "engine.kwargs.latency_s=0.05", "engine.kwargs.jitter_s=0.04", "engine.max_concurrency=16",
        "run.flush_s=0.2", "hardware.replicas=2", "dataset.chunk_bytes=20000", "run.progress_s=1", *more,
    ]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def wait_gone(processes: list[psutil.Process]) -> None:
    """Waits until the killed run's last process is gone, so that its last segment is written too."""
    _, alive = psutil.wait_procs(processes, timeout=30)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=10)


def durable(out: Path) -> tuple[Index, set[str]]:
    fs, root = resolve(str(out))
    return read_index(fs, root), set(list_segments(fs, root))


def test_kill_at_random_points_loses_no_row_and_asks_nothing_durable_again(tmp_path: Path) -> None:
    rng = random.Random(7)
    data, out = tmp_path / "in.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(ask(f"question {i}", id=f"r{i}")) + "\n" for i in range(ROWS)))
    kills = {"driver": 0, "worker": 0, "everything": 0}
    finished = False
    for attempt in range(60):
        known, segments = durable(out)
        run = start(data, out)
        target = list(kills)[attempt % 3]
        if attempt < KILLS:
            # Anywhere from Ray's start to the last part file: some of these come before the first row.
            wait_until = time.monotonic() + rng.uniform(1.0, 9.0)
            while time.monotonic() < wait_until and run.poll() is None:
                time.sleep(0.02)
            relatives = family(run.pid)
            if run.poll() is None:
                kills[target] += 1
                if target == "worker":
                    for process in relatives:
                        with contextlib.suppress(psutil.Error):
                            if "ray::Worker" in " ".join(process.cmdline()):
                                process.kill()
                                break
                else:
                    run.kill()
                    if target == "everything":
                        for process in relatives:
                            with contextlib.suppress(psutil.NoSuchProcess):
                                process.kill()
        _, printed = run.communicate(timeout=120)
        if run.returncode != 0:
            wait_gone(relatives)
        # Nothing that was durable before this run may appear in a segment of this run.
        fs, _ = resolve(str(out))
        for path in set(list_segments(fs, resolve(str(out))[1])) - segments:
            assert (known.find(pq.read_table(path, columns=["key"])["key"].cast("fixed_size_binary[32]")) < 0).all()
        assert run.returncode in (0, -signal.SIGKILL), printed
        if run.returncode == 0:
            finished = True
            if attempt >= KILLS:
                break
            # Done before the killing is over: more rows, so that there is something left to kill.
    assert finished
    assert sum(kills.values()) > KILLS // 2
    table = pq.read_table(out / "data")
    assert table["id"].to_pylist() == [f"r{i}" for i in range(ROWS)]
    assert table["response"].to_pylist() == [f"question {i}" for i in range(ROWS)]
    assert table["index"].to_pylist() == list(range(ROWS))


def test_ctrl_c_drains_says_how_to_go_on_and_resumes(tmp_path: Path) -> None:
    data, out = tmp_path / "in.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(ask(f"question {i}")) + "\n" for i in range(ROWS)))
    run = start(data, out)
    deadline = time.monotonic() + 60
    while not durable(out)[1] and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)
    _, printed = run.communicate(timeout=60)
    assert run.returncode == 130, printed
    assert "finishing" in printed
    assert "the same command goes on from here" in printed
    done = len(durable(out)[0])
    assert 0 < done < ROWS
    assert not (out / "manifest.json").exists()
    run = start(data, out)
    _, printed = run.communicate(timeout=120)
    assert run.returncode == 0, printed
    assert json.loads((out / "manifest.json").read_text())["this_run"]["asked"] == ROWS - done


def test_two_runs_into_one_output_at_once(tmp_path: Path) -> None:
    data, out = tmp_path / "in.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(ask(f"question {i}")) + "\n" for i in range(ROWS)))
    first = start(data, out)
    deadline = time.monotonic() + 60
    while not durable(out)[1] and time.monotonic() < deadline:
        time.sleep(0.1)
    second = start(data, out)
    _, printed = second.communicate(timeout=60)
    assert second.returncode == 2
    assert "another run is writing into" in printed
    _, printed = first.communicate(timeout=120)
    assert first.returncode == 0, printed
