"""Writes `conf/price/*.yaml` from the price list of the package genai-prices: `make prices`.

Eagleray does not depend on the package: the list has a date, and a run costs the same today and tomorrow. Models whose
price depends on the time of day are left out; their cost is unknown unless `engine.price` is set. Models that the official
SDKs (`openai`, `anthropic`) do not name, or whose last day is over, are left out, too.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import re
import typing
from pathlib import Path
from typing import Any

import yaml
from genai_prices.data import providers
from genai_prices.types import ClauseEquals, ClauseOr, ModelInfo, ModelPrice, TieredPrices, TimeOfDateConstraint

PRICES = Path(__file__).parent.parent / "conf" / "price"
# Models that answer text with neither text nor an embedding are left out.
NOT_TEXT = re.compile(r"-(tts|live|realtime|audio|transcribe|image|search|native|dialog|computer-use)\b|\.ft-")
# Our engine: the provider's name in genai-prices, and the provider's page.
ENGINES = {
    "anthropic": ("anthropic", "https://platform.claude.com/docs/en/about-claude/pricing"),
    "gemini": ("google", "https://ai.google.dev/gemini-api/docs/pricing"),
    "openai": ("openai", "https://developers.openai.com/api/docs/pricing"),
}
RATES = {
    "input": "input_mtok",
    "cached_input": "cache_read_mtok",
    "cache_write": "cache_write_mtok",
    "output": "output_mtok",
}


def main() -> None:
    as_of = data_date()
    for engine, (provider_id, source) in ENGINES.items():
        provider = next(provider for provider in providers if provider.id == provider_id)
        ends, alive = END_DATES.get(engine, dict)(), ALIVE[engine]
        models: dict[str, Any] = {}
        for model in provider.models:
            entry = entry_of(model, as_of)
            for name in names(model) if entry else ():
                is_old = ends.get(name, "9") <= str(datetime.date.today())
                if alive(name) and not is_old and not NOT_TEXT.search(name):
                    models[name] = {**entry, "ends": ends[name]} if name in ends else dict(entry)
        write(PRICES / f"{engine}.yaml", as_of, source, models)


def data_date() -> datetime.date:
    """The last day up to today on which the package's list was checked, as the list itself says."""
    import genai_prices.data as data

    text = Path(data.__file__).read_text(encoding="utf-8")
    days = {day for day in re.findall(r"\b20\d\d-\d\d-\d\d\b", text) if day <= str(datetime.date.today())}
    return datetime.date.fromisoformat(max(days))


def entry_of(model: ModelInfo, day: datetime.date) -> dict[str, Any] | None:
    """The rates of a model on a day. None if it has no rate for text, or another rate at another hour."""
    conditions = model.prices if isinstance(model.prices, list) else []
    if any(isinstance(condition.constraint, TimeOfDateConstraint) for condition in conditions):
        return None
    noon = datetime.datetime.combine(day, datetime.time(12), datetime.UTC)
    embeds = "embedding" in model.id
    entry = rates(model.get_prices(noon), embeds)
    if not {"input", "output"} <= entry.keys():
        return None
    for variant in model.price_variants or ():
        started = variant.constraint is None or variant.constraint.active(noon)
        if variant.when == {"processing": "batch"} and started:
            batch = rates(variant.prices, embeds)
            entry["batch"] = {name: batch.get(name, value) for name, value in entry.items() if name in RATES}
            if "above" in batch or "above" in entry:
                # A rate that the list of batches does not name is that of live requests.
                entry["batch"]["above"] = {**entry.get("above", {}), **batch.get("above", {})}
    return entry


def rates(price: ModelPrice, embeds: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    above: dict[str, Any] = {}
    for name, field in RATES.items():
        value = getattr(price, field)
        if isinstance(value, TieredPrices):
            if len(value.tiers) > 1:
                return {}  # more than two steps: our lists have no place for them
            found[name] = number(value.base)
            for tier in value.tiers:
                above |= {"tokens": tier.start, name: number(tier.price)}
        elif value is not None:
            found[name] = number(value)
    if embeds:
        found["output"] = 0  # an embedding has no output tokens
    if above:
        found["above"] = above | {name: found[name] for name in found if name not in above}
    return found


def number(value: Any) -> float | int:
    return int(value) if value == int(value) else float(value)


def names(model: ModelInfo) -> list[str]:
    clauses = model.match.or_ if isinstance(model.match, ClauseOr) else [model.match]
    return [model.id, *(c.equals for c in clauses if isinstance(c, ClauseEquals) and c.equals != model.id)]


def openai_ends() -> dict[str, str]:
    """The shutdown dates in the documentation of `ChatModel`."""
    found = importlib.util.find_spec("openai.types.shared.chat_model")
    assert found is not None and found.origin is not None
    text = Path(found.origin).read_text(encoding="utf-8")
    ends = {}
    for entry in re.split(r"\n- ", text.partition("Deprecated values:")[2]):
        day = re.search(r"shutdown\s+date:\s+(\d{4}-\d\d-\d\d)", entry)
        for name in re.findall(r'"([^"]+)"', entry.partition(": Announced")[0]) if day else ():
            ends[name] = day[1] if day else ""
    return ends


def anthropic_ends() -> dict[str, str]:
    from anthropic._data import DEPRECATED_MODELS

    return {
        name: str(datetime.datetime.strptime(re.sub(r"(\d)(st|nd|rd|th),", r"\1,", day), "%B %d, %Y").date())
        for name, day in DEPRECATED_MODELS.items()
    }


def openai_names(name: str) -> bool:
    from openai.types import ChatModel, EmbeddingModel

    known = (*typing.get_args(ChatModel), *typing.get_args(EmbeddingModel))
    # The SDK names gpt-5.1-mini and says that the API does not support it.
    return name.removeprefix("ft:") in known and name != "gpt-5.1-mini"


def anthropic_names(name: str) -> bool:
    from anthropic.types import Model

    return any(name in typing.get_args(part) for part in typing.get_args(Model))


# https://ai.google.dev/gemini-api/docs/deprecations, read in November 2026.
GEMINI_ENDED = ("gemini-3-pro-preview", "gemini-3-pro-text-preview")
GEMINI_ENDS = {"gemini-2.5-flash": "2026-12-01", "gemini-2.5-pro": "2026-12-01", "gemini-3.1-flash-lite": "2027-05-07"}

GEMINI_NAMES = re.compile(r"gemini-(2\.5-(flash|flash-lite|pro)$|embedding-\d+$|[3-9])")

ALIVE = {
    "anthropic": anthropic_names,
    "gemini": lambda name: name not in GEMINI_ENDED and GEMINI_NAMES.match(name),
    "openai": openai_names,
}
END_DATES = {"openai": openai_ends, "anthropic": anthropic_ends, "gemini": lambda: GEMINI_ENDS}

HEAD = """\
# List prices in US$ per million tokens on the date below, written by `make prices` from genai-prices {version}.
# `above`: the rates of a whole request with more input tokens than `tokens`. `batch`: the rates in the provider's batches.
# `ends`: the day on which the provider switches the model off.
# If prices change, set engine.price.input, .cached_input, .cache_write and .output, or write a list (docs/providers.md).
"""


def write(path: Path, as_of: datetime.date, source: str, models: dict[str, Any]) -> None:
    lines = [
        HEAD.format(version=importlib.metadata.version("genai-prices")),
        f"as_of: {as_of}\nsource: {source}\nmodels:\n",
    ]
    for name, entry in sorted(models.items()):
        text = yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=10_000).strip()
        lines.append(f"  {yaml.safe_dump(name).splitlines()[0]}: {text}\n")
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
