"""The keys of a run as a program gives them: a run file, mappings with nested or dotted keys, and keyword arguments."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.errors import ConfigError
from engines.params import GenerationParams
from pipeline.config import cleaned
from pipeline.configuration.compose import Composed, compose_all
from pipeline.configuration.errors import GROUPS, SECTIONS, check_key
from pipeline.configuration.layer import Layer, Move, moved
from pipeline.configuration.options import keys_of
from pipeline.configuration.run_file import RunFile
from pipeline.origin import Origin


@dataclass(slots=True)
class GivenKeys:
    """Keys from several places. Later ones replace earlier ones, as typed keys replace those of a run file."""

    file: RunFile
    layer: Layer
    config_dir: str | None

    @classmethod
    def of(cls, config: Any, config_dir: str | os.PathLike[str] | None) -> GivenKeys:
        """The keys of `config`: the path of a run file, or a mapping. Raises `ConfigError`."""
        folder = os.fspath(config_dir) if config_dir is not None else None
        if isinstance(config, (str, os.PathLike)):
            file = RunFile.read(os.fspath(config))
            return cls(file, file.layer, folder)
        if config is not None and not isinstance(config, Mapping):
            raise ConfigError(f"config must be the path of a run file or a mapping of keys, not {type(config).__name__}")
        found = cls(RunFile(""), Layer(), folder)
        found.add(config or {})
        return found

    def add(self, given: Mapping[str, Any]) -> None:
        """Raises `ConfigError` for a key that does not exist."""
        above = _read(given)
        if self.layer.base:  # a relative path of a program is relative to its working directory
            here = Move(str(Path.cwd()))
            for section, values in above.values.items():
                if section in SECTIONS:
                    above.values[section] = {name: moved(f"{section}.{name}", item, here) for name, item in values.items()}
        typed = [f"{group}={option}" for group, option in above.options.items()]
        for section, values in above.values.items():
            typed += [f"{section}.{name}=" for name in values] if section in SECTIONS else [f"{section}="]
        below = self.layer.under(typed, lambda group, option: keys_of(group, option, self.config_dir))
        values = _joined(below.values, above.values)
        self.layer = Layer(values, below.options | above.options, self.layer.base)

    def compose(self) -> Composed:
        """The configuration. Raises `ConfigError`, with file and line of a wrong key in the run file."""
        run_file = RunFile(self.file.path, self.layer.values, self.layer.options, self.file.lines)
        if not self.file.path:
            return compose_all([], self.config_dir, None, run_file)
        changed = [name for name in self.layer.names() if name not in self.file.lines]
        with self.file.located(changed):
            return compose_all([], self.config_dir, None, run_file)

    @property
    def origin(self) -> Origin:
        if not self.file.path:
            return Origin()
        return Origin(run_file={"path": os.path.abspath(self.file.path), "content": cleaned(self.file.content)})


def _read(given: Mapping[str, Any]) -> Layer:
    """The keys of one mapping. Raises `ConfigError` for a key that does not exist."""
    layer = Layer()
    for name, value in given.items():
        if isinstance(value, GenerationParams):
            value = value.given() | ({} if value.schema_retries is None else {"schema_retries": value.schema_retries})
        if name not in SECTIONS:
            _set(layer, name, value)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                _set(layer, f"{name}.{key}", item)
        elif name in GROUPS and isinstance(value, str):
            layer.options[name] = value
        elif value is not None:
            option = "the name of an option or " if name in GROUPS else ""
            raise ConfigError(f"{name} must be {option}a mapping of keys, not {value!r:.200}", key=name)
    return layer


def _set(layer: Layer, name: str, value: Any) -> None:
    section, _, key = name.partition(".")
    if key == "name" and section in GROUPS:
        layer.options[section] = str(value)
        return
    check_key(name)
    *path, last = name.split(".")
    values: dict[str, Any] = layer.values
    for part in path:
        values = values.setdefault(part, {})
    values[last] = _plain(value)


def _plain(value: Any) -> Any:
    """The value in the types of YAML. A class of pydantic becomes its JSON schema."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        return _plain(value.model_json_schema())
    return value.item() if hasattr(value, "item") and hasattr(value, "dtype") else value  # a number of NumPy


def _joined(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(copy.deepcopy(below))
    for name, value in above.items():
        before = found.get(name)
        found[name] = _joined(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return found


def paths_of(dataset: Any) -> list[str] | str | None:
    """The value of `dataset.path`, if a program names files and gives no rows."""
    if isinstance(dataset, (str, os.PathLike)):
        return os.fspath(dataset)
    if isinstance(dataset, Sequence) and dataset and all(isinstance(each, (str, Path)) for each in dataset):
        return [os.fspath(each) for each in dataset]
    return None
