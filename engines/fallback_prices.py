"""Prices of an engine together with those of its fallbacks."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

from engines.config import RATES, EngineConfig, Price
from engines.errors import ConfigError
from engines.prices import listed_prices, price_of, priced
from engines.registry import fallbacks
from engines.remote.provider import Provider


def with_lists(config: EngineConfig, folder: Path | None) -> None:
    """Writes the list prices into the configuration, which travels to machines that do not have `folder`: the price of
    `config.model`, the folder's prices of models that rows may name, and those of `engine.fallback`.
    """
    config.price = priced(config, folder)
    if folder is None:
        return
    listed = listed_prices(folder / f"{config.kind}.yaml")
    if config.provider and listed["models"]:
        own = {model: {**rates, "as_of": listed["as_of"]} for model, rates in listed["models"].items()}
        config.provider = {**config.provider, "prices": {**(config.provider.get("prices") or {}), **own}}
    entries = config.fallback if isinstance(config.fallback, list) else [config.fallback]
    config.fallback = [
        {**({"engine": entry} if isinstance(entry, str) else entry), "price": asdict(priced(engine, folder))}
        for entry, engine in zip(entries, fallbacks(config), strict=True)
    ]


def most_expensive(config: EngineConfig, model: str | None = None, *, batch: bool = False) -> Price:
    """Upper bounds of the rates of a row for `model` (None: the engine's own).

    They are the sums over the engine and all of `engine.fallback`. Input counts as written to the prompt cache if the
    engine uses the cache. `batch`: the first engine is asked through its batch API. Raises `ConfigError` if the price of an
    engine is unknown.
    """
    prices = []
    for engine in (config, *fallbacks(config)):
        price = price_of(engine, model, None) if engine is config else priced(engine)
        if price.input is None or price.output is None:
            raise ConfigError(
                f"run.budget_usd needs a price, and none is known for engine={engine.kind} model={model or engine.model}: "
                "give engine.price.input and engine.price.output, in US$ per million tokens",
                key="engine.price.input",
            )
        if batch and engine is config:
            price = price.in_batch(Provider.of(engine).batch_share(model or engine.model))
        prices.append((price, engine.prompt_caching))
    total = _sum(prices)
    steps = [price.above["tokens"] for price, _ in prices if price.above]
    if steps:
        high = _sum([(price.at(math.inf), caching) for price, caching in prices])
        total.above = {"tokens": min(steps), **{name: getattr(high, name) for name in RATES}}
    return total


def _sum(prices: list[tuple[Price, bool]]) -> Price:
    total_input = total_output = total_write = 0.0
    for price, caching in prices:
        assert price.input is not None and price.output is not None
        write = max(price.input, price.cache_write or 0.0)
        total_input += write if caching else price.input
        total_output += price.output
        total_write += write * Price.HOUR if price.cache_write is not None else price.input
    return Price(total_input, None, total_output, cache_write=total_write)
