"""`run.budget_usd`: no row is admitted that could take an output directory's spending past it.

Spent is what the ledger's records cost, and whatever else may have to be paid: tries whose answer was lost, rows that were
in an engine when it died, answers that came without their usage. What is not known counts as the most that it can be.
Reserved is the most that the rows in flight may cost: their bytes as tokens, and answers as
long as `max_tokens` allows. How far off the bytes are, and how long answers are that nothing bounds, is learnt; until then
little is in flight.

`_budget.json` says how much may be gone at most, written before it is spent. A run that is killed leaves there what it had
in flight, and the next one counts that as spent: nobody knows what became of it.
"""

from __future__ import annotations

import math
from typing import Any

import orjson
import pyarrow.fs as pafs

from engines.config import EngineConfig, Price
from engines.errors import ConfigError, EngineError
from engines.fallback_prices import most_expensive
from engines.params import GenerationParams
from engines.registry import kind_of
from engines.types import BYTES_PER_TOKEN, DEFAULT_MAX_TOKENS, DEFAULT_SCHEMA_RETRIES, FIRST_OUTPUT, Request
from pipeline.monitor.status import UsageStats
from pipeline.storage.exact_json import dumps, loads
from pipeline.storage.filesystem import exists, write_atomic
from pipeline.storage.ledger_index import Index
from pipeline.storage.output_files import BUDGET

# Answers after which the estimates are trusted; until then they are raised by a half, and this share may be in flight.
LEARNT, FIRST_FACTOR, FIRST_SHARE = 20, 1.5, 0.1
# Above the most that was seen so far.
MARGIN = 1.1
# How much more than is in flight is written down at a time, as a share of the budget.
STEP = 0.02


