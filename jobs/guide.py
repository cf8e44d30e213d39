"""The link to the documentation at the end of the line that reports an error."""

from __future__ import annotations

from engines.errors import ConfigError, EaglerayError, ErrorCode, docs_link
from engines.registry import REGISTRY

CONFIGURATION, ENGINES = "docs/configuration.md", "docs/engines.md"


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

    A wrong configuration without a section of its own leads to its key or engine instead, if the error carries one.
    """
    link = docs_link(error.code)
    if isinstance(error, ConfigError) and link == docs_link(ErrorCode.CONFIGURATION):
        return place_of_key(error.key) or link
    return link


def place_of_key(key: str | None) -> str | None:
    """The section of a configuration key, of a section of keys, or of an engine (`engine=vllm`).

    A key inside another one (`engine.kwargs.n_ctx`) has the section of that one.
    """
    from pipeline.config import known_keys

    if key is None:
        return None
    if key.startswith("engine="):
        kind = key.removeprefix("engine=")
        return f"{ENGINES}#{kind}" if kind in REGISTRY else f"{CONFIGURATION}#engine"
    key = key.partition("[")[0]  # hardware[1].gpus
    known = {*known_keys(), *(name.partition(".")[0] for name in known_keys())}
    while key and key not in known:
        key = key.rpartition(".")[0]
    return f"{CONFIGURATION}#{anchor(key)}" if key else None
