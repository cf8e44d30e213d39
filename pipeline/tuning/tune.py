"""The steps of `eagleray tune`: take a sample, say what it costs, search."""

from __future__ import annotations

import math
import os

from rich.console import Console
from rich.text import Text

from engines.errors import ConfigError
from engines.registry import tuning_settings
from engines.remote.provider import Provider
from engines.text import counted
from engines.tuning import Machine, Setting
from pipeline.config import Config, hidden_keys
from pipeline.monitor.console import warn
from pipeline.preflight.checks import examine
from pipeline.preflight.dataset_estimate import format_dollars
from pipeline.tuning import report
from pipeline.tuning.sample import expected_costs, sample_requests
from pipeline.tuning.search import TURNS, Found, Search
from pipeline.tuning.trials import WARM_UP_ROWS, Measured, Trials, local_replicas, usable_gpus

# The keys whose values are part of each request, and may hold the key of an account.
_OF_REQUEST = ("engine.base_url", "engine.headers", "engine.extra_body")


def tune(config: Config, console: Console) -> tuple[Found, int]:
    """Measures settings of the engine. Returns the result, and the number of rows in the sample. Prints the progress.

    Raises `ConfigError`, and `Stopped` if the configuration itself cannot be measured.
    """
    if config.hardware.profiles:
        text = "hardware is a list: tune the engine of one entry on its own machine, with hardware=NAME"
        raise ConfigError(text, key="hardware.profiles")
    findings = examine(config, thorough=False)
    if findings.engine is not None:
        findings.engine.close()
    if findings.wrong:
        raise findings.wrong[0].error()
    keys = config.tune
    rows = sample_requests(config, keys.rows + WARM_UP_ROWS, console)
    requests = rows[: keys.rows]
    trials = Trials(config, requests, rows[keys.rows :] or requests[:WARM_UP_ROWS], usable_gpus(config))

    def settings() -> list[Setting]:
        return _settings(config, trials)

    most = 2 + 2 * TURNS + sum(len(chain) for setting in settings() for chain in setting.chains)
    spent = Spending(config, trials, most)
    console.print(Text(spent.announcement()))
    spent.check()
    shown: list[Measured] = []

    def measured(one: Measured) -> None:
        shown.append(one)
        spent.add(one)
        row = report.rows(config.engine, Found(shown))[-1]
        console.print(Text(f"{row[0]}: {row[5] if one.error else f'{row[2]} tokens/s, ×{row[3]}'}"))

    def shorten(count: int) -> None:
        trials.requests = trials.requests[:count]
        warn(console, f"The sample has {counted(count, 'row')} now: all rows would take too long for tune.minutes.")

    found = Search(trials.measure, shorten, keys.minutes * 60, spent.allows, measured).run(settings)
    if text := report.ending(found, most):
        warn(console, text)
    for setting in settings():
        if setting.left_out:
            (name, value), *_ = setting.left_out.items()
            needed = 2 * value * local_replicas(config, len(trials.gpus))[0]
            console.print(Text(f"{name}={value} and more were not tried: they need tune.rows={needed} or more."))
    return found, len(trials.requests)


def _settings(config: Config, trials: Trials) -> list[Setting]:
    """The settings for this engine and sample. Those that may change answers only if the user allows it."""
    machine = Machine(len(trials.gpus), len(trials.requests), local_replicas(config, len(trials.gpus))[0])
    found = []
    for setting in tuning_settings(config.engine, machine):
        keys = {name for chain in setting.chains for option in chain for name in option}
        refused = () if config.tune.may_change_answers else report.changing_keys(config.engine, dict.fromkeys(keys))
        if (kept := setting.within(refused)) is not None:
            found.append(kept)
    return found


class Spending:
    """The requests that cost money. `run.budget_usd` limits the cost of all measurements together."""

    def __init__(self, config: Config, trials: Trials, most: int) -> None:
        self.engine, self.budget, self.most = config.engine, config.run.budget_usd, most
        requests = [*trials.requests, *trials.warm_up]
        costs = expected_costs(config.engine, requests)
        self.count, self.may_cost = len(requests), _may_cost(config)
        # The models whose price is not known. None is the engine's own.
        self.unpriced = [request.model for request, cost in zip(requests, costs, strict=True) if cost is None]
        # US$ of one measurement; None: not known.
        self.each = None if self.unpriced else sum(cost or 0.0 for cost in costs)
        self.spent = 0.0

    def announcement(self) -> str:
        """The size of the work in words."""
        text = f"At most {counted(self.most, 'measurement')} of {counted(self.count, 'request')}"
        if not self.engine.provider or self.each is None:
            return f"{text}."
        return f"{text}, about ${format_dollars(self.each * self.most)} in all."

    def check(self) -> None:
        """Raises `ConfigError` if the requests cost money, or may cost money, and no budget allows it."""
        if self.unpriced and (self.may_cost or self.budget is not None):
            raise self._unknown(self.unpriced[0])
        if self.engine.provider and self.each and self.budget is None:
            about = format_dollars(self.each * self.most)
            raise ConfigError(
                f"the measurements would cost about ${about}: set run.budget_usd to what they may cost, for example "
                f"run.budget_usd={math.ceil(self.each * self.most * 1.5 * 100) / 100:g}",
                key="run.budget_usd",
            )

    def _unknown(self, model: str | None) -> ConfigError:
        """The error about a model without a price, with the keys that give it one."""
        is_own = model in (None, self.engine.model)
        name = " ".join(filter(None, (self.engine.kind, model or self.engine.model)))
        keys = "engine.price.input and engine.price.output" if is_own else "its rates in engine.provider.prices"
        limit = ", and run.budget_usd to what the measurements may cost" if self.budget is None else ""
        return ConfigError(
            f"the cost of the measurements is not known, because no price is known for {name}: set {keys}, in US$ per "
            f"million tokens (0 if it is free){limit}",
            key="engine.price.input" if is_own else "engine.provider",
        )

    def add(self, measured: Measured) -> None:
        cost = self.each if measured.cost_usd is None else measured.cost_usd
        if cost:
            self.spent += cost
            self.each = max(self.each or 0.0, cost)

    def allows(self, measurements: int) -> bool:
        """True if the budget is enough for so many more measurements."""
        if self.budget is None:
            return True
        return self.each is not None and self.spent + measurements * self.each <= self.budget


def _may_cost(config: Config) -> bool:
    """True for a provider. A server of the user's own is free, and so is a server that needs no key and gets none."""
    engine = config.engine
    if not engine.provider:
        return False
    provider = Provider.of(engine)
    given = [name for name in hidden_keys(config) if name.startswith(_OF_REQUEST)]
    has_key = bool(given or os.environ.get(engine.api_key_env or ""))
    return not provider.self_hosted and (provider.auth != "optional" or has_key)
