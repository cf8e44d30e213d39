"""Jobs submitted to a standing cluster by Ray's own command: logs, exit statuses, stopping, killing, going on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from engines.free_port import free_port
from tests.support.outputs import check, durable, write
from tests.support.processes import PATIENCE_S, content, end, family, folder, own_ray, replicas, title, wait_gone
from tests.support.provider_server import ProviderServer

ROOT = Path(__file__).parent.parent
RAY = str(Path(sys.executable).with_name("ray"))
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}


@dataclass
class Standing:
    """A cluster of one node with a dashboard, by which jobs come."""

    env: dict[str, str]
    path: Path
    metrics: str

    def ray(self, *args: str, ok: tuple[int, ...] = (0,)) -> str:
        done = subprocess.run([RAY, *args], env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode in ok, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, id: str, *args: str) -> None:
        self.ray(
            "job", "submit", "--no-wait", f"--submission-id={id}", "--working-dir=.", "--runtime-env=jobs/runtime_env.yaml",
            "--", "python", "-m", "jobs.infer", *args,
        )  # fmt: skip

    def until(self, id: str, true: Callable[[], Any]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < deadline, self.ray("job", "logs", id)
            time.sleep(0.2)

    def replicas(self) -> list[psutil.Process]:
        raylets = [process for process in psutil.process_iter() if str(self.path) in title(process)]
        return [worker for process in raylets for worker in replicas(process.pid)]

    def ended(self, id: str) -> tuple[str, int | None]:
        """How a job ended, and with what exit status."""
        from ray.job_submission import JobSubmissionClient

        headers = {"Authorization": f"Bearer {TOKEN['RAY_AUTH_TOKEN']}"}
        client = JobSubmissionClient(self.env["RAY_API_SERVER_ADDRESS"], headers=headers)
        self.until(id, lambda: client.get_job_status(id).is_terminal())
        found = client.get_job_info(id)
        return str(found.status.value), found.driver_exit_code


@pytest.fixture(scope="module")
def cluster() -> Iterator[Standing]:
    ports = [free_port() for _ in range(4)]
    pod = {"EAGLERAY_POD_KEY": "sk-" + secrets.token_hex(16)}
    env = {**own_ray(), **TOKEN, **pod, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with folder() as path:
        command = [
            RAY, "start", "--head", "--num-cpus=2", f"--port={ports[0]}", f"--dashboard-port={ports[1]}",
            f"--dashboard-agent-listen-port={ports[2]}", f"--temp-dir={path}", "--disable-usage-stats",
            "--include-dashboard=true", f"--metrics-export-port={ports[3]}",
        ]  # fmt: skip
        try:
            subprocess.run(command, env=env, check=True, capture_output=True, timeout=PATIENCE_S)
            addresses = {"RAY_ADDRESS": f"127.0.0.1:{ports[0]}", "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports[1]}"}
            yield Standing({**env, **addresses}, Path(path), f"http://127.0.0.1:{ports[3]}/metrics")
        finally:
            ours = [process for process in psutil.process_iter() if path in title(process)]
            end([*(child for process in ours for child in family(process.pid)), *ours])


@pytest.fixture
def server() -> Iterator[ProviderServer]:
    with ProviderServer(latency_s=0.2) as running:
        yield running


def args(data: Path, out: Path, *more: str) -> list[str]:
    return [f"dataset.path={data}", f"output.path={out}", "run.flush_s=0.2", "run.progress_s=1", *more]


def remote(server: ProviderServer) -> list[str]:
    return ["engine=remote_vllm", "engine.model=m", f"engine.base_url={server.url}/v1", "engine.max_concurrency=8"]


def words(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


@pytest.mark.slow
def test_a_submitted_job_is_small_readable_and_ends_with_its_status(cluster: Standing, tmp_path: Path) -> None:
    data, out = write(tmp_path / "in.jsonl", 300), tmp_path / "out"
    cluster.submit("whole", "engine=echo", *args(data, out))
    assert cluster.ended("whole") == ("SUCCEEDED", 0)
    check(out, 300)
    logs = " ".join(cluster.ray("job", "logs", "whole").split())
    assert "300 of 300 rows done" in logs and "Traceback" not in logs
    uploaded = list(cluster.path.glob("**/working_dir_files/_ray_pkg_*"))
    files = [
        file for folder in uploaded if folder.is_dir() for file in folder.rglob("*") if "__pycache__" not in file.parts
    ]
    assert any(file.name == "infer.py" for file in files) and not any(file.name == "test_jobs.py" for file in files)
    assert sum(file.stat().st_size for file in files) < 3 << 20

    data.write_text(data.read_text() + "no json\n")
    cluster.submit("with-failures", "engine=echo", *args(data, out))
    assert cluster.ended("with-failures") == ("FAILED", 3)
    cluster.submit("misspelt", "engine=ehco", *args(data, out))
    assert cluster.ended("misspelt") == ("FAILED", 2)
    assert "did you mean 'echo'?" in cluster.ray("job", "logs", "misspelt")
    cluster.submit("relative", "engine=echo", *args(data, Path("out")))
    assert cluster.ended("relative") == ("FAILED", 2)
    assert "would be deleted with the job's copy" in " ".join(cluster.ray("job", "logs", "relative").split())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["file", "pod"])
def test_the_keys_of_a_job_reach_the_replicas_and_neither_metadata_nor_logs(
    way: str, cluster: Standing, server: ProviderServer, tmp_path: Path
) -> None:
    """`file`: `--env-file`. `pod`: the variables of Ray's own processes, as a pod of KubeRay has them from a secret."""
    id, data, out = f"keyed-by-{way}", write(tmp_path / "in.jsonl", 200), tmp_path / "out"
    server.key = "sk-" + secrets.token_hex(16) if way == "file" else cluster.env["EAGLERAY_POD_KEY"]
    server.latency_s = 2.0
    given = [*remote(server), *args(data, out), f"engine.api_key_env=EAGLERAY_{way.upper()}_KEY"]
    if way == "file":
        file = tmp_path / "keys.env"
        file.write_text(f"# keys\nexport EAGLERAY_FILE_KEY='{server.key}'\n")
        file.chmod(0o600)
        given = ["--env-file", str(file), *given]
    cluster.submit(id, *given)
    cluster.until(id, lambda: durable(out) > 0)
    during = told(cluster, id)
    assert durable(out) < 200
    server.latency_s = 0.0
    if way == "file" and os.geteuid() == 0:  # all that Ray's server has: also the arguments of constructors
        (gcs,) = [process for process in psutil.process_iter() if re.search(f"gcs_server .*{cluster.path}", title(process))]
        during["memory of the GCS"] = memory(gcs.pid)
    assert cluster.ended(id) == ("SUCCEEDED", 0), cluster.ray("job", "logs", id)
    check(out, 200)
    places = [path for folder in (cluster.path, out) for path in folder.rglob("*") if path.is_file()]
    after = {**told(cluster, id), **{str(path): content(path) for path in places}}
    after["ray job"] = (cluster.ray("job", "list") + cluster.ray("job", "logs", id)).encode()
    assert [name for name, text in (*during.items(), *after.items()) if str(server.key).encode() in text] == []
    # They are about this job.
    for name in during.keys() & {"jobs", "actors", "the Jobs API", "the command lines", "memory of the GCS"}:
        assert id.encode() in during[name] or str(out).encode() in during[name], name
    assert b"raylet" in during["the processes"] and b"Worker" in during["the actors of the dashboard"]


