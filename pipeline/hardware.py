"""The keys under `hardware`: the replicas and their resources, or a list of entries for a mixed fleet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from engines.config import EngineConfig, key
from engines.errors import ConfigError, nearest
from engines.identity import shapes_answers
from engines.registry import kind_of
from engines.validation import Refused, at_least, check_fields, check_keys, check_value, is_whole, whole


def _share_or_whole(name: str, value: Any) -> Any:
    """Ray reserves a share of one CPU or GPU, or whole ones."""
    at_least(0)(name, value)
    if value > 1 and value != int(value):
        raise Refused(f"{name} above 1 must be a whole number, not {value}")
    return value


def replica_bounds(name: str, value: Any) -> tuple[int, int] | None:
    """The minimum and maximum number of replicas; None for `auto`."""
    if value == "auto":
        return None
    if isinstance(value, Mapping):
        check_keys(value, ("min", "max"), name)
        low, high = value.get("min", 1), value.get("max", value.get("min", 1))
    else:
        low = high = value
    if not all(is_whole(bound) and bound >= 1 for bound in (low, high)):
        raise Refused.value(name, "auto, a number of at least 1, or {min: 1, max: 8}", value)
    if low > high:
        raise Refused(f"{name} has a min of {low} above its max of {high}")
    return low, high


def _mapping(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise Refused.value(name, "keys with values, such as {zone: a}", value)
    return value


@dataclass(slots=True)
class HardwareConfig:
    replicas: Any = key(
        1, "number of replicas: a number, {min: 1, max: 8}, or auto: as many as fit on the profile's GPUs", replica_bounds
    )
    cpus: float = key(
        0.0,
        "logical CPUs that each replica reserves; 0 reserves none, and the replica may use the whole node",
        _share_or_whole,
    )
    gpus: float | None = key(
        0.0, "GPUs that each replica reserves; null: tensor × pipeline parallel size (1 if not set)", _share_or_whole
    )
    memory: float = key(0.0, "GiB of memory that each replica reserves", at_least(0))
    label_selector: dict[str, Any] = key({}, "labels that a Ray node must have to run a replica", _mapping)
    nodes: int = key(1, "number of nodes with GPUs, for replicas=auto", whole(1))
    gpus_per_node: int = key(0, "GPUs of each of these nodes; 0: unknown", whole(0))
    gpu_memory: float = key(0.0, "GiB of each GPU, for eagleray plan; 0: unknown", at_least(0))
    profiles: list[Any] = key(
        [],
        "a mixed fleet: each entry is the name of a profile, or a mapping with the keys above, name (of a profile) and "
        "engine: {kwargs: {…}, max_concurrency: …}; hardware=[…] sets it",
    )

    def bounds(self, where: str = "hardware") -> tuple[int, int] | None:
        """The minimum and maximum number of replicas; None for `auto`, where the number of GPUs decides."""
        bounds: tuple[int, int] | None = check_value(f"{where}.replicas", self.replicas, replica_bounds)
        return bounds


@dataclass(frozen=True, slots=True)
class HardwareEntry:
    """Replicas of one kind: their resources, and the engine as they load it."""

    name: str  # in messages: `hardware`, or `hardware[1]`
    hardware: HardwareConfig
    engine: EngineConfig


# The keys of an entry's own engine. All others are those of the run: every replica answers with the same model.
_ENGINE_KEYS = ("kwargs", "max_concurrency")


def hardware_entries(hardware: HardwareConfig, engine: EngineConfig) -> list[HardwareEntry]:
    """The entries of a mixed fleet, or the only one. Raises `ConfigError` that names the entry."""
    if not hardware.profiles:
        return [HardwareEntry("hardware", hardware, engine)]
    for item in fields(HardwareConfig):
        default = item.default if item.default is not MISSING else item.default_factory()  # type: ignore[operator]
        if item.name != "profiles" and getattr(hardware, item.name) != default:
            name = f"hardware.{item.name}"
            raise ConfigError(f"{name} has no effect beside a list of hardware: set it in the entries", key=name)
    return [_entry(f"hardware[{at}]", each, engine) for at, each in enumerate(hardware.profiles)]


def _entry(name: str, given: Any, engine: EngineConfig) -> HardwareEntry:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name} must be the name of a profile, or a mapping, not {given!r}", key=name)
    values = {key: value for key, value in given.items() if key != "engine"}
    known = {item.name for item in fields(HardwareConfig)} - {"profiles"}
    for wrong in values.keys() - known:
        raise ConfigError(f"there is no key '{name}.{wrong}'{nearest(str(wrong), {*known, 'engine', 'name'})}", key=name)
    hardware = HardwareConfig(**values)
    check_fields(name, hardware)
    return HardwareEntry(name, hardware, _engine_of(f"{name}.engine", given.get("engine") or {}, engine))


def _engine_of(name: str, given: Any, engine: EngineConfig) -> EngineConfig:
    """The engine of an entry. Raises `ConfigError` for a key that would change answers."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name} must be a mapping with kwargs or max_concurrency, not {given!r}", key=name)
    for wrong in given.keys() - {*_ENGINE_KEYS}:
        known = " and ".join(_ENGINE_KEYS)
        text = f"{name}.{wrong} cannot be set: all replicas answer with the same engine and model; an entry has {known}"
        raise ConfigError(text, key=name)
    kwargs = given.get("kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise ConfigError(f"{name}.kwargs must be keys with values, not {kwargs!r}", key=name)
    for keyword, value in kwargs.items():
        if shapes_answers(kind_of(engine), keyword) and engine.kwargs.get(keyword) != value:
            text = f"{name}.kwargs.{keyword} would change answers: set engine.kwargs.{keyword}, for all entries"
            raise ConfigError(text, key=name)
    own = replace(engine, kwargs={**engine.kwargs, **kwargs})
    if given.get("max_concurrency") is not None:
        own = replace(own, max_concurrency=given["max_concurrency"])
        check_fields(name, own)
    return own
