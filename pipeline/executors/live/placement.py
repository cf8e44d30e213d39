"""The resources of a replica and its place: CPUs and GPUs of one node, or a placement group over several nodes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engines.config import EngineConfig
from engines.errors import ConfigError
from engines.registry import kind_of
from engines.text import counted
from pipeline.hardware import HardwareConfig, hardware_entries


@dataclass(frozen=True, slots=True)
class Placement:
    """The number of replicas, and the resources that each reserves.

    A bundle comes from one node. Several bundles have one GPU each: a pipeline over several nodes, which vLLM runs by Ray.
    """

    low: int
    high: int
    bundles: tuple[dict[str, float], ...]
    labels: Mapping[str, str]

    def wish(self) -> str:
        """The resources of one replica, for messages."""
        first = self.bundles[0]
        gpus = sum(bundle.get("GPU", 0) for bundle in self.bundles)
        wish = f"{counted(first.get('CPU', 0), 'CPU')}, {counted(gpus, 'GPU')}, {first.get('memory', 0) / 2**30:g} GiB"
        wish += f", on nodes with {dict(self.labels)}" if self.labels else ""
        return wish + (", over several nodes" if len(self.bundles) > 1 else "")


@dataclass(frozen=True, slots=True)
class ReplicaGroup:
    """The replicas of one hardware entry."""

    name: str  # in messages: `hardware`, or `hardware[1]`
    placement: Placement
    engine: EngineConfig  # as these replicas load it
    cpus: float


def not_ready(groups: Sequence[ReplicaGroup]) -> str:
    """The message while no replica is ready."""
    wishes = " or ".join(dict.fromkeys(group.placement.wish() for group in groups))
    return f"No replica is ready yet. Each one needs {wishes}; it waits for them, or loads its model."


def replica_groups(hardware: HardwareConfig, engine: EngineConfig) -> tuple[ReplicaGroup, ...]:
    """A group for each entry of `hardware`. Raises `ConfigError` that names the entry."""
    groups = []
    for entry in hardware_entries(hardware, engine):
        placed = placement(entry.hardware, entry.engine, entry.name)
        groups.append(ReplicaGroup(entry.name, placed, spread(entry.engine, placed), entry.hardware.cpus))
    return tuple(groups)


def placement(hardware: HardwareConfig, engine: EngineConfig, where: str = "hardware") -> Placement:
    """The placement for a hardware entry and the engine's parallel sizes. Raises `ConfigError` if they contradict.

    `where` is the entry's name in messages.
    """
    kwargs = "engine.kwargs" if where == "hardware" else f"{where}.engine.kwargs"

    def size(*names: str) -> int:
        return max(_size(engine, name, kwargs) for name in names)

    tensor, stages = size("tensor_parallel_size", "tp_size"), size("pipeline_parallel_size", "pp_size")
    tensor *= size("data_parallel_size", "dp_size")
    gpus = float(tensor * stages) if hardware.gpus is None else hardware.gpus
    if 0 < gpus < tensor * stages:
        raise ConfigError(
            f"{where}.gpus={gpus:g} is less than tensor_parallel_size × pipeline_parallel_size = {tensor * stages}; "
            "null reserves as many as needed",
            key=f"{where}.gpus",
        )
    node = hardware.gpus_per_node
    if node and gpus and (tensor > node or (stages == 1 and gpus > node)):
        needed = counted(max(tensor, gpus / stages), "GPU of one node is", "GPUs of one node are")
        raise ConfigError(
            f"{needed} needed, and {where}.gpus_per_node is {node}; "
            f"{kwargs}.pipeline_parallel_size divides a replica over several nodes",
            key=f"{where}.gpus_per_node",
        )
    low, high = hardware.bounds(where) or (1, _auto_replicas(hardware, gpus, where))
    first = {"CPU": hardware.cpus, "GPU": gpus, "memory": float(int(hardware.memory * 2**30))}
    bundles = [first]
    if stages > 1 and gpus > 1 and not 0 < gpus <= node and kind_of(engine).parallel_sizes:
        bundles = [{**first, "GPU": 1.0}, *({"GPU": 1.0} for _ in range(int(gpus) - 1))]
    labels = {str(name): str(value) for name, value in hardware.label_selector.items()}
    return Placement(low, high, tuple({k: v for k, v in bundle.items() if v} for bundle in bundles), labels)


def _size(engine: EngineConfig, name: str, kwargs: str) -> int:
    value = engine.kwargs.get(name)
    if value is None:
        return 1
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{kwargs}.{name} must be a number of at least 1, not {value!r}", key=kwargs)
    return value


def _auto_replicas(hardware: HardwareConfig, gpus: float, where: str) -> int:
    if not hardware.gpus_per_node or not gpus:
        raise ConfigError(
            f"{where}.replicas=auto divides GPUs among replicas: it needs {where}.gpus_per_node, and replicas with GPUs",
            key=f"{where}.replicas",
        )
    node, nodes = hardware.gpus_per_node, hardware.nodes
    count = nodes * int(node // gpus) if gpus <= node else int(nodes * node // gpus)
    if not count:
        raise ConfigError(
            f"a replica of {counted(gpus, 'GPU')} does not fit on {counted(nodes, 'node')} of {node}", key=f"{where}.gpus"
        )
    return count


def spread(engine: EngineConfig, placed: Placement) -> EngineConfig:
    """The engine's configuration. If its GPUs are on several nodes, vLLM uses Ray."""
    if len(placed.bundles) == 1:
        return engine
    return replace(engine, kwargs={"distributed_executor_backend": "ray", **engine.kwargs})


