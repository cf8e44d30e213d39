"""The configuration that an output directory keeps, for `--again OUT` and `rerun OUT`: the same run again, with changes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from engines.errors import ConfigError, ErrorCode
from pipeline.configuration.layer import Layer

HIDDEN = "***"  # replaces secrets in a saved configuration
# Beside the sections of a saved configuration: the keys of its secrets; the references to environment variables that stood
# in their place; and the directory in which the run was started.
# The last one: the run file of that run.
HIDDEN_KEYS, REFERENCES, DIRECTORY, RUN_FILE = "hidden_keys", "references", "directory", "run_file"


def saved_layer(saved: Mapping[str, Any], typed: Sequence[str], engines: Collection[str]) -> Layer:
    """The layer of a saved configuration. `typed` are the user's overrides, `engines` the options of `engine`.

    Raises `ConfigError` if a secret is missing, because secrets are not saved.
    """
    sections = {name: value for name, value in saved.items() if name not in (HIDDEN_KEYS, REFERENCES, DIRECTORY, RUN_FILE)}
    values = _escaped(sections)
    given = {word.lstrip("+~").partition("=")[0] for word in typed}
    missing = []
    for name in saved.get(HIDDEN_KEYS, hidden(sections)):
        reference = saved.get(REFERENCES, {}).get(name)
        if reference is not None:
            _put(values, name, reference)
        elif name.partition(".")[0] not in given and not any(name == key or name.startswith(f"{key}.") for key in given):
            missing.append(name)
    if missing:
        text = f"the saved configuration has no secrets: add {' '.join(f'{name}=…' for name in missing)}"
        raise ConfigError(text, code=ErrorCode.KEY_MISSING, key=missing[0])
    kind = sections.get("engine", {}).get("kind")
    return Layer(values, {"engine": kind} if kind in engines else {}, saved.get(DIRECTORY, ""))


def hidden(values: Any, path: str = "") -> list[str]:
    """The names of the keys whose values contain a hidden secret."""
    if isinstance(values, Mapping):
        return [name for key, value in values.items() for name in hidden(value, f"{path}.{key}".lstrip("."))]
    if isinstance(values, list):
        return [path] if any(hidden(value, path) for value in values) else []
    return [path] if isinstance(values, str) and HIDDEN in values else []


def _put(values: dict[str, Any], name: str, value: str) -> None:
    """Replaces a value. The names of an HTTP header or a field may contain dots themselves."""
    for key, inside in values.items():
        if key == name:
            values[key] = value
        elif isinstance(inside, dict) and name.startswith(f"{key}."):
            _put(inside, name.removeprefix(f"{key}."), value)


def _escaped(value: Any) -> Any:
    """The value with `${` escaped, because OmegaConf would interpolate it."""
    if isinstance(value, Mapping):
        return {name: _escaped(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