def told(cluster: Standing, id: str) -> dict[str, bytes]:
    """All that Ray tells about a job: the state API, the Jobs API, the pages of the dashboard, and the command lines."""
    found = {"the command lines": "\n".join(map(title, psutil.process_iter())).encode()}
    headers = {"Authorization": f"Bearer {TOKEN['RAY_AUTH_TOKEN']}"}
    with httpx.Client(base_url=cluster.env["RAY_API_SERVER_ADDRESS"], headers=headers, timeout=60) as dashboard:

        def get(*paths: str) -> bytes:
            return b"".join(dashboard.get(path).raise_for_status().content for path in paths)

        for kind in ("jobs", "actors", "workers", "tasks", "objects", "runtime_envs"):
            found[kind] = get(f"/api/v0/{kind}?detail=1&limit=1000")
        found["the Jobs API"] = get("/api/jobs/", f"/api/jobs/{id}", f"/api/jobs/{id}/logs")
        found["the actors of the dashboard"] = get("/logical/actors")
        nodes = get("/nodes?view=summary")
        (node,) = json.loads(nodes)["data"]["summary"]
        found["the processes"] = nodes + get(f"/nodes/{node['raylet']['nodeId']}")
    return found


def memory(pid: int) -> bytes:
    """The memory that a process can write to."""
    found = []
    with Path(f"/proc/{pid}/mem").open("rb", 0) as file:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            first, _, last = line.split()[0].partition("-")
            if line.split()[1].startswith("rw"):
                file.seek(int(first, 16))
                with contextlib.suppress(OSError):
                    found.append(file.read(int(last, 16) - int(first, 16)))
    return b"".join(found)


@pytest.mark.slow
def test_a_job_that_is_stopped_finishes_what_is_in_flight_and_goes_on_when_submitted_again(
    cluster: Standing, server: ProviderServer, tmp_path: Path
) -> None:
    data, out = write(tmp_path / "in.jsonl", 400), tmp_path / "out"
    server.latency_s = 2.0
    cluster.submit("stopped", *remote(server), *args(data, out))
    cluster.until("stopped", lambda: durable(out) > 20)
    cluster.ray("job", "stop", "stopped")
    assert cluster.ended("stopped")[0] == "STOPPED"
    logs = " ".join(cluster.ray("job", "logs", "stopped").split())
    assert "the same command continues" in logs
    assert durable(out) == len(server.requests) < 400
    server.latency_s = 0.05
    cluster.submit("again", *remote(server), *args(data, out))
    assert cluster.ended("again") == ("SUCCEEDED", 0)
    check(out, 400)
    assert len(server.requests) == 400  # none was paid for twice


