"""Where replicas go: profiles as numbers, and real actors on a cluster of raylets that say they have GPUs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engines import ConfigError
from engines.config import EngineConfig
from pipeline.configuration.compose import compose
from pipeline.executors.live.placement import Placement, lack, placement, room, spread
from pipeline.hardware import HardwareConfig
from tests.support.infer import Infer, ask
from tests.support.processes import folder


def placed(profile: str, **kwargs: int) -> Placement:
    config = compose(
        ["engine=vllm", f"hardware={profile}", *(f"engine.kwargs.{name}={value}" for name, value in kwargs.items())]
    )
    return placement(config.hardware, config.engine)


TP, PP = "tensor_parallel_size", "pipeline_parallel_size"


@pytest.mark.parametrize(
    ("profile", "sizes", "replicas", "gpus"),
    [("8xh100", {}, 8, [1]), ("8xh100", {TP: 2}, 4, [2]), ("8xh100", {TP: 8}, 1, [8]), ("8xh100", {TP: 3}, 2, [3]),
     ("8xh100", {TP: 2, PP: 2}, 2, [4]), ("2x8xh100", {}, 16, [1]), ("2x8xh100", {TP: 8}, 2, [8]),
     ("2x8xh100", {TP: 8, PP: 2}, 1, [1] * 16), ("2x8xh100", {TP: 4, PP: 2}, 2, [8]),
     ("gpu", {TP: 4}, 64, [4]), ("gpu", {TP: 2, PP: 2}, 64, [1] * 4), ("laptop", {TP: 2}, 1, [0]), ("cpu", {}, 64, [0])],
)  # fmt: skip
def test_profiles_are_divided_by_the_parallel_sizes(
    profile: str, sizes: dict[str, int], replicas: int, gpus: list[int]
) -> None:
    found = placed(profile, **sizes)
    assert found.high == replicas
    assert [bundle.get("GPU", 0) for bundle in found.bundles] == gpus
    config = spread(EngineConfig(kind="vllm", kwargs=dict(sizes)), found)
    assert ("distributed_executor_backend" in config.kwargs) == (len(gpus) > 1)


@pytest.mark.parametrize(
    ("profile", "sizes", "said"),
    [("8xh100", {TP: 16}, "16 GPUs of one node are needed, and hardware.gpus_per_node is 8"),
     ("8xh100", {TP: 8, PP: 2}, "a replica of 16 GPUs does not fit on 1 node of 8"),
     ("8xh100", {TP: 0}, "engine.kwargs.tensor_parallel_size must be a number of at least 1, not 0")],
)  # fmt: skip
def test_sizes_that_cannot_be_placed_are_refused(profile: str, sizes: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        placed(profile, **sizes)
    assert said in str(error.value)


def test_only_vllm_goes_over_several_nodes_and_all_ways_to_say_sizes_count() -> None:
    for kind, sizes in (
        ("sglang_offline", {TP: 2, PP: 2}),
        ("sglang_offline", {"tp_size": 4}),
        ("vllm", {"data_parallel_size": 4}),
    ):
        found = placement(HardwareConfig(gpus=None, cpus=1), EngineConfig(kind=kind, kwargs=dict(sizes)))
        assert [bundle.get("GPU", 0) for bundle in found.bundles] == [4], kind


def test_fewer_gpus_than_the_sizes_need_are_refused() -> None:
    with pytest.raises(ConfigError, match="hardware.gpus=2 is less than"):
        placement(HardwareConfig(gpus=2), EngineConfig(kind="vllm", kwargs={TP: 4}))
    with pytest.raises(ConfigError, match="replicas=auto divides GPUs"):
        placement(HardwareConfig(replicas="auto"), EngineConfig(kind="vllm"))


def node(cpus: float, gpus: float = 0, alive: bool = True, **labels: str) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus, "memory": 64 * 2**30}, "Labels": labels}


def test_what_is_missing_is_told() -> None:
    wants = placement(HardwareConfig(replicas=3, cpus=1, gpus=4), EngineConfig(kind="echo"))
    assert lack(wants, [node(8, 8), node(8, 4)]) is None
    assert lack(wants, [node(8, 8), node(8, 4, alive=False)]) == (
        "there is room for 2 of 3 replicas: each asks for 1 CPU, 4 GPUs, 0 GiB; the cluster has 1 node, "
        "the largest with 8 CPUs, 8 GPUs, 64 GiB"
    )
    over = placement(HardwareConfig(gpus=None, cpus=1), EngineConfig(kind="vllm", kwargs={TP: 4, PP: 2}))
    assert [room(over, [node(8, 4)] * count) for count in (1, 2, 4)] == [0, 1, 1]
    labelled = placement(HardwareConfig(label_selector={"zone": "in(a, b)", "spot": "!yes"}), EngineConfig(kind="echo"))
    assert room(labelled, [node(1, zone="a"), node(1, zone="c")]) == 1
    assert room(labelled, [node(1, zone="a", spot="yes")]) == 0


@pytest.mark.slow
def test_a_machine_without_gpus_says_so_at_once(tmp_path: Path) -> None:
    data = tmp_path / "in.jsonl"
    data.write_text(json.dumps(ask("hi")) + "\n")
    command = ["infer", "engine=echo", "hardware=gpu", f"dataset.path={data}", f"output.path={tmp_path / 'out'}"]
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *command], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert "there is room for 0 of 1 replica: each asks for 1 CPU, 1 GPU" in done.stderr.replace("\n", " ")


def test_a_cluster_that_may_grow_is_waited_for(infer: Infer, write_jsonl: Any) -> None:
    """One of two replicas finds room; the run says so and goes on."""
    outcome = infer(write_jsonl([ask("hi")]), "hardware.replicas=2", "hardware.cpus=2")
    assert outcome.exit_status == 0
    assert "There is room for 1 of 2 replicas: each asks for 2 CPUs" in infer.printed.replace("\n", " ")


# Raylets that say they have GPUs.
CLUSTER = """
import json, subprocess, sys, time
import ray
from ray.cluster_utils import Cluster
from engines.config import EngineConfig
from pipeline.hardware import HardwareConfig
from pipeline.executors.live.placement import end, placement, start