def room(placed: Placement, nodes: Iterable[Mapping[str, Any]]) -> int:
    """The number of replicas that fit on these nodes (from `ray.nodes()`) if nothing else runs there."""
    fitting = [
        node["Resources"]
        for node in nodes
        if node["Alive"] and all(_satisfies(node.get("Labels") or {}, name, value) for name, value in placed.labels.items())
    ]
    first, total = placed.bundles[0], 0.0
    if len(placed.bundles) == 1:
        total = sum(_times(first, has) for has in fitting)
    elif any(all(has.get(name, 0) >= value for name, value in first.items()) for has in fitting):
        total = sum(has.get("GPU", 0) for has in fitting) // len(placed.bundles)
    return int(min(total, placed.high))


def _times(wanted: Mapping[str, float], has: Mapping[str, float]) -> float:
    return min((has.get(name, 0) // value for name, value in wanted.items()), default=math.inf)


def without(placed: Placement, nodes: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The nodes without the resources of the least number of replicas, as far as these fit."""
    left = [{**node, "Resources": dict(node["Resources"])} for node in nodes]
    bundles = [bundle for _ in range(min(placed.low, room(placed, nodes))) for bundle in placed.bundles]
    for bundle in bundles:
        for node in left:
            labels, has = node.get("Labels") or {}, node["Resources"]
            fits = node["Alive"] and all(_satisfies(labels, name, value) for name, value in placed.labels.items())
            if fits and _times(bundle, has) >= 1:
                has.update({name: has[name] - value for name, value in bundle.items()})
                break
    return left


def _satisfies(labels: Mapping[str, str], name: str, value: str) -> bool:
    """True if a node's labels satisfy a selector, in Ray's forms: `a`, `!a`, `in(a, b)`, `!in(a, b)`."""
    wanted, no = value.removeprefix("!"), value.startswith("!")
    options = [part.strip() for part in wanted[3:-1].split(",")] if wanted.startswith("in(") else [wanted]
    return (labels.get(name) in options) is not no


def lack(placed: Placement, nodes: list[Mapping[str, Any]]) -> str | None:
    """The message about missing room for the least number of replicas. None if all of them fit."""
    found = room(placed, nodes)
    if found >= placed.low:
        return None
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    best: Mapping[str, float] = max(alive, key=lambda has: (has.get("GPU", 0), has.get("CPU", 0)), default={})
    return (
        f"there is room for {found} of {counted(placed.low, 'replica')}: each asks for {placed.wish()}; the cluster has "
        f"{counted(len(alive), 'node')}, the largest with {counted(best.get('CPU', 0), 'CPU')}, "
        f"{counted(best.get('GPU', 0), 'GPU')}, {best.get('memory', 0) / 2**30:.0f} GiB"
    )


def start(actor_class: Any, placed: Placement, *args: Any) -> tuple[Any, Any]:
    """Starts an actor; returns it and its placement group (or None). Ray places them when there is room."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    first = placed.bundles[0]
    options: dict[str, Any] = {"num_cpus": first.get("CPU", 0), "max_restarts": 0}
    if memory := first.get("memory"):
        options["memory"] = int(memory)
    if len(placed.bundles) == 1:
        options |= {"num_gpus": first.get("GPU", 0), "scheduling_strategy": "SPREAD"}
        if placed.labels:
            options["label_selector"] = dict(placed.labels)
        return actor_class.options(**options).remote(*args), None
    selectors = {"bundle_label_selector": [dict(placed.labels)] * len(placed.bundles)} if placed.labels else {}
    group = ray.util.placement_group([dict(bundle) for bundle in placed.bundles], strategy="PACK", **selectors)
    # The GPUs are for the processes that vLLM starts in the group's bundles.
    options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    try:
        return actor_class.options(num_gpus=0, **options).remote(*args), group
    except BaseException:
        ray.util.remove_placement_group(group)
        raise


def serve_options(placed: Placement) -> dict[str, Any]:
    """The same placement as options of a Ray Serve deployment."""
    first = placed.bundles[0]
    actor: dict[str, Any] = {"num_cpus": first.get("CPU", 0)}
    if memory := first.get("memory"):
        actor["memory"] = int(memory)
    options: dict[str, Any] = {"ray_actor_options": actor}
    if len(placed.bundles) == 1:
        actor["num_gpus"] = first.get("GPU", 0)
        if placed.labels:
            actor["label_selector"] = dict(placed.labels)
        return options
    options |= {"placement_group_bundles": [dict(bundle) for bundle in placed.bundles], "placement_group_strategy": "PACK"}
    if placed.labels:
        options["placement_group_bundle_label_selector"] = [dict(placed.labels)] * len(placed.bundles)
    return options


def end(actor: Any, group: Any) -> None:
    """Kills an actor and frees its place."""
    import ray

    ray.kill(actor)
    if group is not None:
        ray.util.remove_placement_group(group)
