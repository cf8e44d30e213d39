"""The cost of all runs for the page. An unknown cost stays unknown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engines.text import counted

MILLION = 1_000_000
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost in words."""

    total: str
    note: str
    million: str  # projected to a million rows
    million_note: str
    free: bool  # the engine has no price, and nothing was paid


def cost_of(manifest: Mapping[str, Any]) -> Cost:
    known, done = manifest["cost_known_usd"], manifest["rows"]["done"]
    free = manifest["cost_usd"] == 0 and not manifest["config"]["engine"]["provider"]
    least = f"at least {dollars(known / done * MILLION)}" if known and done else ""
    if manifest["cost_usd"] is None:
        note = f"for {counted(manifest['cost_unknown_requests'], 'request')}"
        return Cost(UNKNOWN, f"{note}; {dollars(known)} is known" if known else note, UNKNOWN, least, free)
    if not done:
        return Cost(dollars(known), "no row is done", UNKNOWN, "no row is done", free)
    return Cost(
        dollars(manifest["cost_usd"]),
        f"{dollars(manifest['cost_usd'] / done * 1000)} per 1,000 rows done",
        dollars(manifest["cost_usd"] / done * MILLION),
        "at the mean cost of a row done, with all retries and failures",
        free,
    )


def dollars(value: float | None) -> str:
    """An amount in US$. None is unknown."""
    if value is None:
        return UNKNOWN
    if value >= 1 or round(value, 2) == value:
        return f"${value:,.2f}"
    digits = 1 - math.floor(math.log10(value))  # after the point, for two significant digits
    return f"${value:.4g}" if value >= 1e-4 else f"${value:.{digits}f}"
