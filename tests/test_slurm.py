"""`jobs/slurm.sbatch` under a real Slurm with two nodes on this machine."""

from __future__ import annotations

import json
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from pipeline.configuration.compose import compose
from pipeline.run import WITH_FAILURES
from tests.support.outputs import durable, write
from tests.support.pages import blocks
from tests.support.processes import PATIENCE_S, content, folder, replicas, title
from tests.support.provider_server import ProviderServer
from tests.support.slurm import HERE, Slurm, slurm

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "jobs/slurm.sbatch"


def test_the_commands_of_the_page_are_right() -> None:
    lines = [
        line for block in blocks(ROOT / "docs/slurm.md") for line in block.text.splitlines() if line.startswith("sbatch ")
    ]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line)
        words = words[words.index("jobs/slurm.sbatch") + 1 :]
        if words[0] == "--env-file":
            words = words[2:]
        compose(words).check()


def test_the_script_is_bash_and_its_drain_fits_into_the_time_before_the_limit() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    (found,) = re.findall(r"^#SBATCH --signal=B:TERM@(\d+)$", SCRIPT.read_text(), re.MULTILINE)
    assert int(found) >= compose([]).run.drain_s + 60
    assert SCRIPT.read_text().index("#SBATCH --signal") < SCRIPT.read_text().index("set -u")


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="needs Slurm: apt-get install slurmctld slurmd slurm-client")
def test_a_run_over_two_nodes_whose_time_limit_comes_is_continued_and_loses_nothing(tmp_path: Path) -> None:
    data = write(tmp_path / "in.jsonl", 400)
    data.write_text(data.read_text() + "no json\n")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    keys = tmp_path / "keys.env"
    keys.touch(0o600)
    try:
        key = "sk-" + secrets.token_hex(16)
        with folder() as short, slurm(Path(short)) as cluster, ProviderServer(latency_s=2.0, key=key) as server:
            keys.write_text(f"EAGLERAY_TEST_KEY={key}\n")
            try:
                _run(cluster, server, tmp_path, keys, data)
            finally:
                cluster("scancel", "--me")
    except RuntimeError as error:
        pytest.skip(f"this Slurm cannot run here: {error}")


def _run(cluster: Slurm, server: ProviderServer, here: Path, keys: Path, data: Path) -> None:
    out, log = here / "out", here / "eagleray.log"
    cluster.env["PYTHONPATH"] = str(ROOT)  # the installed command is that of the checkout which made the environment
    id = cluster(
        "sbatch", "--parsable", "--nodes=2", "--cpus-per-task=1", "--mem=1000", "--gpus-per-node=1", "--time=5",
        "--signal=B:TERM@25", f"--output={log}", str(SCRIPT), "--env-file", str(keys), "engine=remote_vllm",
        "engine.model=m", f"engine.base_url={server.url}/v1", "engine.api_key_env=EAGLERAY_TEST_KEY",
        "engine.max_concurrency=4", "hardware.replicas=2", "hardware.cpus=0", "hardware.gpus=1", "run.flush_s=0.2",
        f"dataset.path={data}", f"output.path={out}", cwd=here,
    ).strip()  # fmt: skip

    def until(true: Callable[[], Any]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            state = f"{cluster.job(id)['JobState']}\n{log.read_text() if log.exists() else ''}"
            assert time.monotonic() < deadline, state + cluster.log()
            time.sleep(0.3)

    def raylets() -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if re.search(rf"/raylet .*/tmp/ray-{id}/", title(process))]

    until(lambda: len([raylet for raylet in raylets() if replicas(raylet.pid)]) == 2 and durable(out) > 8)
    assert len(raylets()) == 2
    _no_key_in(cluster, id, [cluster.folder, Path(f"/tmp/ray-{id}"), out, log], str(server.key))

    # The signal comes within half a minute: 400 rows, 8 at a time, take longer.
    cluster("scontrol", "update", f"JobId={id}", "TimeLimit=1")
    until(lambda: cluster.job(id)["JobState"] == "PENDING")
    text = " ".join(log.read_text().split())
    assert "interrupted; all durable results are kept; the same command continues" in text
    assert raylets() == [] and not Path(f"/tmp/ray-{id}").exists()
    first = durable(out)
    assert 8 < first == len(server.requests) < 400  # all that was in flight is kept
    assert not (out / "manifest.json").exists()

    server.latency_s = 0.0
    # Not in the second of the requeue: Slurm compares seconds, and a node refuses a job that it seems to have ended.
    cluster("scontrol", "update", f"JobId={id}", "TimeLimit=60", "StartTime=now+2")
    until(lambda: cluster.job(id)["JobState"] in ("COMPLETED", "FAILED"))
    job = cluster.job(id)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", f"{WITH_FAILURES}:0", "1"), log.read_text()
    table = pq.read_table(out / "data")
    assert table["response"].to_pylist() == [*(f"question {i}" for i in range(400)), None]
    assert len(server.requests) == 400  # none was sent twice
    assert json.loads((out / "manifest.json").read_text())["this_run"]["asked"] == 400 - first
    assert raylets() == [] and not Path(f"/tmp/ray-{id}").exists()
    _no_key_in(cluster, id, [cluster.folder, out, log], str(server.key))


def _no_key_in(cluster: Slurm, id: str, places: list[Path], key: str) -> None:
    """The key is in nothing that Slurm shows or keeps, in no file of Ray or of the run, and in no command line."""
    files = [path for place in places for path in (place.rglob("*") if place.is_dir() else [place]) if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if key.encode() in content(path)] == []
    assert key not in cluster("scontrol", "show", "job", "-dd", id) + cluster("scontrol", "write", "batch_script", id, "-")
    assert not any(key in title(process) for process in psutil.process_iter())
