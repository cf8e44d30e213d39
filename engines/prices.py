"""What a provider's models cost: dated list prices in `conf/price/<engine>.yaml`, and in a folder of the user's own.

    as_of: 2026-03-01          # the day on which these were the list prices
    source: https://…          # where they stood
    models:
      gpt-4o-mini: {input: 0.15, cached_input: 0.075, output: 0.6}   # US$ per million tokens

A model's dated and `-latest` names (`gpt-4o-mini-2024-07-18`) cost the same, unless they are named themselves.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engines.config import EngineConfig, Price
from engines.errors import ConfigError, nearest
from engines.registry import fallbacks

RATES = ("input", "cached_input", "output")
_VERSION = re.compile(r"-(\d{4}-?\d{2}-?\d{2}|latest)$")


def priced(config: EngineConfig, folder: Path | None = None) -> Price:
    """The price of this engine's model: what `config.price` says, the rest from the lists; `folder`'s come first."""
    given = config.price
    if not config.model or (given.input is not None and given.output is not None):
        return given
    found = _find(config.kind, config.model, folder) or Price()
    return replace(found, **{name: value for name, value in asdict(given).items() if value is not None})


def _find(kind: str, model: str, folder: Path | None) -> Price | None:
    for where in filter(None, (folder, importlib.resources.files("conf") / "price")):
        listed = _listed(where / f"{kind}.yaml")
        rates = listed["models"].get(model) or listed["models"].get(_VERSION.sub("", model))
        if rates is not None:
            return Price(**rates, as_of=listed["as_of"])
    return None


def _listed(where: Any) -> dict[str, Any]:
    """A price list, checked. Raises `ConfigError`."""
    import yaml

    if not where.is_file():
        return {"models": {}, "as_of": None}
    try:
        listed = yaml.safe_load(where.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{where} cannot be read: {' '.join(str(error).split())[:300]}") from None
    models = listed.get("models") if isinstance(listed, Mapping) else None
    if not isinstance(models, Mapping) or not listed.get("as_of"):
        raise ConfigError(f"{where}: a price list has 'as_of', a date, and 'models', each with input and output")
    for model, rates in models.items():
        if not isinstance(rates, Mapping) or not {"input", "output"} <= rates.keys():
            raise ConfigError(f"{where}: '{model}' needs input and output, in US$ per million tokens")
        for name, value in rates.items():
            if name not in RATES:
                raise ConfigError(f"{where}: '{model}' has no '{name}'{nearest(str(name), RATES)}")
            if not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"{where}: {name} of '{model}' must be a number of at least 0, not {value!r}")
    return {"models": {str(model): dict(rates) for model, rates in models.items()}, "as_of": str(listed["as_of"])}


def most_expensive(config: EngineConfig) -> Price:
    """What a row may cost at most by its tokens: where it may go on to `engine.fallback`, all of them together. Raises
    `ConfigError` where the price of one of them is not known."""
    total = Price(0.0, None, 0.0)
    for engine in (config, *fallbacks(config)):
        price = priced(engine)
        if price.input is None or price.output is None:
            raise ConfigError(
                f"run.budget_usd needs a price, and none is known for engine={engine.kind} model={engine.model}: "
                "give engine.price.input and engine.price.output, in US$ per million tokens"
            )
        total = Price((total.input or 0.0) + price.input, None, (total.output or 0.0) + price.output)
    return total
