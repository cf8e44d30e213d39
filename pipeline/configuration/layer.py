"""The values below the typed keys: those of a run file, or of the configuration that an output has kept."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.identity import FILE_KWARGS
from pipeline.config import OPEN_KEYS, Config, known_keys
from pipeline.configuration.errors import GROUPS

# If an option of these groups is typed, nothing of their section is taken from the layer: their keys belong together.
_WHOLE = ("engine", "hardware")
# The group and the name of the values in Hydra's store.
LAYER, NAME = "layer", "values"


@dataclass(slots=True)
class Layer:
    """Values that replace the packaged defaults. Typed keys replace them in turn."""

    values: dict[str, Any] = field(default_factory=dict)  # section -> key -> value
    options: dict[str, str] = field(default_factory=dict)  # group -> its option
    base: str = ""  # relative paths are below this directory; empty: the working directory

    def under(self, typed: Sequence[str], option_keys: Callable[[str, str], set[str]]) -> Layer:
        """The layer without the keys that the overrides `typed` set. `option_keys` gives the keys that an option sets."""
        values, options = copy.deepcopy(self.values), dict(self.options)
        for word in typed:
            name, _, value = word.lstrip("+~").partition("=")
            if name == "hardware.profiles":  # a list replaces the whole section
                values.pop("hardware", None)
                options.pop("hardware", None)
            elif name not in GROUPS:
                if name not in OPEN_KEYS:  # a typed mapping is added to one of these
                    _drop(values, name.split("."))
            elif not value.startswith("{"):
                options.pop(name, None)
                if name in _WHOLE:
                    values.pop(name, None)
                for key in option_keys(name, value) if name in values else ():
                    values[name].pop(key, None)
        return Layer(values, options, self.base)

    def words(self) -> list[str]:
        """The overrides with which Hydra composes the layer. Stores its values for them."""
        from hydra.core.config_store import ConfigStore

        ConfigStore.instance().store(NAME, self.values, LAYER, "_global_")
        return [*(f"{group}={option}" for group, option in self.options.items()), f"+{LAYER}={NAME}"]

    def names(self) -> list[str]:
        """The known keys, dotted, that the layer sets."""
        return [name for name in known_keys() if value_of(self.values, name) is not _ABSENT]

    def anchor(self, config: Config) -> None:
        """Puts `base` before the relative paths of the configuration that come from this layer."""
        for name in self.names() if self.base else ():
            if name not in _PATHS:
                continue
            section, _, key = name.partition(".")
            values = getattr(config, section)
            if isinstance(values, dict):
                values[key] = moved(name, values[key], Move(self.base))
            else:
                setattr(values, key, moved(name, getattr(values, key), Move(self.base)))


# -- paths ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Move:
    """Turns paths that are relative to the directory `base` into paths relative to `to`. Empty: the working directory."""

    base: str
    to: str = ""

    def __call__(self, path: str) -> str:
        found = placed(path, self.base)
        is_relative = found != "-" and found == placed(found, "") and placed(found, "x") != found
        return os.path.relpath(found, self.to) if self.to and is_relative else found

    def is_there(self, path: str) -> bool:
        try:
            return bool(path) and Path(placed(path, self.base)).exists()
        except (OSError, ValueError):  # a template's text, too long for a name
            return False


def placed(path: str, base: str) -> str:
    """The path below `base`, if it is relative. URLs and `-` (the terminal) stay as they are."""
    if path in ("", "-") or "://" in path or path.startswith("~") or Path(path).is_absolute():
        return path
    return os.path.normpath(os.path.join(base, path)) + ("/" if path.endswith("/") else "")


def folder_of(path: str) -> str:
    """The directory of a file; empty for the working directory."""
    folder = str(Path(path).expanduser().parent)
    return "" if folder == "." else folder


def moved(name: str, value: Any, move: Move) -> Any:
    """The value of the key `name` with its paths moved. A model, an adapter or an engine's file may also be a name on the
    hub: it is a path if it exists."""
    return _PATHS[name](value, move) if name in _PATHS and value is not None else value


def _path(value: Any, move: Move) -> Any:
    if isinstance(value, list):
        return [_path(each, move) for each in value]
    return move(value) if isinstance(value, str) else value


def _schema(value: Any, move: Move) -> Any:
    return move(value) if isinstance(value, str) and not value.lstrip().startswith("{") else value


def _template(value: Any, move: Move) -> Any:
    if isinstance(value, Mapping):
        return {role: _template(part, move) for role, part in value.items()}
    if isinstance(value, list):
        return [_template(part, move) for part in value]
    is_file = isinstance(value, str) and value.startswith("@") and "{" not in value
    return f"@{move(value[1:])}" if is_file else value


def _if_there(value: Any, move: Move) -> Any:
    if isinstance(value, list):
        return [_if_there(each, move) for each in value]
    if not isinstance(value, str):
        return value
    label, equals, path = value.rpartition("=")  # NAME=PATH, as in lora_modules
    return f"{label}{equals}{move(path)}" if move.is_there(path) else value


def _kwargs(value: Any, move: Move) -> Any:
    return {name: _if_there(each, move) if name in _FILES else each for name, each in value.items()}


def _fallback(value: Any, move: Move) -> Any:
    return [
        {name: _if_there(item, move) if name in ("model", "adapter") else item for name, item in each.items()}
        if isinstance(each, Mapping) else each
        for each in (value if isinstance(value, list) else [value])
    ]  # fmt: skip


_FILES = FILE_KWARGS | {"credentials"}
# A key whose value contains paths -> the function that moves them.
_PATHS: dict[str, Callable[[Any, Move], Any]] = {
    "dataset.path": _path,
    "dataset.template": _template,
    "output.path": _path,
    "generation.response_format": _schema,
    "engine.model": _if_there,
    "engine.adapter": _if_there,
    "engine.kwargs": _kwargs,
    "engine.fallback": _fallback,
}


# -- nested values ----------------------------------------------------------------------------------------------------


def leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted names of all values that are not mappings, and the values."""
    for name, value in values.items():
        key = f"{path}.{name}" if path else str(name)
        if isinstance(value, Mapping):
            yield from leaves(value, key)
        else:
            yield key, value


_ABSENT = object()


def value_of(values: Any, name: str) -> Any:
    """The value of a dotted name in nested mappings. A unique object if there is none."""
    for part in name.split("."):
        values = values.get(part, _ABSENT) if isinstance(values, Mapping) else _ABSENT
    return values


def _drop(values: Any, path: Sequence[str]) -> None:
    for name in path[:-1]:
        values = values.get(name) if isinstance(values, Mapping) else None
    if isinstance(values, dict):
        values.pop(path[-1], None)
