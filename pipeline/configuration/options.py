"""The options of the configuration groups: the files in conf/, and the user's own under `--config-dir`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any


def conf_dir() -> Path:
    """The directory of the packaged configuration."""
    return Path(str(files("conf")))


def options(group: str, config_dir: str | None = None) -> list[str]:
    """The options of a group, including the user's own."""
    folders = [conf_dir() / group] + ([Path(config_dir) / group] if config_dir else [])
    return sorted({path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.yaml")})


def keys_of(group: str, option: str, config_dir: str | None = None) -> set[str]:
    """The keys that an option sets. None if its file cannot be read: Hydra says what is wrong with it."""
    return set(values_of(group, option, config_dir))


def values_of(group: str, option: str, config_dir: str | None = None) -> dict[str, Any]:
    """The keys that an option sets, with their values; none if its file cannot be read."""
    from yaml import YAMLError, safe_load

    for folder in filter(None, (config_dir, str(conf_dir()))):
        try:
            return dict(safe_load(Path(folder, group, f"{option}.yaml").read_bytes()) or ())
        except (OSError, YAMLError, TypeError, ValueError):
            continue
    return {}
