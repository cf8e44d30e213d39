"""Prices of an engine together with those of its fallbacks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from engines.config import EngineConfig, Price
from engines.errors import ConfigError
from engines.prices import listed_prices, price_of, priced
from engines.registry import fallbacks


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


def most_expensive(config: EngineConfig, model: str | None = None) -> Price:
    """The most that the tokens of a row for `model` (None: the engine's own) may cost: where the row may go on to
    `engine.fallback`, the sum over all of them. Input counts as written to the prompt cache where that may happen. Raises
    `ConfigError` where the price of one of them is not known.
    """
    total_input = total_output = total_write = 0.0
    for engine in (config, *fallbacks(config)):
        price = price_of(engine, model, None) if engine is config else priced(engine)
        if price.input is None or price.output is None:
            raise ConfigError(
                f"run.budget_usd needs a price, and none is known for engine={engine.kind} model={model or engine.model}: "
                "give engine.price.input and engine.price.output, in US$ per million tokens"
            )
        write = max(price.input, price.cache_write or 0.0)
        total_input += write if engine.prompt_caching else price.input
        total_output += price.output
        total_write += write * Price.HOUR if price.cache_write is not None else price.input
    return Price(total_input, None, total_output, cache_write=total_write)