@pytest.mark.slow
def test_a_job_whose_driver_is_killed_goes_on_when_submitted_again(
    cluster: Standing, server: ProviderServer, tmp_path: Path
) -> None:
    data, out = write(tmp_path / "in.jsonl", 400), tmp_path / "out"
    cluster.submit("killed", *remote(server), *args(data, out))
    cluster.until("killed", lambda: durable(out) > 20)
    drivers = [process for process in psutil.process_iter() if {"jobs.infer", f"output.path={out}"} <= set(words(process))]
    workers = cluster.replicas()
    assert drivers and workers
    for process in drivers:
        process.send_signal(signal.SIGKILL)
    assert cluster.ended("killed")[0] == "FAILED"
    wait_gone(workers)  # they commit what they have
    kept, sent = durable(out), len(server.requests)
    cluster.submit("after", *remote(server), *args(data, out))
    assert cluster.ended("after") == ("SUCCEEDED", 0)
    check(out, 400)
    # In flight, or done and not yet durable (run.flush_s=0.2, 8 at a time, 0.2 s each).
    assert len(server.requests) - 400 == sent - kept <= 8 * 10
    assert json.loads((out / "manifest.json").read_text())["this_run"]["asked"] == 400 - kept


# -- metrics ----------------------------------------------------------------------------------------------------------


def scraped(cluster: Standing) -> dict[str, float]:
    """Prometheus' samples of ours: the name with the tag that tells them apart, and the sum of their values."""
    found: dict[str, float] = {}
    for line in httpx.get(cluster.metrics, timeout=30).text.splitlines():
        if match := re.match(r"ray_(eagleray_\w+)\{(.*)\} (\S+)$", line):
            tags = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            which = tags.get("result") or tags.get("kind") or tags.get("le") or ""
            if tags["model"] != "measured":  # of an earlier job on this cluster
                continue
            assert tags["engine"] == "remote_vllm"
            name = f"{match[1]} {which}".strip()
            found[name] = found.get(name, 0.0) + float(match[3])
    return found


def test_a_histogram_gets_an_even_sample_of_many_times() -> None:
    from pipeline.monitor.metrics import Metrics

    seen: list[float] = []
    metrics = object.__new__(Metrics)
    metrics.found = {"times": SimpleNamespace(observe=seen.append)}
    metrics._observe("times", [0.0005, *(float(n) for n in range(1, 301)), 0.0005])
    assert seen == list(range(1, 301))
    seen.clear()
    metrics._observe("times", [float(n) for n in range(1, 2001)])
    assert seen == list(range(1, 2001, 4))
    seen.clear()
    metrics._observe("times", [0.0005])
    assert not seen


@pytest.mark.slow
def test_prometheus_sees_rows_tokens_cost_and_waits(cluster: Standing, server: ProviderServer, tmp_path: Path) -> None:
    data, out = write(tmp_path / "in.jsonl", 1500), tmp_path / "out"
    server.plan |= {f"question {i}": ["400"] for i in range(3)} | {f"question {i}": ["429"] for i in range(3, 9)}
    server.latency_s = 0.1
    more = ["engine.model=measured", "engine.requests_per_minute=6000", "engine.price.input=1", "engine.price.output=0"]
    cluster.submit("measured", *remote(server), *more, *args(data, out))
    seen: dict[str, float] = {}

    def enough() -> bool:
        seen.update(scraped(cluster))
        return seen.get("eagleray_requests_total ok", 0) > 300

    cluster.until("measured", enough)
    assert seen["eagleray_requests_total bad_request"] == 3
    assert seen["eagleray_throttled_total"] == 6
    assert seen["eagleray_retries_total"] >= 6
    assert seen["eagleray_tokens_total input"] > 0 and seen["eagleray_tokens_total output"] > 0
    assert seen["eagleray_cost_usd_total"] == pytest.approx(seen["eagleray_tokens_total input"] / 1e6)
    assert 0 < seen["eagleray_requests_in_flight"] <= 2 * 8 and seen["eagleray_requests_at_hand"] >= 0
    assert seen["eagleray_latency_seconds_count"] >= 300 and seen["eagleray_queue_wait_seconds_count"] >= 300
    assert seen["eagleray_limiter_wait_seconds_total"] >= 0
    board = json.loads((ROOT / "docs/grafana.json").read_text())
    shown = {name for panel in board["panels"] for target in panel["targets"] for name in names(target["expr"])}
    unknown = {name for name in shown if not any(found.startswith(name) for found in seen)}
    assert not unknown
    assert cluster.ended("measured") == ("FAILED", 3)
    logs = list(cluster.path.glob("**/logs/worker-*.err"))
    failed = [line for path in logs for line in path.read_text().splitlines() if '"event":"row failed"' in line]
    assert {json.loads(line[line.index("{") :])["id"] for line in failed} >= {"r0", "r1", "r2"}


def names(expression: str) -> list[str]:
    return re.findall(r"ray_(eagleray_\w+)", expression)
