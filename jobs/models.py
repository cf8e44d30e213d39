"""`eagleray models ENGINE`: the models that a provider has now, with shutdown dates and our list prices."""

from __future__ import annotations

import importlib.resources
import sys
from dataclasses import asdict
from functools import partial
from typing import Any

from engines.config import EngineConfig, Price
from engines.errors import ConfigError, EngineError
from engines.text import visible
from jobs.infer import start
from pipeline.config import Config

OK, WRONG, DATED = 0, 2, 3
_RATES = ("input", "cached_input", "output")


def main(argv: list[str]) -> int:
    """Lists the models of an engine. Returns the exit status."""
    words = [f"engine={word}" if word[:1] != "-" and "=" not in word else word for word in argv if word != "--json"]
    flags = ("--config-dir", "--env-file")  # their values are no names of engines
    for at, word in enumerate(words[1:], 1):
        if words[at - 1] in flags:
            words[at] = word.removeprefix("engine=")
    return start(words, help_text, partial(_run, words, "--json" in argv))


def help_text() -> str:
    return """\
The models that a provider has now, from the provider's own list, with the days on which they end, and our list prices in
US$ per million tokens.

  eagleray models ENGINE [--json] [key=value …]

Examples:
  eagleray models openai
  eagleray models anthropic --json
  eagleray models openai_compatible engine.base_url=http://localhost:11434/v1

Takes the keys under `engine`, --config-dir and --env-file, as `eagleray infer` does. If the provider gives no list, for
example because its API key is not set, the reason is printed, and the models of our dated price list are shown.

Exit status: 0 the provider's list; 3 our dated list; 2 no list, or a wrong configuration."""


def _run(words: list[str], as_json: bool, config: Config) -> int:
    if not any(word.startswith(("engine=", "engine.kind=")) for word in words):
        raise ConfigError("missing: ENGINE (eagleray engines lists them)", key="engine")
    if len(kinds := [word for word in words if word.startswith("engine=")]) > 1:
        raise ConfigError(f"one ENGINE at a time, not {len(kinds)}", key="engine")
    engine, problem = config.engine, None
    try:
        found = from_provider(engine)
    except (ConfigError, EngineError) as error:
        found, problem = from_prices(engine), error
        if not found["models"]:
            raise ConfigError(error, code=error.code, key=error.key) from None
        print(f"eagleray: {visible(' '.join(str(error).split()))}", file=sys.stderr)
    if as_json:
        from jobs.reading import print_json

        print_json({"engine": engine.kind, **found, "problem": problem and str(problem)})
    else:
        _show(engine.kind, found)
    return DATED if problem else OK


def from_provider(config: EngineConfig) -> dict[str, Any]:
    """The provider's list. Raises `ConfigError` and `EngineError`."""
    from engines.prices import list_price
    from engines.registry import missing_package
    from engines.remote.model_list import list_models

    if missing := missing_package(config.kind, config.provider):
        raise missing
    url, listed = list_models(config)
    models = []
    for model in listed:
        price = list_price(config, model.id)
        models.append({"id": model.id, "context": model.context, "ends": model.ends or price.ends, "price": _known(price)})
    return {"source": "provider", "url": url, "models": models}


def from_prices(config: EngineConfig) -> dict[str, Any]:
    """The models of our price list and of the user's own."""
    from engines.prices import list_price, listed_prices

    listed = listed_prices(importlib.resources.files("conf") / "price" / f"{config.kind}.yaml")
    models = []
    for name in sorted({*listed["models"], *(config.provider.get("prices") or {})}):
        price = list_price(config, name)
        models.append({"id": name, "context": None, "ends": price.ends, "price": _known(price)})
    return {"source": "price list", "url": None, "models": models}


def _known(price: Price) -> dict[str, Any] | None:
    rates = asdict(price)
    return {name: rates[name] for name in (*_RATES, "cache_write", "above", "batch", "as_of")} if price.known else None


def _show(kind: str, found: dict[str, Any]) -> None:
    from jobs.reading import OutputConsole, say

    console, models = OutputConsole(), found["models"]
    days = sorted({model["price"]["as_of"] for model in models if model["price"] and model["price"]["as_of"]})
    prices = f"; prices of {' and '.join(days)}, US$ per million tokens" if days else "; no price is known here"
    where = found["url"] or "our price list"
    say(console, f"engine={kind}: {len(models):,} models in {where}{prices}", "bold")
    lines: list[tuple[str, ...]] = [("model", "context", "ends", "input", "cached", "output")]
    for model in models:
        price = model["price"] or {}
        rates = ("" if price.get(name) is None else f"{price[name]:g}" for name in _RATES)
        context = f"{model['context']:,}" if model["context"] else ""
        lines.append((visible(model["id"], "?"), context, model["ends"] or "", *rates))
    shown = [at for at in range(6) if any(line[at] for line in lines[1:])]  # without empty columns
    widths = [max(len(line[at]) for line in lines) for at in range(6)]
    for number, line in enumerate(lines if models else []):
        cells = (line[at].rjust(widths[at]) if at not in (0, 2) else line[at].ljust(widths[at]) for at in shown)
        say(console, "  ".join(cells).rstrip(), "" if number else "dim")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
