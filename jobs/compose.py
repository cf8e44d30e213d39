"""Composes the configuration with Hydra: overrides in, a `Config` out. Errors are one line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from engines.errors import ConfigError, no_such
from engines.fallback_prices import with_lists
from engines.params import RESPONSE_FORMATS
from jobs.compose_errors import GROUPS, hydra_message, is_open, is_plain, key_types, no_such_key
from pipeline.config import OPEN_KEYS, Config, without_secrets


def conf_dir() -> Path:
    """The directory of the packaged configuration."""
    return Path(str(files("conf")))


def options(group: str, config_dir: str | None = None) -> list[str]:
    """The options of a group, including the user's own."""
    folders = [conf_dir() / group] + ([Path(config_dir) / group] if config_dir else [])
    return sorted({path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.yaml")})


def compose(overrides: list[str], config_dir: str | None = None) -> Config:
    """The configuration of these Hydra overrides. Raises `ConfigError`: one line, with the nearest known name.

    Afterwards, `Config.check` knows all values of `run.mode`.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir {config_dir} is not a directory")
    for group in GROUPS if config_dir is not None else ():
        if clash := set(options(group)) & {path.stem for path in Path(str(config_dir), group).glob("*.yaml")}:
            raise ConfigError(
                f"{config_dir}/{group}/{min(clash)}.yaml has the name of a packaged file; give it another name"
            )
    ConfigStore.instance().store(name="schema", node=Config)
    given = [_readable(_checked(override, config_dir)) for override in overrides]
    if config_dir is not None:
        given.append(f"hydra.searchpath=[file://{os.path.abspath(config_dir)}]")
    try:
        with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
            composed = hydra_compose("config", given)
        config = OmegaConf.to_object(composed)
    except YAMLError as error:
        raise ConfigError(f"a file under --config-dir is not YAML: {' '.join(str(error).split())}") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(hydra_message(error, overrides)) from None
    assert isinstance(config, Config)
    config.generation["response_format"] = _response_format(config.generation.get("response_format"))
    with_lists(config.engine, Path(config_dir) / "price" if config_dir else None)
    # It fills the list of `run.mode`. Imported last, because it imports pyarrow, which a wrong override need not wait for.
    import pipeline.executors.registry  # noqa: F401

    return config


def _response_format(given: Any) -> Any:
    """The response_format of `generation.response_format`, where a text may be JSON or the path of a JSON file.

    The JSON is a schema or a whole response_format. The configuration then holds its content, not the path.
    """
    if not isinstance(given, str):
        return given
    where = f"generation.response_format={given}"
    try:
        found = json.loads(given if given.lstrip().startswith("{") else Path(given).read_bytes())
    except OSError as error:
        raise ConfigError(f"{where} is not a file that can be read ({error.strerror}), and not a schema") from None
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{where} must hold a JSON schema, an object")
    return found if found.get("type") in RESPONSE_FORMATS else {"type": "json_schema", "json_schema": {"schema": found}}


_OVERRIDE = re.compile(r"^(?P<sign>\+\+|\+|~)?(?P<key>[^=@]+)(?P<package>@[^=]*)?(?P<value>=.*)?$", re.DOTALL)


def _checked(override: str, config_dir: str | None) -> str:
    """The override in Hydra's form. Raises `ConfigError` for an unknown key or option."""
    match = _OVERRIDE.match(override)
    if match is None or match["package"] or (match["value"] is None and match["sign"] != "~"):
        raise ConfigError(f"'{override}' is not of the form key=value")
    name, value = match["key"].strip(), match["value"]
    if match["sign"] == "~" and not is_open(name):
        instead = "" if name in GROUPS else f": {name}=null"
        raise ConfigError(f"'{override}' would remove a key; keys can only be set{instead}")
    if match["sign"] == "~" or name.startswith("hydra."):
        return override
    if name in GROUPS and value is not None:
        option = value[1:]
        if option.startswith("{") or option in options(name, config_dir):
            return f"{name}{value}"
        raise ConfigError(no_such(name, option, options(name, config_dir)))
    if is_open(name):
        return f"++{name}{value}"
    known = key_types()
    if name not in known:
        above = next((key for key in known if name.startswith(f"{key}.")), None)
        if above is None or above == "engine.price":
            raise ConfigError(no_such_key(name))
        if is_plain(known[above]):
            raise ConfigError(f"{above} takes a value and has no keys of its own: '{override}'")
    return f"{name}{value}"


def _readable(override: str) -> str:
    """The override with its value in quotes if Hydra would not read it as text: a template, or `1e5` for a text key."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    name, _, value = override.partition("=")
    is_text = name == "dataset.template" or key_types().get(name, "").startswith("str")
    try:
        parsed = OverridesParser.create().parse_override(override)
        if not is_text or not (parsed.is_sweep_override() or isinstance(parsed.value(), (bool, int, float))):
            return override
    except HydraException:
        pass
    return f"{name}={_quoted(value)}"


def _quoted(text: str) -> str:
    """The text in Hydra's quotes, where a backslash is an escape only before a quote."""
    return "'" + re.sub(r"(\\*)(?:'|$)", lambda found: found[1] * 2 + ("\\'" if found[0].endswith("'") else ""), text) + "'"


def as_yaml(config: Config) -> str:
    """The composed configuration as YAML, as `--cfg job` prints it, without secrets."""
    from omegaconf import OmegaConf

    text: str = OmegaConf.to_yaml(OmegaConf.create(without_secrets(config)))
    return text


def command_of(config: Mapping[str, Any]) -> list[str] | None:
    """The command line that gives a configuration of a manifest; None if no command line gives exactly this one."""
    from pipeline.storage.exact_json import dumps, loads

    kind, batch = config["engine"]["kind"], config["run"]["mode"] == "batch"
    job, mode = ("batch", ["run.mode=batch"]) if batch else ("infer", [])
    given = [f"engine={kind}"] if kind in options("engine") else []
    base = loads(dumps(without_secrets(compose([*given, *mode]))))
    try:
        given += sorted(_differences("", base, config), key=lambda word: not word.startswith("engine."))
        same = loads(dumps(without_secrets(compose([*given, *mode])))) == config
    except (ConfigError, ValueError):
        return None
    return ["eagleray", job, *given] if same else None


def _differences(path: str, base: Any, value: Any) -> Iterator[str]:
    """The overrides that turn `base` into `value`."""
    if value == base:
        return
    if not isinstance(value, Mapping) or not (isinstance(base, Mapping) or path in OPEN_KEYS) or not value:
        yield f"{path}={_in_hydra(value)}"
        return
    base = base or {}
    if all(re.fullmatch(r"[\w-]+", name) for name in value) and base.keys() <= value.keys():
        for name, item in value.items():
            yield from _differences(f"{path}.{name}".lstrip("."), base.get(name), item)
    else:
        yield f"{path}={_in_hydra(value)}"


def _in_hydra(value: Any, inside: bool = False) -> str:
    """A value in the grammar of Hydra's overrides. Raises `ValueError` if the grammar cannot express it."""
    if isinstance(value, Mapping):
        if not all(re.fullmatch(r"[\w-]+", str(name)) for name in value):
            raise ValueError("a key that an override cannot contain")
        return "{" + ",".join(f"{name}:{_in_hydra(item, True)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_in_hydra(item, True) for item in value) + "]"
    if not isinstance(value, str):
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    if not inside and re.fullmatch(r"[A-Za-z_/.][\w/.:@+-]*|\*{3}|s3://[\w/.:@+-]+", value):
        return value
    return _quoted(value)
