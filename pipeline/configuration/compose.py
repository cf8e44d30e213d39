"""Composes the configuration with Hydra: overrides in, a `Config` out. Errors are one line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.compatible_servers import no_such_engine
from engines.errors import ConfigError, nearest, no_such
from engines.fallback_prices import with_lists
from engines.params import RESPONSE_FORMATS
from pipeline.config import OPEN_KEYS, Config, is_reference, without_secrets
from pipeline.configuration.errors import GROUPS, check_key, hydra_error, is_open, key_types
from pipeline.configuration.layer import Layer, leaves, value_of
from pipeline.configuration.options import conf_dir, keys_of, options, values_of
from pipeline.configuration.run_file import RunFile
from pipeline.configuration.saved import saved_layer


@dataclass(slots=True)
class Composed:
    """A configuration, and the texts from which it was made."""

    config: Config
    raw: dict[str, Any]  # section -> key -> value, with interpolations
    layer: Layer  # the part of the run file or saved configuration that no typed key replaces
    typed: list[str]  # the dotted keys that were typed
    options: dict[str, str]  # group -> the option that was typed or that a run file chooses

    @property
    def references(self) -> dict[str, str]:
        """The references to environment variables in the places of secrets: dotted key -> `Bearer ${oc.env:NAME}`."""
        return {name: value for name, value in leaves(self.raw) if is_reference(value)}

    @property
    def varies(self) -> bool:
        """True if the same words may name another dataset or output later: `${now:%Y-%m-%d}`."""
        return "${now:" in f"{self.raw['dataset']['path']} {self.raw['output']['path']}"


def compose(
    overrides: list[str],
    config_dir: str | None = None,
    saved: Mapping[str, Any] | None = None,
    run_file: RunFile | None = None,
) -> Config:
    """The configuration of these overrides: see `compose_all`."""
    return compose_all(overrides, config_dir, saved, run_file).config


def compose_all(
    overrides: list[str],
    config_dir: str | None = None,
    saved: Mapping[str, Any] | None = None,
    run_file: RunFile | None = None,
) -> Composed:
    """Composes these Hydra overrides. Raises `ConfigError`: one line, with the nearest known name.

    The overrides change the configuration `saved`, which an earlier run stored, or the keys of a run file, or else the
    packaged defaults. `RunFile.located` adds file and line to an error. Afterwards, `Config.check` knows all values of
    `run.mode`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _check_dir(config_dir)
    overrides = [re.sub(r"^hardware=\s*\[", "hardware.profiles=[", override) for override in overrides]
    words = [_readable(_checked(override, config_dir)) for override in overrides]
    layer = Layer()
    if saved is not None:
        layer = saved_layer(saved, overrides, options("engine", config_dir))
    elif run_file is not None:
        layer = run_file.layer
    layer = layer.under(overrides, lambda group, option: keys_of(group, option, config_dir))
    for group, option in layer.options.items():
        _checked(f"{group}={option}", config_dir)
    composed = _hydra(words, overrides, config_dir, layer)
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise hydra_error(error, overrides) from None
    assert isinstance(config, Config)
    layer.anchor(config)
    config.generation["response_format"] = _response_format(config.generation.get("response_format"))
    if config.dataset.template is not None:  # imported here, because Jinja is slow to import
        from pipeline.dataset.templates import template_text

        config.dataset.template = template_text(config.dataset.template)  # the content: other machines lack the file
    config.hardware.profiles = [
        _profile(f"hardware[{at}]", each, config_dir) for at, each in enumerate(config.hardware.profiles)
    ]
    with_lists(config.engine, Path(config_dir) / "price" if config_dir else None)
    # It fills the list of `run.mode`. It comes last because it imports pyarrow, which would delay errors of overrides.
    import pipeline.executors.registry  # noqa: F401

    raw: Any = OmegaConf.to_container(composed, resolve=False)
    typed = [word.lstrip("+~").partition("=") for word in overrides]
    chosen = layer.options | {name: value for name, _, value in typed if name in GROUPS and not value.startswith("{")}
    return Composed(config, raw, layer, [name for name, _, _ in typed if name not in chosen], chosen)


def _profile(name: str, given: Any, config_dir: str | None) -> Any:
    """An entry of a mixed fleet with the keys of the profile that it names. Raises `ConfigError` for an unknown profile."""
    entry = {"name": given} if isinstance(given, str) else given
    option = entry.get("name") if isinstance(entry, Mapping) else None
    if option is None:
        return given
    if option not in (known := options("hardware", config_dir)):
        raise ConfigError(f"{name}: {no_such('hardware', option, known)}", key=name)
    return values_of("hardware", option, config_dir) | {key: value for key, value in entry.items() if key != "name"}


