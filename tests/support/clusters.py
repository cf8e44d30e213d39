"""Ray clusters on this machine: several raylets that join and leave, and one node that `ray start` starts."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from engines.free_port import free_port
from tests.support.processes import PATIENCE_S, end, family, folder, own_ray, title

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
    if verb == "add":  # a node has its name as a label
        nodes[name] = cluster.add_node(**small, labels={"name": name})
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
def standing_cluster(cpus: int) -> Iterator[dict[str, str]]:
    """`ray start --head` with token authentication; the environment in which to join it."""
    port = free_port()
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
