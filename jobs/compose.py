"""Hydra on the driver: overrides in, a checked `Config` out, and errors of one line."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from engines.config import Price
from engines.errors import ConfigError, nearest
from engines.fallback_prices import with_lists
from engines.params import RESPONSE_FORMATS
from pipeline.config import OPEN_KEYS, Config, known_keys, without_secrets

GROUPS = ("engine", "hardware", "dataset", "generation", "output", "run")
SECTIONS = (*GROUPS, "serve")


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
    from yaml import YAMLError

    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir {config_dir} is not a directory")
    for group in GROUPS if config_dir is not None else ():
        if clash := set(options(group)) & {path.stem for path in Path(str(config_dir), group).glob("*.yaml")}:
            raise ConfigError(f"{config_dir}/{group}/{min(clash)}.yaml has the name of a packaged file; name it otherwise")
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
        raise ConfigError(_one_line(error, overrides)) from None
    assert isinstance(config, Config)
    config.generation["response_format"] = _response_format(config.generation.get("response_format"))
    with_lists(config.engine, Path(config_dir) / "price" if config_dir else None)
    return config


def _response_format(given: Any) -> Any:
    """A text is JSON, or names a file with it: a schema, or a whole response_format, by which the run goes from here on."""
    if not isinstance(given, str):
        return given
    where = f"generation.response_format={given}"
    try:
        found = json.loads(given if given.lstrip().startswith("{") else Path(given).read_bytes())
    except OSError as error:
        raise ConfigError(f"{where} is not a file that can be read ({error.strerror}), and no schema") from None
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{where} must hold a JSON schema, an object")
    return found if found.get("type") in RESPONSE_FORMATS else {"type": "json_schema", "json_schema": {"schema": found}}


_OVERRIDE = re.compile(r"^(?P<sign>\+\+|\+|~)?(?P<key>[^=@]+)(?P<package>@[^=]*)?(?P<value>=.*)?$", re.DOTALL)


def _checked(override: str, config_dir: str | None) -> str:
    """The override as Hydra wants it; refuses names that no schema knows."""
    match = _OVERRIDE.match(override)
    if match is None or match["package"] or (match["value"] is None and match["sign"] != "~"):
        raise ConfigError(f"'{override}' is not of the form key=value")
    name, value = match["key"].strip(), match["value"]
    is_open = any(name.startswith(f"{key}.") for key in OPEN_KEYS)
    if match["sign"] == "~" and not is_open:
        instead = "" if name in GROUPS else f": {name}=null"
        raise ConfigError(f"'{override}' would remove a key; keys can only be set{instead}")
    if match["sign"] == "~" or name.startswith("hydra."):
        return override
    if name in GROUPS and value is not None:
        option = value[1:]
        if option.startswith("{") or option in options(name, config_dir):
            return f"{name}{value}"
        raise ConfigError(f"there is no {name} '{option}'{nearest(option, options(name, config_dir))}")
    if is_open:
        return f"++{name}{value}"
    known = _types()
    if name not in known:
        above = next((key for key in known if name.startswith(f"{key}.")), None)
        if above is None or above == "engine.price":
            raise ConfigError(f"there is no key '{name}'{_nearest_key(name)}")
        if known[above].removesuffix(" | None") in _EXPECTED:
            raise ConfigError(f"{above} takes a value and has no keys of its own: '{override}'")
    return f"{name}{value}"


def _types() -> dict[str, str]:
    """Every key, dotted, with the type its dataclass declares, as text."""
    found = {name: str(item.type) for name, item in known_keys().items()}
    return found | {f"engine.price.{item.name}": str(item.type) for item in fields(Price)}


def _nearest_key(name: str) -> str:
    """`" (did you mean 'x'?)"` for a key nobody knows: in its section, or with the section that was forgotten."""
    known = list(_types())
    section, _, rest = name.lower().partition(".")
    if not rest:
        leaves = [*SECTIONS, *(key.partition(".")[2] for key in known)]
        close = difflib.get_close_matches(section, leaves, n=1)
        if not close:
            return nearest(section, SECTIONS)
        found = close if close[0] in SECTIONS else [key for key in known if key.partition(".")[2] == close[0]]
        return f" (did you mean {' or '.join(repr(key) for key in found)}?)"
    sections = difflib.get_close_matches(section, SECTIONS, n=1)
    if not sections:
        return nearest(section, SECTIONS)
    mine = [key.partition(".")[2] for key in known if key.startswith(f"{sections[0]}.")]
    if not rest.startswith("price."):
        rest = rest.partition(".")[0]
    close = difflib.get_close_matches(rest, mine, n=1)
    if close:
        return f" (did you mean '{sections[0]}.{close[0]}'?)"
    return nearest(rest, [key for key in mine if key.startswith("price.") == rest.startswith("price.")])


def _readable(override: str) -> str:
    """Quotes a value that is meant as text: no expression of Hydra's, such as a Jinja template, or `1e5` and `a,b`
    where a text belongs."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    name, _, value = override.partition("=")
    is_text = name == "dataset.template" or _types().get(name, "").startswith("str")
    try:
        parsed = OverridesParser.create().parse_override(override)
        if not is_text or not (parsed.is_sweep_override() or isinstance(parsed.value(), (bool, int, float))):
            return override
    except HydraException:
        pass
    return f"{name}={_quoted(value)}"


