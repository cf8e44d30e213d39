"""The search for the fastest settings: one key after the other, then the best against the configuration, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from engines.errors import ErrorCode
from engines.tuning import Option, Setting
from pipeline.errors import Stopped
from pipeline.tuning.trials import Measured

LEAST_GAIN = 0.02  # a smaller gain is not worth a change
TURNS = 2  # of the confirmation: in each, both are measured
SLOWER = 1.5  # a try is cut when it takes this many times as long as the best
FIRST_SHARE = 1 / 8  # of the time: the longest first measurement
LEAST_ROWS = 8

# Measures changes: (changes, seconds for the rows, seconds to load).
Measure = Callable[[Option, float, float], Measured]


@dataclass(slots=True)
class Found:
    """All measurements, and the changes that win. `changes` is empty if none wins by more than the noise."""

    measured: list[Measured] = field(default_factory=list)
    changes: Option = field(default_factory=dict)
    tried: Option = field(default_factory=dict)  # the best changes, before they were confirmed
    gain: float = 0.0  # of `tried`, in the confirmation: 0.1 is 10% more
    noise: float = 0.0  # the difference of equal measurements, as a share
    ended_by: str = ""  # the key that ended the search before all settings were tried
    longest: float = 0.0  # seconds of one measurement, loading included


class Search:
    """Ends when the time is up, or when `affordable` says that the budget does not allow so many more measurements.

    `shorten` cuts the sample to so many rows.
    """

    def __init__(
        self,
        measure: Measure,
        shorten: Callable[[int], None],
        seconds: float,
        affordable: Callable[[int], bool] = lambda measurements: True,
        show: Callable[[Measured], None] = lambda measured: None,
    ) -> None:
        self.measure, self.shorten, self.affordable, self.show = measure, shorten, affordable, show
        self.began, self.seconds = time.monotonic(), seconds
        self.found = Found()

    def run(self, settings: Callable[[], list[Setting]]) -> Found:
        """Raises `Stopped` if the configuration itself cannot be measured. The settings may depend on the sample's size."""
        best = self._baseline()
        for setting in settings():
            for chain in setting.chains:
                before = best
                for option in chain:
                    if not self._has_room(1 + 2 * TURNS):
                        return self._confirmed(best)
                    tried = self._measured({**best.changes, **option}, SLOWER * best.seconds)
                    if tried.error or tried.is_cut or tried.failed > best.failed or not self._gains(tried, best):
                        break
                    best = tried
                if setting.is_ladder and best is not before:
                    break
        return self._confirmed(best)

    def _gains(self, tried: Measured, best: Measured) -> bool:
        return tried.rate > best.rate * (1 + max(self.found.noise, LEAST_GAIN))

    def _measured(self, changes: Option, limit_s: float, role: str = "try") -> Measured:
        began = time.monotonic()
        measured = self.measure(changes, limit_s, max(self._left(), 5.0))
        measured.role = role
        self.found.longest = max(self.found.longest, time.monotonic() - began)
        self.found.measured.append(measured)
        self.show(measured)
        return measured

    def _left(self) -> float:
        return self.began + self.seconds - time.monotonic()

    def _has_room(self, measurements: int) -> bool:
        """True if the time and the budget are enough for so many measurements."""
        if not self.affordable(measurements):
            self.found.ended_by = "run.budget_usd"
        elif self._left() < measurements * self.found.longest:
            self.found.ended_by = "tune.minutes"
        return not self.found.ended_by

    # -- the configuration itself -------------------------------------------------------------------------------------

    def _baseline(self) -> Measured:
        """Measures the configuration twice, to know the noise. Rows that take too long are left out."""
        self._check_budget(2)
        first = self._measured({}, self.seconds * FIRST_SHARE, "baseline")
        if first.is_cut and not first.error:
            if first.rows < LEAST_ROWS:
                raise Stopped(
                    f"{first.rows} rows are done in {first.seconds:.0f} s: set a higher tune.minutes, or a lower "
                    "generation.max_tokens for the measurement"
                )
            self.shorten(first.rows)
            self.found.measured.pop()
            self._check_budget(2)
            first = self._measured({}, 2 * self.seconds * FIRST_SHARE, "baseline")
        self._check(first)
        self._check_budget(1)
        second = self._measured({}, 2 * self.seconds * FIRST_SHARE, "baseline")
        self._check(second)
        self.found.noise = _spread([first, second])
        return max(first, second, key=lambda each: each.rate)

    def _check_budget(self, measurements: int) -> None:
        if not self.affordable(measurements):
            text = "run.budget_usd is too small for two measurements of the configuration: raise it, or lower tune.rows"
            raise Stopped(text, code=ErrorCode.BUDGET_SPENT)

    def _check(self, measured: Measured) -> None:
        if measured.error or not measured.rate:
            raise Stopped(f"the configuration itself cannot be measured: {measured.error or 'no tokens were counted'}")

    # -- the confirmation ---------------------------------------------------------------------------------------------

    def _confirmed(self, best: Measured) -> Found:
        """Measures the best and the configuration in turns. The best wins if it gains more than the noise."""
        found = self.found
        found.tried = best.changes
        if not best.changes:
            return found
        ours: list[Measured] = []
        base = [each for each in found.measured if each.role == "baseline"]
        for turn in range(TURNS):
            sides: list[tuple[str, Option]] = [("baseline", {}), ("confirm", best.changes)]
            limit_s = 4 * SLOWER * best.seconds
            pair = [self._measured(changes, limit_s, role) for role, changes in (sides if turn % 2 else sides[::-1])]
            if any(each.error or each.is_cut for each in pair):
                return found
            base += [each for each in pair if each.role == "baseline"]
            ours += [each for each in pair if each.role == "confirm"]
        found.noise = max(_spread(base), _spread(ours))
        found.gain = statistics.median(each.rate for each in ours) / statistics.median(each.rate for each in base) - 1
        if found.gain > max(found.noise, LEAST_GAIN):
            found.changes = best.changes
        return found


def _spread(measured: list[Measured]) -> float:
    rates = [each.rate for each in measured]
    return max(rates) / min(rates) - 1
