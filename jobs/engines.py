"""`eagleray engines`: lists the engines: the place where each runs, what it needs, and if that is here now."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from engines.config import EngineConfig, config_from_keys
from engines.registry import REGISTRY, capabilities_of, kind_of
from jobs.reading import Arguments, print_json, say
from pipeline.configuration.compose import compose
from pipeline.configuration.options import options

PLACES = {"workers": "in the workers", "provider": "at the provider", "server": "on your server"}


@dataclass(frozen=True, slots=True)
class Need:
    """One thing that an engine needs. `here`: None if it was not checked."""

    kind: str  # package | variable | credentials | key
    name: str
    here: bool | None

    def __str__(self) -> str:
        missing = {"package": " (not installed)", "variable": " (not set)", "credentials": " (not checked)"}
        return self.name + ("" if self.here else missing.get(self.kind, ""))


def main(argv: list[str]) -> int:
    """Lists the engines. Returns the exit status."""
    what = "All engines: the place where each runs, the packages and variables it needs, and the features it supports."
    parser = Arguments("engines", what, "\n--json\n--config-dir my-conf", outputs=())
    parser.add_argument("--config-dir", metavar="DIR", help="also list your own engines in DIR/engine/")
    return parser.run(argv, _run)


def _run(args: argparse.Namespace, console: Console) -> int:
    found = [look(name, _config(name, args.config_dir)) for name in options("engine", args.config_dir)]
    if args.json:
        print_json(found)
        return 0
    yes_no = {True: "yes", False: "no", None: "maybe"}
    lines = [("engine", "usable", "runs", "needs", "supports")]
    for engine in found:
        needs = ", ".join(need["shown"] for need in engine["needs"]) or "-"
        lines.append(
            (engine["engine"], yes_no[engine["usable"]], PLACES[engine["runs"]], needs, ", ".join(engine["supports"]))
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for number, line in enumerate(lines):
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        say(console, "  ".join(cells).rstrip(), "" if number else "dim")
    return 0


def _config(name: str, config_dir: str | None) -> EngineConfig:
    """The keys of an engine's option. An option of the user's own may use Hydra's grammar."""
    return config_from_keys(name, {}) if name in REGISTRY else compose([f"engine={name}"], config_dir).engine


def look(name: str, config: EngineConfig) -> dict[str, Any]:
    """An engine as `--json` prints it. `usable` is null if credentials were not checked."""
    needs, place = list(needs_of(config)), place_of(config)
    states = {need.here for need in needs if need.kind != "key"}
    ended = config.provider.get("ended") or None
    usable = False if (ended and not config.base_url) or False in states else None if None in states else True
    return {
        "engine": name,
        "usable": usable,
        "runs": place,
        "needs": [{"kind": n.kind, "name": n.name, "here": n.here, "shown": str(n)} for n in needs],
        "supports": list(_features(config)),
        "model": config.model,
        "ended": ended,
    }


def place_of(config: EngineConfig) -> str:
    """A key of `PLACES`."""
    if not config.provider:
        return "workers"
    own = config.provider.get("self_hosted") or config.provider.get("auth") == "optional"
    return "server" if own and not config.base_url else "provider"


def needs_of(config: EngineConfig) -> Iterator[Need]:
    """The packages, variables and keys that an engine needs. Asks no service."""
    entry, provider = kind_of(config), config.provider
    package, extra = entry.package, entry.extra
    if provider.get("auth") == "google":
        package, extra = "google.auth", "vertex"
    if package is not None:
        yield Need("package", f"eagleray[{extra}]", _installed(package))
    if provider.get("auth") == "google":
        yield Need("credentials", "Google's credentials", _is_set("GOOGLE_APPLICATION_CREDENTIALS") or None)
    if provider.get("auth") == "aws":  # AWS's chain also reads files and asks services
        keys = _is_set("AWS_BEARER_TOKEN_BEDROCK") or (_is_set("AWS_ACCESS_KEY_ID") and _is_set("AWS_SECRET_ACCESS_KEY"))
        yield Need("credentials", "AWS's credentials", keys or None)
        yield Need("credentials", "AWS_REGION", _is_set("AWS_REGION") or _is_set("AWS_DEFAULT_REGION") or None)
    if config.api_key_env and provider.get("auth") != "optional":
        yield Need("variable", config.api_key_env, _is_set(config.api_key_env))
    for variable in (provider.get("environment") or {}).values():
        yield Need("variable", variable, _is_set(variable))
    if provider and provider.get("auth") != "aws" and not config.base_url:
        yield Need("key", "engine.base_url", None)


def _features(config: EngineConfig) -> Iterator[str]:
    found = capabilities_of(config)
    if found.images or kind_of(config).images_by_model:
        yield "images" if found.images else "images (by model)"
    yield from (name for name in ("json_schema", "regex", "grammar") if name in found.response_formats)
    flags = {
        "batches": config.provider.get("batch"), "model per row": found.row_model, "adapter per row": found.row_adapter,
        "continued answers": found.prefill,
    }  # fmt: skip
    yield from (name for name, has in flags.items() if has)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # a package above it
        return False


def _is_set(variable: str) -> bool:
    return bool(os.environ.get(variable, "").strip())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