def _quoted(text: str) -> str:
    """In Hydra's quotes a backslash means itself but before a quote."""
    return "'" + re.sub(r"(\\*)(?:'|$)", lambda found: found[1] * 2 + ("\\'" if found[0].endswith("'") else ""), text) + "'"


_EXPECTED = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}


def _one_line(error: Exception, overrides: list[str]) -> str:
    """The telling line of a Hydra or OmegaConf error, with the key it speaks of and what would be right there."""
    text = str(error)
    if getattr(error, "override", None) is not None:
        read = str(error.override)  # type: ignore[attr-defined]
        given = next((o for o in overrides if read.lstrip("+").startswith(f"{o.partition('=')[0].lstrip('+')}=")), read)
        return f"cannot read '{given}': a key is made of letters, digits, '_' and '-', with dots between"
    ambiguous = re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", text)
    if ambiguous is not None:
        name, text = ambiguous[1].lstrip("+"), ambiguous[2]
        return f'{name}={text} is either a list, "{name}=[{text}]", or a text, "{name}=\'{text}\'"'
    key = re.search(r"full_key: (\S+)", text)
    cause = error.__cause__
    if key is None and cause is not None and "full_key" in str(cause):
        return _one_line(cause, overrides)  # type: ignore[arg-type]
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    # Of a file: "In 'engine/mine': ValidationError raised while composing config:", and then what it is.
    first = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    first = first.replace("ValidationError raised while composing config: ", "")
    if key is None:
        return first
    name, known = key[1], _types()
    is_open = any(name.startswith(f"{open_key}.") for open_key in OPEN_KEYS)
    if name not in known and not is_open:
        return f"there is no key '{name}'{_nearest_key(name)}"
    if "interpolation" in first.lower():
        return f"{name}: {first}"
    annotation = known.get(name, "str")
    optional = annotation.endswith(" | None")
    wanted = _EXPECTED.get(annotation.removesuffix(" | None"))
    if wanted is None and name in OPEN_KEYS:
        wanted = "keys with values, such as {a: b}"
    value = next((o.partition("=")[2] for o in reversed(overrides) if o.partition("=")[0].lstrip("+") == name), None)
    if wanted is None:
        return f"{name}: {first}"
    if value is None:
        return f"{name} must be {wanted}: {first}"
    return f"{name} must be {wanted}{' or null' if optional else ''}, not {value}"


def as_yaml(config: Config) -> str:
    """The composed configuration as YAML, as `--cfg job` prints it, without secrets."""
    from omegaconf import OmegaConf

    text: str = OmegaConf.to_yaml(OmegaConf.create(without_secrets(config)))
    return text


def command_of(config: Mapping[str, Any]) -> list[str] | None:
    """The words of the command that stands for a configuration, as manifests have it; None where none says it exactly."""
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
    """What to set, beginning with `base`, in order to get `value`."""
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
    """A value in the grammar of Hydra's overrides."""
    if isinstance(value, Mapping):
        if not all(re.fullmatch(r"[\w-]+", str(name)) for name in value):
            raise ValueError("a key that overrides cannot have")
        return "{" + ",".join(f"{name}:{_in_hydra(item, True)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_in_hydra(item, True) for item in value) + "]"
    if not isinstance(value, str):
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    if not inside and re.fullmatch(r"[A-Za-z_/.][\w/.:@+-]*|\*{3}|s3://[\w/.:@+-]+", value):
        return value
    return _quoted(value)
