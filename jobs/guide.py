"""The link to the documentation at the end of the line that reports an error."""

from __future__ import annotations

import re

from engines.errors import ConfigError, EaglerayError, ErrorCode, docs_link
from engines.registry import REGISTRY

CONFIGURATION, ENGINES = "docs/configuration.md", "docs/engines.md"

_KEY = re.compile(r"\b[a-z]+\.[a-z_]+")
_ENGINE = re.compile(r"\bengine=([a-z_]+)")
_GROUP = re.compile(r"there is no ([a-z]+) '")


def anchor(key: str) -> str:
    """The anchor of a key in docs/configuration.md: `engine.base_url` has `enginebase_url`."""
    return key.replace(".", "")


def see(error: EaglerayError) -> str:
    """`"(see docs/…#…)"` for an error."""
    return f"(see {place(error)})"


def see_type(error_type: str) -> str:
    """The same for the type of a row's error."""
    return f"(see {docs_link(error_type)})"


def place(error: EaglerayError) -> str:
    """The file and anchor in docs/ that explain an error. Its code decides.

    A wrong configuration without a section of its own leads to its key, or to its engine, instead.
    """
    link = docs_link(error.code)
    if isinstance(error, ConfigError) and link == docs_link(ErrorCode.CONFIGURATION):
        return place_of_key(error.key) or place_named_in(str(error)) or link
    return link


def place_of_key(key: str | None) -> str | None:
    """The section of a configuration key, of a section of keys, or of an engine (`engine=vllm`)."""
    from pipeline.config import known_keys

    if key is None:
        return None
    if key.startswith("engine="):
        return f"{ENGINES}#{key.removeprefix('engine=')}"
    if key in known_keys() or key in {name.partition(".")[0] for name in known_keys()}:
        return f"{CONFIGURATION}#{anchor(key)}"
    return None


def place_named_in(text: str) -> str | None:
    """The section of the first key or engine that a message names, for errors that carry no `key`.

    Messages always name their key, because people need it. Nothing but the link depends on this.
    """
    from pipeline.config import known_keys

    known, named = known_keys(), _KEY.findall(text)
    key = next((name for name in named if name in known), None)
    engine = next((name for name in _ENGINE.findall(text) if name in REGISTRY), None)
    if engine and key in (None, "engine.kwargs"):  # how to install it, and its keywords
        return f"{ENGINES}#{engine}"
    if key:
        return f"{CONFIGURATION}#{anchor(key)}"
    sections = {name.partition(".")[0] for name in known}
    names = (*_GROUP.findall(text), *(name.partition(".")[0] for name in named))
    section = next((name for name in names if name in sections), None)
    return f"{CONFIGURATION}#{section}" if section else None