def _check_dir(config_dir: str | None) -> None:
    if config_dir is None:
        return
    if not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir {config_dir} is not a directory")
    for group in GROUPS:
        if clash := set(options(group)) & {path.stem for path in Path(config_dir, group).glob("*.yaml")}:
            raise ConfigError(
                f"{config_dir}/{group}/{min(clash)}.yaml has the name of a packaged file; give it another name"
            )


def _hydra(words: list[str], overrides: list[str], config_dir: str | None, layer: Layer) -> Any:
    """What Hydra composes of the layer and of the words, which are `overrides` in its grammar."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    ConfigStore.instance().store(name="schema", node=Config)
    search = [f"hydra.searchpath=[file://{os.path.abspath(config_dir)}]"] if config_dir is not None else []
    try:
        with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
            return hydra_compose("config", [*layer.words(), *words, *search])
    except YAMLError as error:
        raise ConfigError(f"a file under --config-dir is not YAML: {' '.join(str(error).split())}") from None
    except (HydraException, OmegaConfBaseException) as error:
        given = [f"{name}={value_of(layer.values, name)}" for name in layer.names()]
        given += [f"{name}={value}" for name, value in leaves(layer.values)]
        raise hydra_error(error, [*given, *overrides]) from None


_FORMAT = "generation.response_format"


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
        raise ConfigError(
            f"{where} is not a file that can be read ({error.strerror}){_nearest_file(given)}, and not a schema",
            key=_FORMAT,
        ) from None
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}", key=_FORMAT) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{where} must hold a JSON schema, an object", key=_FORMAT)
    return found if found.get("type") in RESPONSE_FORMATS else {"type": "json_schema", "json_schema": {"schema": found}}


def _nearest_file(path: str) -> str:
    found = [each.name for each in Path(path).parent.glob("*.json")]
    return nearest(Path(path).name, found) if found else ""


_OVERRIDE = re.compile(r"^(?P<sign>\+\+|\+|~)?(?P<key>[^=@]+)(?P<package>@[^=]*)?(?P<value>=.*)?$", re.DOTALL)


def _checked(override: str, config_dir: str | None) -> str:
    """The override in Hydra's form. Raises `ConfigError` for an unknown key or option."""
    match = _OVERRIDE.match(override)
    if match is None or match["package"] or (match["value"] is None and match["sign"] != "~"):
        is_word = match is not None and "=" not in override
        hint = ", and the name of a run file ends in .yaml" if is_word else ""
        if is_word and Path(override).exists():
            hint = f": dataset.path={override} names a dataset, and a run file ends in .yaml"
        raise ConfigError(f"'{override}' is not of the form key=value{hint}")
    name, value = match["key"].strip(), match["value"]
    if match["sign"] == "~" and not is_open(name):
        instead = "" if name in GROUPS else f": {name}=null"
        raise ConfigError(f"'{override}' would remove a key; keys can only be set{instead}", key=name)
    if match["sign"] == "~" or name.startswith("hydra."):
        return override
    if name in GROUPS and value is not None:
        option = value[1:]
        if option.startswith("{") or option in options(name, config_dir):
            return f"{name}{value}"
        names = options(name, config_dir)
        text = no_such_engine(option, names) if name == "engine" else no_such(name, option, names)
        raise ConfigError(text, key=name)
    if is_open(name) or (name in OPEN_KEYS and value is not None and value.lstrip("= ").startswith("{")):
        return f"++{name}{value}"  # adds keys; without `++`, Hydra accepts only keys that exist
    check_key(name, override)
    return f"{name}{value}"


def _readable(override: str) -> str:
    """The override with a value that Hydra can read: JSON and YAML become Hydra's grammar, and other text is quoted.

    The value of a text key is also quoted if Hydra would not read it as text, such as `1e5`.
    """
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
    structure = "" if name == "generation.response_format" else _structure(value)  # its text may be a schema
    return f"{name}={structure or _quoted(value)}"


def _structure(value: str) -> str:
    """A JSON or YAML list or mapping in Hydra's grammar, which allows no quotes around keys; empty for any other text."""
    from yaml import YAMLError, safe_load

    try:
        found = safe_load(value) if value.lstrip()[:1] in ("{", "[") else None
        return _in_hydra(found) if isinstance(found, (dict, list)) else ""
    except (YAMLError, ValueError):
        return ""


def _quoted(text: str) -> str:
    """The text in Hydra's quotes, where a backslash is an escape only before a quote."""
    return "'" + re.sub(r"(\\*)(?:'|$)", lambda found: found[1] * 2 + ("\\'" if found[0].endswith("'") else ""), text) + "'"


def as_yaml(config: Config) -> str:
    """The composed configuration as YAML, as `--cfg job` prints it, without secrets."""
    from omegaconf import OmegaConf

    text: str = OmegaConf.to_yaml(OmegaConf.create(without_secrets(config)))
    return text


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