small = {"num_cpus": 4, "num_gpus": 4, "object_store_memory": 80 << 20}
cluster = Cluster(initialize_head=True, head_node_args={**small, "num_gpus": 0})
for _ in range(2):
    cluster.add_node(**small)
ray.init(address=cluster.address, log_to_driver=False)

class Where:
    def where(self):
        return ray.get_runtime_context().get_node_id(), len(ray.get_gpu_ids())

OTHER = '''
import sys, time
import ray
from engines.config import EngineConfig
from pipeline.hardware import HardwareConfig
from pipeline.executors.live.placement import placement, start
class Here:
    def here(self): return "placed"
ray.init(address=sys.argv[1], log_to_driver=False)
sizes = {"tensor_parallel_size": 3, "pipeline_parallel_size": 2}
over = placement(HardwareConfig(cpus=1, gpus=None), EngineConfig(kind="vllm", kwargs=sizes))
print(ray.get(start(ray.remote(Here), over)[0].here.remote()), flush=True)
time.sleep(600)
'''

def free():
    deadline = time.monotonic() + 240
    while ray.available_resources().get("GPU", 0) < 8 and time.monotonic() < deadline:
        time.sleep(0.1)
    return ray.available_resources().get("GPU", 0)

def groups():
    table = ray.util.placement_group_table().values()
    return [group for group in table if group["state"] != "REMOVED"]

found = {"address": cluster.address}
engine = EngineConfig(kind="vllm", kwargs={"tensor_parallel_size": 2})
two = placement(HardwareConfig(replicas=4, cpus=1, gpus=None), engine)
actors = [start(ray.remote(Where), two) for _ in range(4)]
found["tensor"] = ray.get([actor.where.remote() for actor, _ in actors])
for actor, group in actors:
    end(actor, group)
found["free"] = [free()]
sizes = {"tensor_parallel_size": 3, "pipeline_parallel_size": 2}
over = placement(HardwareConfig(cpus=1, gpus=None), EngineConfig(kind="vllm", kwargs=sizes))
actor, group = start(ray.remote(Where), over)
found["pipeline"] = ray.get(actor.where.remote())
nodes = list(ray.util.placement_group_table(group)["bundles_to_node_id"].values())
found["stages"] = sorted(nodes.count(n) for n in set(nodes))
end(actor, group)
found["free"].append(free())
found["groups"] = len(groups())
# A driver that is killed: what it had goes back.
other = subprocess.Popen([sys.executable, "-c", OTHER, cluster.address], stdout=subprocess.PIPE)
found["other"] = other.stdout.readline().decode().strip()
other.kill()
found["free"].append(free())
found["groups_after_a_kill"] = len(groups())
print("=>" + json.dumps(found), flush=True)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_replicas_land_on_nodes_and_give_their_places_back() -> None:
    with folder() as path:
        env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {
            "RAY_TMPDIR": path,
            "RAY_AUTH_MODE": "disabled",
        }
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=840)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    lines = [line[2:] for line in out.splitlines() if line.startswith("=>")]
    assert lines, err[-3000:]
    found = json.loads(lines[0])
    assert [gpus for _, gpus in found["tensor"]] == [2, 2, 2, 2]
    hosts = [host for host, _ in found["tensor"]]
    assert sorted(hosts.count(host) for host in set(hosts)) == [2, 2]
    assert found["pipeline"][1] == 0  # the GPUs are for vLLM's own workers
    assert found["stages"] == [2, 4]
    assert found["free"] == [8, 8, 8]
    assert found["other"] == "placed"
    assert (found["groups"], found["groups_after_a_kill"]) == (0, 0)
