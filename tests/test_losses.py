"""A cluster that loses nodes, gains others, whose driver or head dies: no row lost, none twice, little paid for again.

The first test has most of it in one run: `for i in $(seq 20); do pytest tests/test_losses.py || break; done` tells how
often it holds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from tests.support.clusters import Raylets, standing_cluster
from tests.support.clusters import raylets as raylets
from tests.support.outputs import check, durable, write
from tests.support.processes import PATIENCE_S, finish, until
from tests.support.provider_server import ProviderServer

pytestmark = pytest.mark.slow

ROWS = 20_000  # more than the losses have time for: they must find a run that still goes on
AT_ONCE = 8  # rows in one replica


@pytest.fixture
def server() -> Iterator[ProviderServer]:
    with ProviderServer(latency_s=0.5, keep=True) as running:
        yield running


def asked(server: ProviderServer) -> int:
    return len(server.requests)


def paid_twice(server: ProviderServer) -> int:
    return sum(count - 1 for count in Counter(request.text for request in server.requests).values())


def start(data: Path, out: Path, env: dict[str, str], server: ProviderServer, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "jobs.infer", "engine=remote_vllm", "engine.model=m", f"engine.base_url={server.url}/v1",
        f"engine.max_concurrency={AT_ONCE}", "engine.requests_per_minute=60000", f"dataset.path={data}",
        f"output.path={out}", "dataset.chunk_bytes=20000", "run.flush_s=0.2", "run.progress_s=1", "hardware.cpus=1",
        "hardware.replicas=4", *more,
    ]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)


def ray(env: dict[str, str], code: str) -> Any:
    """What a script in a process of its own learns of the cluster."""
    script = "import json, ray; from ray.util import state; ray.init(log_to_driver=False, logging_level='ERROR')\n" + code
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    # Ray writes to the standard output, too, also after the script.
    (found,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    return json.loads(found.removeprefix("FOUND "))


ACTORS = """
from ray._private.state import actors
found = [a for a in actors().values() if a["State"] == "ALIVE"]
print("FOUND", json.dumps([[a["ActorClassName"], a["Address"]["NodeID"], a["Pid"]] for a in found]))
"""


def test_nodes_go_and_come_the_limiter_moves_and_the_driver_dies(
    raylets: Raylets, server: ProviderServer, tmp_path: Path
) -> None:
    order = random.Random(os.environ.get("LOSSES_SEED", time.time_ns()))
    data, out = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out"
    for name in ("one", "two", "three", "four"):
        raylets.tell("add", name)
    run = start(data, out, raylets.env, server)
    until(lambda: len(raylets.busy()) >= 4, run)

    def some_more(rows: int) -> None:
        before = durable(out)
        until(lambda: durable(out) >= min(ROWS, before + rows), run)

    def where(actor: str) -> tuple[str, int]:
        """The node and the process of the one actor of its class."""
        found: list[tuple[str, int]] = []

        def look() -> bool:  # Ray may not know yet that a node is gone, or a process
            alive = [(raylets.ids.get(node, ""), pid) for kind, node, pid in ray(raylets.env, ACTORS) if kind == actor]
            found[:] = [(node, pid) for node, pid in alive if node and psutil.pid_exists(pid)]
            return len(found) == 1

        until(look, run)
        return found[0]

    # The node that the driver came to, and the dispatcher with it: on one host it may be any of them.
    stays, _ = where("Dispatcher")
    bound = 0
    some_more(order.randint(100, 400))
    victim = order.choice(sorted(raylets.busy() - {"head", stays}))  # a node with a replica, and all that its store holds
    raylets.tell("kill", victim)
    bound += AT_ONCE * 10
    some_more(200)
    limiter, process = where("RateLimitActor")
    while limiter in ("head", stays):  # these stay; a new limiter, as good as the old one, comes on any node
        os.kill(process, signal.SIGKILL)
        limiter, process = where("RateLimitActor")
    raylets.tell("kill", limiter)  # and the replica on it
    bound += AT_ONCE * 10
    raylets.tell("add", "five")
    raylets.tell("add", "six")
    until(lambda: raylets.busy() & {"five", "six"} and len(raylets.busy()) >= 4, run)
    some_more(400)  # the rows of the two lost replicas are asked again first
    notice = order.choice(sorted(raylets.busy() - {"head", stays}))  # two minutes before a spot node goes
    before = paid_twice(server)
    raylets.tell("drain", notice)
    until(lambda: notice not in raylets.busy(), run)
    assert paid_twice(server) == before  # what was in flight there was finished
    raylets.tell("kill", notice)
    some_more(200)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    bound += AT_ONCE * 10 * 4
    server.latency_s = 0.05
    again = start(data, out, raylets.env, server)
    finish(again)
    manifest = check(out, ROWS)
    assert manifest["errors"] == {}
    # In flight, or done and not yet durable, on what died (run.flush_s=0.2).
    assert asked(server) - ROWS == paid_twice(server) <= bound
    keys = pq.read_table(out / "_segments", columns=["key"])["key"].to_pylist()
    assert len(set(keys)) == ROWS


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's processes wait a minute for a head that is gone; here less."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "10")


def test_the_head_is_lost_and_the_next_submission_goes_on_on_another_cluster(
    impatient: None, raylets: Raylets, server: ProviderServer, tmp_path: Path
) -> None:
    rows = 4000
    data, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out"
    for name in ("one", "two", "three"):
        raylets.tell("add", name)
    run = start(data, out, raylets.env, server)
    until(lambda: len(raylets.busy()) >= 3 and durable(out) > 300, run)
    raylets.tell("kill", "head")  # and the driver's own node, where it was that one
    assert run.wait(PATIENCE_S) != 0
    known = durable(out)
    assert 300 < known < rows
    server.latency_s = 0.05
    with standing_cluster(2) as env:  # at once: the old workers may still be at their last rows
        again = start(data, out, env, server)
        finish(again)
    assert check(out, rows)["this_run"]["asked"] <= rows - known
    assert asked(server) - rows == paid_twice(server) <= AT_ONCE * 4 * 2
