"""Shows the progress of a run: a live view on a terminal, or a line at regular intervals in a log."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from engines.config import EngineConfig
from engines.text import visible
from pipeline.monitor.status import RunStatus

# The rate shown is the mean over the last `RECENT_S` seconds. A sample is taken every `SAMPLE_S` seconds.
RECENT_S, SAMPLE_S = 30.0, 0.5
# Up to this many replicas have their own line. The others share one.
SHOWN = 4
# Terminals with fewer characters in a line have no room for columns.
ALIGNED = 56
SHOW_CURSOR = b"\x1b[?25h\r\n"


def restore_terminal() -> None:
    """Shows the terminal's cursor again. For code that ends the process without closing `RunProgress`."""
    if sys.stderr.isatty():
        os.write(2, SHOW_CURSOR)


@dataclass(slots=True)
class Sample:
    """The progress of the run at one moment."""

    at: float  # seconds of the monotonic clock
    rows: int = 0  # done and failed in this run
    tokens: int = 0  # output tokens
    replicas: dict[str, int] = field(default_factory=dict)  # replica -> rows that it finished


class RunProgress:
    """Shows each `RunStatus` that is passed to `show`."""

    def __init__(
        self, console: Console, every_s: float, engine: EngineConfig | None = None, budget_usd: float | None = None
    ) -> None:
        self.console, self.every_s, self.budget_usd = console, every_s, budget_usd
        self.priced = engine is not None and engine.price.known
        self.title = " ".join(filter(None, (engine.kind, engine.model))) if engine else ""
        self.status = RunStatus()
        self.expected = 0  # number of requested replicas
        self.started = self.shown = time.monotonic()
        self.samples: deque[Sample] = deque([Sample(self.started)])
        self.live: Live | None = None
        if console.is_terminal:
            self.live = Live(console=console, get_renderable=self.render, transient=True, refresh_per_second=4)

    def __enter__(self) -> RunProgress:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, status: RunStatus, expected: int = 0) -> None:
        self.status, self.expected = status, expected
        now = time.monotonic()
        if now - self.samples[-1].at >= SAMPLE_S:
            replicas = {name: heartbeat.done for name, heartbeat in status.replicas.items()}
            self.samples.append(Sample(now, status.done + status.failed, status.output_tokens, replicas))
            # Drop samples older than `RECENT_S`, except the last of them, and samples from before the first answer.
            while len(self.samples) > 2 and (self.samples[1].at < now - RECENT_S or not self.samples[1].rows):
                self.samples.popleft()
        if self.live is None and now - self.shown >= self.every_s:
            self.shown = now
            self.console.print(Text(" · ".join(self._line())), soft_wrap=True)

    # -- figures ------------------------------------------------------------------------------------------------------

    @property
    def resolved(self) -> int:
        """Rows that need no more work: answered, failed, invalid and duplicates."""
        status = self.status
        return status.answered + status.invalid + status.duplicates + status.done + status.failed

    @property
    def elapsed(self) -> float:
        return max(1e-9, time.monotonic() - self.started)

    def _recent(self) -> tuple[float, float]:
        """Rows and output tokens per second over the last `RECENT_S` seconds."""
        first, last = self.samples[0], self.samples[-1]
        span = last.at - first.at
        return ((last.rows - first.rows) / span, (last.tokens - first.tokens) / span) if span > 0 else (0.0, 0.0)

    def _left(self) -> str:
        rate, left = self._recent()[0], self.status.read - self.resolved
        if not self.status.fed:
            return "still reading"
        return f"{_duration(left / rate)} left" if rate and left > 0 else ""

    def _cost(self) -> Iterable[str]:
        status = self.status
        finished = status.done + status.failed
        priced = finished - status.cost_unknown
        if not finished or not (self.priced or status.cost_usd):
            return
        unknown = f" and the unknown cost of {status.cost_unknown:,} rows" if status.cost_unknown else ""
        yield f"${status.cost_usd:.4g}{unknown} so far"
        if status.fed and priced > 0:
            yield f"${status.cost_usd / priced * (finished + max(0, status.read - self.resolved)):.4g} projected"
        if self.budget_usd is not None:
            yield f"${status.spent:.4g} of ${self.budget_usd:g} spent or in flight"

    def _counts(self) -> Iterable[str]:
        status = self.status
        yield f"{self.resolved:,} of {status.read:,}{'' if status.fed else '+'} rows"
        yield f"{status.failed + status.invalid:,} failed"

    def _line(self) -> list[str]:
        """The cells of a line for a log."""
        rows, tokens = self._recent()
        cells = [*self._counts(), f"{rows:,.1f} rows/s", f"{tokens:,.0f} tok/s", self._left(), *self._cost()]
        if self.status.trouble:
            cells.append(f"trying again: {visible(self.status.trouble)}")
        return [cell for cell in [*cells, f"{self.elapsed:,.0f} s"] if cell]

    # -- the live view ------------------------------------------------------------------------------------------------

    def render(self) -> RenderableType:
        """The live view. Lines are filled cell by cell, so a narrow terminal shows more lines."""
        status, width = self.status, self.console.width
        rows, tokens = self._recent()
        finished = status.done + status.failed
        share = f"{self.resolved / status.read:.0%}" if status.read else ""
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(max(1, status.read), self.resolved, width=max(10, min(width - 8, 60)), pulse=not status.read), share
        )
        progress = [*self._counts(), f"{status.in_flight:,} in flight", self._left(), f"{_duration(self.elapsed)} so far"]
        speed = [f"{rows:,.1f} rows/s", f"{tokens:,.0f} tok/s", f"{finished / self.elapsed:,.1f} rows/s overall"]
        lines = [*flow(progress, width), *flow([*speed, *self._cost()], width), *flow(self._load(), width)]
        body: list[RenderableType] = [Text(self.title, "bold", no_wrap=True, overflow="ellipsis"), bar, *map(Text, lines)]
        if status.trouble:
            body.append(Text(f"trying again: {visible(status.trouble)}", "yellow", no_wrap=True, overflow="ellipsis"))
        return Group(*body, *self._replicas())

    def _load(self) -> list[str]:
        """Cells with concurrency, retries and waits for limits, summed over all replicas."""
        heartbeats = [*self.status.replicas.values(), self.status.gone]
        cells = []
        if admitted := [heartbeat.admitted for heartbeat in heartbeats if heartbeat.admitted is not None]:
            cells.append(f"{sum(admitted):,.0f} of {sum(heartbeat.most for heartbeat in heartbeats):,} at once")
        for name, text in (("retried", "{:,} retries"), ("throttled", "{:,} × 429"), ("waited_s", "{:,.0f} s for limits")):
            total = sum(getattr(heartbeat, name) for heartbeat in heartbeats)
            cells += [text.format(total)] if total >= 1 else []
        return cells

    def _replicas(self) -> list[RenderableType]:
        """A line for each of the busiest replicas, and one line for all others."""
        found = sorted(self.status.replicas.items(), key=lambda item: (item[1].state == "loading", -item[1].busy, item[0]))
        shown = found if len(found) <= SHOWN + 1 else found[:SHOWN]
        rows = [
            (f"  {name}", heartbeat.state, f"{heartbeat.busy:,} in flight", f"{self._rate([name]):,.1f} rows/s")
            for name, heartbeat in shown
        ]
        if rest := found[len(shown) :]:
            states = ", ".join(
                f"{count:,} {state}" for state, count in Counter(heartbeat.state for _, heartbeat in rest).items()
            )
            busy = sum(heartbeat.busy for _, heartbeat in rest)
            rate = self._rate([name for name, _ in rest])
            rows.append((f"  {len(rest):,} more", states, f"{busy:,} in flight", f"{rate:,.1f} rows/s"))
        if (waiting := self.expected - len(found)) > 0:
            rows.append((f"  {waiting:,} more", "starting", "", ""))
        if self.console.width < ALIGNED:
            return [Text(line) for row in rows for line in flow(row, self.console.width)]
        table = Table.grid(padding=(0, 2))
        for row in rows:
            table.add_row(*row)
        return [table] if rows else []

    def _rate(self, names: list[str]) -> float:
        first, last = self.samples[0], self.samples[-1]
        span = last.at - first.at
        return sum(last.replicas.get(n, 0) - first.replicas.get(n, 0) for n in names) / span if span > 0 else 0.0


def flow(cells: Iterable[str], width: int) -> list[str]:
    """Lines of up to `width` characters from cells with dots between them. No cell is broken."""
    lines: list[str] = []
    for cell in filter(None, cells):
        if lines and len(lines[-1]) + 3 + len(cell) <= width:
            lines[-1] += f" · {cell}"
        else:
            lines.append(cell)
    return lines


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds))) if seconds < 1e9 else "for ever"
