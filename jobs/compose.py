"""Hydra on the driver: overrides in, a checked `Config` out, and errors of one line."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from engines.types import ConfigError, nearest
from pipeline.config import OPEN_KEYS, Config, known_keys

GROUPS = ("engine", "hardware", "dataset", "generation", "output", "run")


def conf_dir() -> Path:
    """Where the packaged configuration lies."""
    return Path(str(files("conf")))


def options(group: str, config_dir: str | None = None) -> list[str]:
    """The names a group offers, the user's own included."""
    folders = [conf_dir() / group] + ([Path(config_dir) / group] if config_dir else [])
    return sorted({path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.yaml")})


def compose(overrides: list[str], config_dir: str | None = None) -> Config:
    """The configuration of these Hydra overrides. Raises `ConfigError`, one line, with the nearest right name."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir {config_dir} is not a directory")
    ConfigStore.instance().store(name="schema", node=Config)
    given = [_readable(_checked(override, config_dir)) for override in overrides]
    if config_dir is not None:
        given.append(f"hydra.searchpath=[file://{os.path.abspath(config_dir)}]")
    try:
        with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
            composed = hydra_compose("config", given)
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from None
    assert isinstance(config, Config)
    return config


_OVERRIDE = re.compile(r"^(?P<sign>\+\+|\+|~)?(?P<key>[^=@]+)(?P<package>@[^=]*)?(?P<value>=.*)?$", re.DOTALL)


def _checked(override: str, config_dir: str | None) -> str:
    """The override as Hydra wants it; refuses names that no schema knows."""
    match = _OVERRIDE.match(override)
    if match is None or (match["value"] is None and match["sign"] != "~"):
        raise ConfigError(f"'{override}' is not of the form key=value")
    name, value = match["key"].strip(), match["value"]
    if name in GROUPS and value is not None:
        option = value[1:]
        if option.startswith("{") or option in options(name, config_dir):
            return override
        raise ConfigError(f"there is no {name} '{option}'{nearest(option, options(name, config_dir))}")
    if any(name.startswith(f"{key}.") for key in OPEN_KEYS):
        return override if match["sign"] else f"++{override}"
    known = known_keys()
    head = ".".join(name.split(".")[:2])
    if head in known or name.startswith("hydra."):
        return override
    raise ConfigError(f"there is no key '{name}'{nearest(name, known) or nearest(name.split('.')[0], GROUPS)}")


def _readable(override: str) -> str:
    """Quotes a value that is no expression of Hydra's, such as a Jinja template: then it is meant as text."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        name, _, value = override.partition("=")
        quoted = value.replace("'", "\\'")
        return f"{name}='{quoted}'"
    return override


def _one_line(error: Exception) -> str:
    """The telling line of a Hydra or OmegaConf error, with the key it speaks of."""
    text = str(error)
    key = re.search(r"full_key: (\S+)", text)
    cause = error.__cause__
    if key is None and cause is not None and "full_key" in str(cause):
        return _one_line(cause)  # type: ignore[arg-type]
    if (override := getattr(error, "override", None)) is not None:
        return f"cannot read the override '{override}': {text.splitlines()[0]}"
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return f"{key[1]}: {first}" if key else first


def as_yaml(config: Config) -> str:
    """The composed configuration as YAML, as `--cfg job` prints it."""
    from omegaconf import OmegaConf

    text: str = OmegaConf.to_yaml(OmegaConf.structured(config))
    return text


def plain(config: Config) -> dict[str, Any]:
    """The configuration as plain values, for the manifest. It holds no secrets: those live in the environment."""
    from dataclasses import asdict

    return asdict(config)
