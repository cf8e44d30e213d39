"""Prices of providers' models: dated list prices in `conf/price/<engine>.yaml`, and in a folder of the user's own.

    as_of: 2026-11-04          # the day on which these were the list prices
    source: https://…          # the page with the prices
    models:
      gpt-5.4-mini:
        {input: 0.75, cached_input: 0.075, output: 4.5,        # US$ per million tokens
         above: {tokens: 272000, input: 1.5, output: 6.75},    # a whole request with more input tokens than this
         batch: {input: 0.375, output: 2.25},                  # in the provider's batches
         ends: "2027-04-01"}                                   # the provider switches the model off

A model's dated and `-latest` names (`gpt-5.4-mini-2026-03-17`) have the price of the plain name, unless a list names them.
A user's fine-tuned models (`ft:gpt-4.1-mini:my-org::id`) have the price of the entry `ft:gpt-4.1-mini`.
`cache_write` is the rate for tokens written to the prompt cache for 5 minutes. If no list has it for a Claude model, it is
1.25 times `input`.
"""

from __future__ import annotations

import datetime
import importlib.resources
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from engines.config import EngineConfig, Price
from engines.errors import ConfigError, nearest
from engines.validation import check_fields

# Writing to the prompt cache for 5 minutes, as a multiple of `input`, by model (2026-11: Anthropic, and Claude elsewhere).
_CACHE_WRITE = {re.compile(r"\bclaude\b"): 1.25}
_LISTED = tuple(f.name for f in fields(Price) if f.name != "as_of")
_VERSION = re.compile(r"-(\d{4}-?\d{2}-?\d{2}|latest)$")


def priced(config: EngineConfig, folder: Path | None = None) -> Price:
    """The price of this engine's model. `config.price` comes first, then the lists in `folder`, then the other lists."""
    given = config.price
    if not config.model:
        return given
    if given.input is None or given.output is None:
        found = list_price(config, config.model, folder)
        if given.input is not None or given.output is not None:  # the list's rates for long prompts and batches differ
            found = replace(found, above={}, batch={})
        given = replace(found, **{name: value for name, value in asdict(given).items() if value not in (None, {})})
    return _with_cache_write(given, config.model)


def price_of(config: EngineConfig, asked: str | None, answered: str | None) -> Price:
    """The price of the model that the row asked for. If it is unknown, the price of the model that answered.

    `config.price` is the price of `config.model` only.
    """
    price = priced(config) if asked in (None, config.model) else list_price(config, str(asked))
    if not price.known and answered is not None and answered != config.model:
        return list_price(config, answered)
    return price


def list_price(config: EngineConfig, model: str, folder: Path | None = None) -> Price:
    """A model's price by `folder`, by `engine.provider.prices`, or by the packaged lists, in this order."""
    lists = [listed_prices(folder / f"{config.kind}.yaml")] if folder else []
    lists.append({"models": provider_prices(config.provider), "as_of": None})
    lists.append(listed_prices(importlib.resources.files("conf") / "price" / f"{config.kind}.yaml"))
    for listed in lists:
        rates = next((rates for name in _names(model) if (rates := listed["models"].get(name))), None)
        if rates is not None:
            return _with_cache_write(Price(**{"as_of": listed["as_of"], **rates}), model)
    return Price()


def _names(model: str) -> list[str]:
    """The names under which a list may have a model."""
    if model.startswith("ft:"):
        model = ":".join(model.split(":")[:2])
    return [model, _VERSION.sub("", model)]


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
        raise ConfigError(f"{where} cannot be read: {' '.join(str(error).split())[:300]}", key="engine.price") from None
    models = listed.get("models") if isinstance(listed, Mapping) else None
    if not isinstance(models, Mapping) or not listed.get("as_of"):
        raise ConfigError(
            f"{where}: a price list has 'as_of', a date, and 'models', each with input and output", key="engine.price"
        )
    return {"models": _checked(models, f"{where}: ", _LISTED), "as_of": str(listed["as_of"])}


def provider_prices(provider: Mapping[str, Any]) -> dict[str, Any]:
    """The checked `engine.provider.prices`: rates by model, also with the day of their list. Raises `ConfigError`."""
    given = provider.get("prices") or {}
    if not isinstance(given, Mapping):
        raise ConfigError("engine.provider.prices maps models to their rates", key="engine.provider")
    return _checked(given, "engine.provider.prices: ", (*_LISTED, "as_of"))


def _checked(models: Mapping[Any, Any], where: str, known: Collection[str]) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for model, rates in models.items():
        for name in rates if isinstance(rates, Mapping) else ():
            if name not in known:
                raise ConfigError(f"{where}'{model}' has no '{name}'{nearest(str(name), known)}", key="engine.price")
        if not isinstance(rates, Mapping) or not {"input", "output"} <= rates.keys():
            raise ConfigError(f"{where}'{model}' needs input and output, in US$ per million tokens", key="engine.price")
        if isinstance(rates.get("ends"), datetime.date):  # YAML makes a date of a day without quotes
            rates = {**rates, "ends": rates["ends"].isoformat()}
        check_fields(f"{where}'{model}'", Price(**rates))
        checked[str(model)] = dict(rates)
    return checked
