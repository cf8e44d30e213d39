"""The messages for wrong overrides and configuration files: which key is wrong, and the nearest known key."""

from __future__ import annotations

import re
from dataclasses import fields

from engines.config import Price
from engines.errors import ConfigError, ErrorCode, closest, nearest
from engines.validation import TYPE_WORDS
from pipeline.config import OPEN_KEYS, known_keys

GROUPS = ("engine", "hardware", "dataset", "generation", "output", "run")
SECTIONS = (*GROUPS, "serve", "tune")


def key_types() -> dict[str, str]:
    """Dotted key -> the type that its dataclass declares, as text."""
    found = {name: str(item.type) for name, item in known_keys().items()}
    return found | {f"engine.price.{item.name}": str(item.type) for item in fields(Price)}


def is_open(name: str) -> bool:
    """True for a key in a section that accepts any key, such as `engine.kwargs`."""
    return any(name.startswith(f"{key}.") for key in OPEN_KEYS)


def is_plain(declared: str) -> bool:
    """True for a declared type whose values have no keys of their own."""
    return declared.removesuffix(" | None") in TYPE_WORDS


def check_key(name: str, shown: str = "") -> None:
    """Raises `ConfigError` for a key that does not exist. `shown` is the whole override."""
    known = key_types()
    if name in known or is_open(name):
        return
    above = next((key for key in known if name.startswith(f"{key}.")), None)
    if above is None or above == "engine.price":
        raise no_such_key(name)
    if is_plain(known[above]):
        raise ConfigError(f"{above} takes a value and has no keys of its own: '{shown or name}'", key=above)


def no_such_key(name: str) -> ConfigError:
    """The error for an unknown key, with the nearest key of its section, or of any section if none is given."""
    hint, key = _hint(name)
    return ConfigError(f"there is no key '{name}'{hint}", key=key)


def _hint(name: str) -> tuple[str, str | None]:
    """The hint, and the key or section that it is about."""
    known = list(key_types())
    section, _, rest = name.lower().partition(".")
    if not rest:
        return _hint_without_section(section, known)
    mine = closest(section, SECTIONS)
    if mine is None:
        return nearest(section, SECTIONS), None
    keys = [key.partition(".")[2] for key in known if key.startswith(f"{mine}.")]
    if not rest.startswith("price."):
        rest = rest.partition(".")[0]
    if close := closest(rest, keys):
        return f" (did you mean '{mine}.{close}'?)", f"{mine}.{close}"
    return nearest(rest, [key for key in keys if key.startswith("price.") == rest.startswith("price.")]), mine


def _hint_without_section(name: str, known: list[str]) -> tuple[str, str | None]:
    """The hint for a section that does not exist, or for a key whose section was forgotten."""
    plain = [*SECTIONS, *(key for key in known if "." not in key)]
    close = closest(name, [*plain, *(key.partition(".")[2] for key in known)])
    if close is None:
        return nearest(name, SECTIONS), None
    found = [close] if close in plain else [key for key in known if key.partition(".")[2] == close]
    return f" (did you mean {' or '.join(repr(key) for key in found)}?)", found[0]


def hydra_error(error: BaseException, overrides: list[str]) -> ConfigError:
    """The error of Hydra or OmegaConf in one line: the key, and what its value must be."""
    from omegaconf import errors as omega

    text = str(error)
    if getattr(error, "override", None) is not None:
        read = str(error.override)  # type: ignore[attr-defined]
        given = next((o for o in overrides if read.lstrip("+").startswith(f"{_name(o)}=")), read)
        return ConfigError(f"cannot read '{given}': a key has letters, digits, '_' and '-', with dots between")
    ambiguous = re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", text)
    if ambiguous is not None:
        name, text = ambiguous[1].lstrip("+"), ambiguous[2]
        both = f'{name}={text} is either a list, "{name}=[{text}]", or a text, "{name}=\'{text}\'"'
        return ConfigError(both, key=name)
    key, cause = re.search(r"full_key: (\S+)", text), error.__cause__
    if key is None and cause is not None and "full_key" in str(cause):
        return hydra_error(cause, overrides)
    first = _first_line(error)
    references = (omega.GrammarParseError, omega.InterpolationResolutionError, omega.UnsupportedInterpolationType)
    if key is not None and isinstance(error, references):
        return _about_reference(key[1], first)
    return _about_key(key[1], first, overrides) if key else ConfigError(first)


def _about_reference(name: str, first: str) -> ConfigError:
    """The error for `${…}` in the value of a key, or in a part of it such as `generation.stop[0]`."""
    key = next((each for each in key_types() if re.match(rf"{re.escape(each)}($|[.\[])", name)), name)
    if (variable := re.search(r"Environment variable '(\w+)' not found", first)) is not None:
        text = f"{name}: the environment variable {variable[1]} is not set"
        return ConfigError(text, code=ErrorCode.KEY_MISSING, key=key)
    text = f"{name}: ${{…}} refers to another value, which cannot be found or used ({first}); write \\${{ for the text ${{"
    return ConfigError(text, key=key)


def _first_line(error: BaseException) -> str:
    """The first line of a message, or the first two of a message about a file, whose first line ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    first = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return first.replace("ValidationError raised while composing config: ", "")


def _about_key(name: str, first: str, overrides: list[str]) -> ConfigError:
    """The error for a wrong value of a key, or for a key that does not exist. `first` is what the library says."""
    known = key_types()
    if name not in known and not is_open(name):
        return no_such_key(name)
    declared = known.get(name, "str")
    wanted = "keys with values, such as {a: b}" if name in OPEN_KEYS else TYPE_WORDS.get(declared.removesuffix(" | None"))
    if wanted is None:
        return ConfigError(f"{name}: {first}", key=name)
    value = next((o.partition("=")[2] for o in reversed(overrides) if _name(o) == name), None)
    if value is None:
        return ConfigError(f"{name} must be {wanted}: {first}", key=name)
    null = " or null" if declared.endswith(" | None") else ""
    return ConfigError(f"{name} must be {wanted}{null}, not {value}", key=name)


def _name(override: str) -> str:
    return override.partition("=")[0].lstrip("+")
