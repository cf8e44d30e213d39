"""What a provider's models cost: dated list prices in `conf/price/<engine>.yaml`, and in a folder of the user's own.

    as_of: 2026-03-01          # the day on which these were the list prices
    source: https://…          # where they stood
    models:
      gpt-4o-mini: {input: 0.15, cached_input: 0.075, output: 0.6}   # US$ per million tokens

A model's dated and `-latest` names (`gpt-4o-mini-2024-07-18`) cost the same, unless they are named themselves.
`cache_write` is the rate for tokens written to the prompt cache for 5 minutes; for Claude it is 1.25 times `input` where no
list has it.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engines.config import RATE, EngineConfig, Price
from engines.errors import ConfigError, nearest
from engines.validation import check_value

RATES = ("input", "cached_input", "cache_write", "output")
# Writing to the prompt cache for 5 minutes, as a multiple of `input`, by model (2026-11: Anthropic, and Claude elsewhere).
_CACHE_WRITE = {re.compile(r"\bclaude\b"): 1.25}
_VERSION = re.compile(r"-(\d{4}-?\d{2}-?\d{2}|latest)$")


def priced(config: EngineConfig, folder: Path | None = None) -> Price:
    """The price of this engine's model: what `config.price` says, the rest from the lists; `folder`'s come first."""
    given = config.price
    if not config.model:
        return given
    if given.input is None or given.output is None:
        found = list_price(config, config.model, folder)
        given = replace(found, **{name: value for name, value in asdict(given).items() if value is not None})
    return _with_cache_write(given, config.model)


def price_of(config: EngineConfig, asked: str | None, answered: str | None) -> Price:
    """The price of a row: that of the model it asked for, else that of the model that answered. `config.price` is the
    price of `config.model` only.
    """
    price = priced(config) if asked in (None, config.model) else list_price(config, str(asked))
    if not price.known and answered is not None and answered != config.model:
        return list_price(config, answered)
    return price


def list_price(config: EngineConfig, model: str, folder: Path | None = None) -> Price:
    """A model's price by `folder`, by `engine.provider.prices`, or by the packaged lists, in this order."""
    lists = [listed_prices(folder / f"{config.kind}.yaml")] if folder else []
    lists.append({"models": config.provider.get("prices") or {}, "as_of": None})
    lists.append(listed_prices(importlib.resources.files("conf") / "price" / f"{config.kind}.yaml"))
    for listed in lists:
        rates = listed["models"].get(model) or listed["models"].get(_VERSION.sub("", model))
        if rates is not None:
            return _with_cache_write(Price(**{"as_of": listed["as_of"], **rates}), model)
    return Price()


def _with_cache_write(price: Price, model: str) -> Price:
    factor = next((factor for name, factor in _CACHE_WRITE.items() if name.search(model)), None)
    if factor is None or price.cache_write is not None or price.input is None:
        return price
    return replace(price, cache_write=factor * price.input)


def listed_prices(where: Any) -> dict[str, Any]:
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
            check_value(f"{where}: {name} of '{model}'", value, RATE)
    return {"models": {str(model): dict(rates) for model, rates in models.items()}, "as_of": str(listed["as_of"])}
