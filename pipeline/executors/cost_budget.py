"""`run.budget_usd`: no row is admitted that could take the spending of an output directory above the budget.

Spent: the cost of the ledger's records, and of everything else that may have to be paid: tries with a lost answer, rows
inside an engine that died, answers without usage. An unknown cost counts as the highest possible one.
Reserved: the most that the rows in flight may cost, from the bytes of their prompts and from `max_tokens`. The budget
learns from answers how many tokens a byte is, and how long answers without a limit are. Until then few rows are in flight.

`_budget.json` has the most that may be spent, written before it is spent. After a kill, the next run counts the rows that
were in flight as spent, because the provider may have answered them.
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

# After this many answers the estimates are trusted. Before, they are raised by half, and only this share may be in flight.
LEARNT, FIRST_FACTOR, FIRST_SHARE = 20, 1.5, 0.1
# Estimates are this factor above the highest value seen so far.
MARGIN = 1.1
# `_budget.json` records this share of the budget in advance, so it is written less often.
STEP = 0.02


class CostBudget:
    """The sums, in US dollars. The part that admits rows calls `fits`, and adds to `reserved` and `spent`."""

    def __init__(
        self,
        limit: float,
        engine: EngineConfig,
        params: GenerationParams,
        spent: float,
        batch: bool = False,  # rows are asked through the provider's batch API
        first_share: float = FIRST_SHARE,
    ) -> None:
        self.limit, self.params, self.engine, self.batch = limit, params, engine, batch
        self.price = most_expensive(engine, batch=batch)
        self.prices: dict[Any, Price] = {None: self.price, engine.model: self.price}
        self.first_share = first_share
        bound = (engine.provider.get("defaults") or {}).get("max_tokens")
        self.bound = bound or (DEFAULT_MAX_TOKENS if kind_of(engine).holds_model else None)
        self.spent, self.reserved, self.written = spent, 0.0, spent
        self.overhead = shared_bytes(params)
        self.seen = UsageStats()

    @property
    def learnt(self) -> bool:
        return self.seen.answers >= LEARNT

    def max_cost(self, request: bytes) -> float:
        """The most that this request is expected to cost: all turns, each with all retries for its shape."""
        values = loads(request)
        params = self.params.override(values.get("generation") or {})  # valid, because it was parsed before
        first, seen = FIRST_FACTOR / BYTES_PER_TOKEN, self.seen
        a_byte = max(1 / BYTES_PER_TOKEN, MARGIN * seen.tokens_a_byte) if self.learnt else max(first, seen.tokens_a_byte)
        longest = MARGIN * seen.output if self.learnt else max(FIRST_OUTPUT, seen.output)
        output = 0 if "task" in values else params.max_tokens or self.bound or longest
        prompt = (len(request) + self.overhead) * a_byte
        price = self._price(values.get("model")).at(prompt)
        if b'"cache_control"' in request:  # it may write to the prompt cache, for an hour
            price = Price(price.cache_write or price.input, None, price.output)
        turns, again = len(values.get("turns") or ()), _again(params)
        asked = (turns + 1) * (again + 1)
        # A turn's prompt contains the earlier answers. A retry for the shape contains the wrong answer.
        said = (turns * (turns + 1) // 2 * (again + 1) + (turns + 1) * again) * output
        return price.of(asked * prompt + said, 0, asked * output * (params.n or 1))

    def _price(self, model: Any) -> Price:
        """The highest price of a row's model. A row with a model without a price is refused by `check_model`."""
        if model not in self.prices:
            try:
                self.prices[model] = most_expensive(self.engine, str(model), batch=self.batch)
            except ConfigError:
                self.prices[model] = self.price
        return self.prices[model]

    def fits(self, cost: float) -> bool:
        """True if this much more may be in flight."""
        left = self.limit - self.spent - self.reserved
        if not self.learnt and self.reserved > 1e-9:  # float sums do not return to exactly 0
            left = min(left, self.first_share * (self.limit - self.spent) - self.reserved)
        return cost <= left

    @property
    def exceeded(self) -> bool:
        """True if the rows in flight may cost more than the budget has."""
        return self.spent + self.reserved > self.limit

    def summary(self) -> str:
        """The message of a run that stops."""
        return (
            f"run.budget_usd={self.limit:g} has no room for another request: all runs into this output spent "
            f"${self.spent:.4g}; the same command with a higher budget continues"
        )

    @property
    def higher(self) -> dict[str, str]:
        """The keys to change in the command that resumes: twice the budget."""
        return {"run.budget_usd": f"{higher(self.limit):g}"}

    def to_write(self) -> float | None:
        """The sum to write to the file before more is sent. None if the file has enough."""
        most = self.spent + self.reserved
        return None if most <= self.written else max(most, min(self.limit, most + STEP * self.limit))


def higher(limit: float) -> float:
    """The budget to resume with after one that was too small."""
    return 2 * limit


def _again(params: GenerationParams) -> int:
    """The number of retries for an answer of the wrong shape."""
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
    """The most that an output directory has cost: the sum of its records, or the sum in `_budget.json` if it is higher. A
    request of unknown cost counts as much as the most expensive known one."""
    known, unknown = index.spent()
    dearest = most_expensive(engine).of(FIRST_OUTPUT, 0, params.max_tokens or FIRST_OUTPUT) if unknown else 0.0
    dearest = max(dearest, float(index.cost_usd.max(initial=0.0)))
    return max(known + unknown * dearest, read_spent(fs, root))


def shared_bytes(params: GenerationParams) -> int:
    """Bytes that every prompt has beside the row's own: tools and the answer's schema."""
    return sum(len(dumps(part)) for part in (params.tools, params.response_format) if part)


def read_spent(fs: pafs.FileSystem, root: str) -> float:
    """The most that earlier runs may have spent, in US dollars. 0 if they had no budget."""
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