class CostBudget:
    """The book-keeping; whoever admits rows asks `fits` and adds to `reserved` and `spent`. US dollars throughout."""

    def __init__(
        self,
        limit: float,
        engine: EngineConfig,
        params: GenerationParams,
        spent: float,
        share: float = 1.0,  # of the live price
        first_share: float = FIRST_SHARE,
    ) -> None:
        self.limit, self.price, self.params, self.engine = limit, most_expensive(engine), params, engine
        self.prices: dict[Any, Price] = {None: self.price, engine.model: self.price}
        self.share, self.first_share = share, first_share
        bound = (engine.provider.get("defaults") or {}).get("max_tokens")
        self.bound = bound or (DEFAULT_MAX_TOKENS if kind_of(engine).holds_model else None)
        self.spent, self.reserved, self.written = spent, 0.0, spent
        self.overhead = shared_bytes(params)
        self.seen = UsageStats()

    @property
    def learnt(self) -> bool:
        return self.seen.answers >= LEARNT

    def max_cost(self, request: bytes) -> float:
        """The most that this request is expected to cost: all turns, each asked again for its shape if allowed."""
        values = loads(request)
        params = self.params.override(values.get("generation") or {})  # parsed before, so it is valid
        first, seen = FIRST_FACTOR / BYTES_PER_TOKEN, self.seen
        a_byte = max(1 / BYTES_PER_TOKEN, MARGIN * seen.tokens_a_byte) if self.learnt else max(first, seen.tokens_a_byte)
        longest = MARGIN * seen.output if self.learnt else max(FIRST_OUTPUT, seen.output)
        output = params.max_tokens or self.bound or longest
        prompt = (len(request) + self.overhead) * a_byte
        price = self._price(values.get("model"))
        if b'"cache_control"' in request:  # it may write to the prompt cache, for an hour
            price = Price(price.cache_write or price.input, None, price.output)
        turns, again = len(values.get("turns") or ()), _again(params)
        asked = (turns + 1) * (again + 1)
        # A turn's prompt has the answers before it; one that is asked again for its shape has the wrong one.
        said = (turns * (turns + 1) // 2 * (again + 1) + (turns + 1) * again) * output
        return self.share * price.of(asked * prompt + said, 0, asked * output * (params.n or 1))

    def _price(self, model: Any) -> Price:
        """The most that a row's model may cost; a row whose model has no price is refused before it is asked."""
        if model not in self.prices:
            try:
                self.prices[model] = most_expensive(self.engine, str(model))
            except ConfigError:
                self.prices[model] = self.price
        return self.prices[model]

    def fits(self, cost: float) -> bool:
        """Whether so much more may be in flight."""
        left = self.limit - self.spent - self.reserved
        if not self.learnt and self.reserved > 1e-9:  # sums of floats come to 0 nearly
            left = min(left, self.first_share * (self.limit - self.spent) - self.reserved)
        return cost <= left

    @property
    def exceeded(self) -> bool:
        """Whether what is in flight may take it past the limit."""
        return self.spent + self.reserved > self.limit

    def summary(self, left: str) -> str:
        """Why a run stops that has this much left."""
        return (
            f"run.budget_usd={self.limit:g} has no room for another row: ${self.spent:.4g} is spent, {left}; "
            "the same command with a higher budget goes on from here"
        )

    @property
    def higher(self) -> dict[str, str]:
        """What to change in the command that goes on: twice the budget."""
        return {"run.budget_usd": f"{higher(self.limit):g}"}

    def to_write(self) -> float | None:
        """How much to write down now, before more is sent; None where enough is."""
        most = self.spent + self.reserved
        return None if most <= self.written else max(most, min(self.limit, most + STEP * self.limit))


def higher(limit: float) -> float:
    """The budget to go on with, where this one was too small."""
    return 2 * limit


def _again(params: GenerationParams) -> int:
    """How often an answer of the wrong shape is asked for again."""
    if (params.response_format or {}).get("type") not in ("json_schema", "json_object"):
        return 0
    return DEFAULT_SCHEMA_RETRIES if params.schema_retries is None else params.schema_retries


def check_model(request: Request, engine: EngineConfig) -> None:
    """Raises `EngineError` for a row whose model has no known price."""
    if request.model in (None, engine.model):
        return
    try:
        most_expensive(engine, request.model)
    except ConfigError:
        raise EngineError(
            "budget", f"run.budget_usd needs the price of each model, and this row asks {request.model!r}, which has none"
        ) from None


def spent_so_far(engine: EngineConfig, params: GenerationParams, index: Index, fs: pafs.FileSystem, root: str) -> float:
    """What an output directory has cost at most: its records, or what runs with a budget wrote down. A request of unknown
    cost counts as the dearest one whose cost is known."""
    known, unknown = index.spent()
    dearest = most_expensive(engine).of(FIRST_OUTPUT, 0, params.max_tokens or FIRST_OUTPUT) if unknown else 0.0
    dearest = max(dearest, float(index.cost_usd.max(initial=0.0)))
    return max(known + unknown * dearest, read_spent(fs, root))


def shared_bytes(params: GenerationParams) -> int:
    """Of every prompt, beside the row's own: tools and the shape of the answer."""
    return sum(len(dumps(part)) for part in (params.tools, params.response_format) if part)


def read_spent(fs: pafs.FileSystem, root: str) -> float:
    """What earlier runs may have spent; 0 where they kept to no budget."""
    path = f"{root}/{BUDGET}"
    if not exists(fs, path):
        return 0.0
    with fs.open_input_stream(path) as stream:
        data = stream.read()
    try:
        spent = float(orjson.loads(data)["usd"])
        if 0 <= spent < math.inf:
            return spent
    except (ValueError, TypeError, KeyError):
        pass
    raise ConfigError(
        f'{path} cannot be read: it says how many US dollars earlier runs may have spent. Write {{"usd": AMOUNT}} into it, '
        "or delete it: then only the answers in the ledger count"
    )


def write_spent(fs: pafs.FileSystem, root: str, usd: float) -> None:
    write_atomic(fs, f"{root}/{BUDGET}", orjson.dumps({"usd": usd}))
