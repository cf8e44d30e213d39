"""Admission by budget: a row is leased only if `run.budget_usd` has room for its maximum cost.

Without a budget, every row is admitted and nothing is reserved.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

from pipeline.executors.cost_budget import CostBudget, write_spent
from pipeline.executors.requests import PendingRequest
from pipeline.monitor.status import UsageStats
from pipeline.storage.filesystem import resolve


class Admission:
    """Reserves the maximum cost of leased rows. Writes the sum to `_budget.json` before money is spent."""

    def __init__(self, budget: CostBudget | None, output_path: str) -> None:
        self.budget, self.output_path = budget, output_path
        self.writing = asyncio.Lock()

    def admit(
        self, rows: list[PendingRequest], want: int
    ) -> tuple[list[PendingRequest], list[float], list[PendingRequest]]:
        """Up to `want` of the rows that the budget has room for, the cost reserved for each, and the other rows. Without a
        budget there are no costs."""
        if self.budget is None:
            return rows[:want], [], rows[want:]
        fit: list[PendingRequest] = []
        costs: list[float] = []
        others: list[PendingRequest] = []
        for row in rows:
            cost = self.budget.max_cost(row.request)
            if len(fit) < want and self.budget.fits(cost):
                self.budget.reserved += cost
                fit.append(row)
                costs.append(cost)
            else:
                others.append(row)
        return fit, costs, others

    def release(self, cost: float, *, spent: bool = False) -> None:
        """Frees the reservation of a row that is no longer in flight. `spent`: its answer is lost and may be
        charged, so its cost counts as spent."""
        if self.budget is not None:
            self.budget.reserved -= cost
            if spent:
                self.budget.spent += cost

    def spend(self, cost: float, seen: UsageStats | None = None) -> None:
        """Adds the cost of answers or lost tries. `seen` improves the estimates."""
        if self.budget is not None:
            self.budget.spent += cost
            if seen is not None:
                self.budget.seen.add(seen)

    @property
    def exceeded(self) -> bool:
        return self.budget is not None and self.budget.exceeded

    @property
    def committed(self) -> float:
        """The sum of spent and reserved, in US dollars."""
        return 0.0 if self.budget is None else self.budget.spent + self.budget.reserved

    def has_room_for_none(self, rows: Iterable[PendingRequest]) -> bool:
        """True if there are rows and the budget has room for none of them."""
        if self.budget is None:
            return False
        fits, some = self.budget.fits, False
        for row in rows:
            some = True
            if fits(self.budget.max_cost(row.request)):
                return False
        return some

    async def write_down(self) -> None:
        """Writes the sum that may be spent next, unless the file already covers it."""
        if self.budget is None:
            return
        async with self.writing:
            if (usd := self.budget.to_write()) is not None:
                await asyncio.to_thread(write_spent, *resolve(self.output_path), usd)
                self.budget.written = usd

    async def settle(self) -> None:
        """Writes what was spent, when nothing is in flight any more."""
        if self.budget is not None:
            with contextlib.suppress(OSError):  # then the file keeps a higher sum
                await asyncio.to_thread(write_spent, *resolve(self.output_path), self.committed)
