"""The resources of a replica and its place: CPUs and GPUs of one node, or a placement group over several nodes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from engines.config import EngineConfig
from engines.errors import ConfigError
from engines.registry import kind_of
from pipeline.config import HardwareConfig


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
        wish = f"{first.get('CPU', 0):g} CPUs, {gpus:g} GPUs, {first.get('memory', 0) / 2**30:g} GiB"
        wish += f", on nodes with {dict(self.labels)}" if self.labels else ""
        return wish + (", over several nodes" if len(self.bundles) > 1 else "")


def placement(hardware: HardwareConfig, engine: EngineConfig) -> Placement:
    """The placement for a hardware profile and the engine's parallel sizes. Raises `ConfigError` if they contradict."""
    tensor, stages = (
        max(_size(engine, f"{name}_parallel_size"), _size(engine, f"{name[0]}p_size")) for name in ("tensor", "pipeline")
    )
    tensor *= max(_size(engine, "data_parallel_size"), _size(engine, "dp_size"))
    gpus = float(tensor * stages) if hardware.gpus is None else hardware.gpus
    if 0 < gpus < tensor * stages:
        raise ConfigError(
            f"hardware.gpus={gpus:g} is less than tensor_parallel_size × pipeline_parallel_size = {tensor * stages}; "
            "null takes as many as it needs"
        )
    node = hardware.gpus_per_node
    if node and gpus and (tensor > node or (stages == 1 and gpus > node)):
        raise ConfigError(
            f"{max(tensor, gpus / stages):g} GPUs of one node are asked for, and hardware.gpus_per_node is {node}; "
            "engine.kwargs.pipeline_parallel_size goes over several nodes"
        )
    low, high = hardware.bounds() or (1, _room(hardware, gpus))
    first = {"CPU": hardware.cpus, "GPU": gpus, "memory": float(int(hardware.memory * 2**30))}
    bundles = [first]
    if stages > 1 and gpus > 1 and not 0 < gpus <= node and kind_of(engine).parallel_sizes:
        bundles = [{**first, "GPU": 1.0}, *({"GPU": 1.0} for _ in range(int(gpus) - 1))]
    labels = {str(name): str(value) for name, value in hardware.label_selector.items()}
    return Placement(low, high, tuple({k: v for k, v in bundle.items() if v} for bundle in bundles), labels)


def _size(engine: EngineConfig, name: str) -> int:
    value = engine.kwargs.get(name)
    if value is None:
        return 1
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"engine.kwargs.{name} must be a number of at least 1, not {value!r}")
    return value


def _room(hardware: HardwareConfig, gpus: float) -> int:
    if not hardware.gpus_per_node or not gpus:
        raise ConfigError("hardware.replicas=auto divides GPUs among replicas: it needs hardware.gpus_per_node, and GPUs")
    node, nodes = hardware.gpus_per_node, hardware.nodes
    count = nodes * int(node // gpus) if gpus <= node else int(nodes * node // gpus)
    if not count:
        raise ConfigError(f"a replica of {gpus:g} GPUs does not fit on {nodes} nodes of {node}")
    return count


def spread(engine: EngineConfig, placed: Placement) -> EngineConfig:
    """The engine's configuration. If its GPUs are on several nodes, vLLM is told to use Ray."""
    if len(placed.bundles) == 1:
        return engine
    return replace(engine, kwargs={"distributed_executor_backend": "ray", **engine.kwargs})


def room(placed: Placement, nodes: Iterable[Mapping[str, Any]]) -> int:
    """The number of replicas that fit on these nodes (from `ray.nodes()`) if nothing else runs there."""
    fitting = [
        node["Resources"]
        for node in nodes
        if node["Alive"] and all(_has(node.get("Labels") or {}, name, value) for name, value in placed.labels.items())
    ]
    first, total = placed.bundles[0], 0.0
    if len(placed.bundles) == 1:
        for has in fitting:
            total += min((has.get(name, 0) // value for name, value in first.items()), default=math.inf)
    elif any(all(has.get(name, 0) >= value for name, value in first.items()) for has in fitting):
        total = sum(has.get("GPU", 0) for has in fitting) // len(placed.bundles)
    return int(min(total, placed.high))


def _has(labels: Mapping[str, str], name: str, value: str) -> bool:
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
        f"there is room for {found} of {placed.low} replicas: each asks for {placed.wish()}; the cluster has "
        f"{len(alive)} nodes, the largest with {best.get('CPU', 0):g} CPUs, {best.get('GPU', 0):g} GPUs, "
        f"{best.get('memory', 0) / 2**30:.0f} GiB"
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
