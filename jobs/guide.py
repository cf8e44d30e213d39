"""Where the documentation says more about an error: the last words of the line that tells it."""

from __future__ import annotations

import re

from engines.registry import REGISTRY

CONFIGURATION, ENGINES, ERRORS = "docs/configuration.md", "docs/engines.md", "docs/errors.md"

# What the message of a stop holds, or of a mistake -> its section of docs/errors.md; the first that is found.
STOPS = {
    "refuses the key": "auth",
    "run.max_error": "too-many-failed-rows",
    "run.budget_usd": "budget",
    "engines died": "engines-that-die",
    "has not answered for": "a-server-that-does-not-answer",
    "eagleray batch cancel": "batches",
    "have no answer though": "rows-without-an-answer",
    "rows are still missing": "rows-without-an-answer",
    "reading the input failed": "input-that-cannot-be-read",
    "could not read or write": "a-disk-or-store-that-fails",
    "putting the output together failed": "a-disk-or-store-that-fails",
}
MISTAKES = {
    "batches under way": "batches",
    "has no batch API": "batches",
    "another run is writing": "another-run-writes-there",
    "RAY_ADDRESS": "no-ray-cluster",
    "(see hardware=": "no-room-for-a-replica",
    "also installs a package": "packages-of-the-same-name",
}
STOPPED, WRONG = "4-stopped-early", "2-wrong-configuration"

_KEY = re.compile(r"\b[a-z]+\.[a-z_]+")
_ENGINE = re.compile(r"\bengine=([a-z_]+)")
_GROUP = re.compile(r"there is no ([a-z]+) '")


def anchor(key: str) -> str:
    """The anchor of a key in docs/configuration.md: `engine.base_url` has `enginebase_url`."""
    return key.replace(".", "")


def see(text: str, *, stopped: bool = False) -> str:
    """`"(see docs/…#…)"` for the message of an error: its own section, or that of the first known key it names."""
    return f"(see {place(text, stopped=stopped)})"


def see_type(error_type: str) -> str:
    """The same for the type of a row's error."""
    return f"(see {ERRORS}#{error_type})"


def place(text: str, *, stopped: bool = False) -> str:
    """A file of docs/ and an anchor in it."""
    from pipeline.config import known_keys

    for phrase, section in (STOPS if stopped else MISTAKES).items():
        if phrase in text:
            return f"{ERRORS}#{section}"
    if stopped:
        return f"{ERRORS}#{STOPPED}"
    known, named = known_keys(), _KEY.findall(text)
    key = next((name for name in named if name in known), None)
    engine = next((name for name in _ENGINE.findall(text) if name in REGISTRY), None)
    if engine and key in (None, "engine.kwargs"):  # how it is installed, and what its keywords are
        return f"{ENGINES}#{engine}"
    if key:
        return f"{CONFIGURATION}#{anchor(key)}"
    sections = {name.partition(".")[0] for name in known}
    for name in (*_GROUP.findall(text), *(name.partition(".")[0] for name in named)):
        if name in sections:
            return f"{CONFIGURATION}#{name}"
    return f"{ERRORS}#{WRONG}"
