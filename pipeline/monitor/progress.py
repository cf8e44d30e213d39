"""Shows the progress of a run: a live view on a terminal, or a line at regular intervals in a log."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from engines.config import EngineConfig
from engines.text import counted, visible
from pipeline.monitor.console import progress_interval, progress_line
from pipeline.monitor.status import RunStatus, row_cells

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


@contextmanager
def phase_line(console: Console, text: str, in_log: bool = True) -> Iterator[None]:
    """Shows `text` at once. On a terminal, the line also shows the seconds since then, and goes away at the end. A log gets
    the line unless `in_log` is false."""
    began = time.monotonic()
    if not console.is_terminal:
        if in_log:
            progress_line(console, f"{text} …")
        yield
        return
    spinner = Spinner("dots")

    def shown() -> RenderableType:
        spinner.update(text=f"{text}: {time.monotonic() - began:,.0f} s")
        return spinner

    with Live(console=console, get_renderable=shown, transient=True, refresh_per_second=8):
        yield


def show_counts(console: Console, status: RunStatus) -> None:
    """Prints the counts of a run that ends before its output is complete."""
    if status.read:
        console.print(f"{', '.join(row_cells(status.rows, status.fed))}. {sent_line(status.sent)}", highlight=False)


def sent_line(sent: int) -> str:
    return f"This run sent {counted(sent, 'request')}."


@dataclass(slots=True)
class Sample:
    """The progress of the run at one moment."""

    at: float  # seconds of the monotonic clock
    rows: int = 0  # that got a result in this run
    tokens: int = 0  # output tokens
    replicas: dict[str, int] = field(default_factory=dict)  # replica -> rows that it finished


class RunProgress:
    """Shows each `RunStatus` that is passed to `show`."""

    def __init__(
        self,
        console: Console,
        every_s: float,
        engine: EngineConfig | None = None,
        budget_usd: float | None = None,
        began: float | None = None,
    ) -> None:
        """`began`: the start of the run, in seconds since the epoch."""
        self.console, self.every_s, self.budget_usd = console, progress_interval(console, every_s), budget_usd
        self.priced = engine is not None and engine.price.known
        self.loads = "connecting" if engine and engine.provider else "loading the model"
        self.title = " ".join(filter(None, (engine.kind, engine.model))) if engine else ""
        self.status = RunStatus()
        self.expected = 0  # number of requested replicas
        self.started = self.shown = time.monotonic()
        self.began = self.started - (time.time() - began if began is not None else 0.0)
        self.samples: deque[Sample] = deque([Sample(self.started)])
        self.live: Live | None = None
        if console.is_terminal:
            self.live = Live(console=console, get_renderable=self.render, transient=True, refresh_per_second=4)

    def __enter__(self) -> RunProgress:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *failure: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()
        elif not any(failure) and self.shown != self.started:  # a log with lines gets a last one, with the final counts
            self._print_line()

    def show(self, status: RunStatus, expected: int = 0) -> None:
        self.status, self.expected = status, expected
        now = time.monotonic()
        if now - self.samples[-1].at >= SAMPLE_S:
            replicas = {name: heartbeat.done for name, heartbeat in status.replicas.items()}
            self.samples.append(Sample(now, self._finished, status.output_tokens, replicas))
            # Drop samples older than `RECENT_S`, except the last of them, and samples from before the first answer.
            while len(self.samples) > 2 and (self.samples[1].at < now - RECENT_S or not self.samples[1].rows):
                self.samples.popleft()
        if self.live is None and now - self.shown >= self.every_s:
            self.shown = now
            self._print_line()

    def _print_line(self) -> None:
        progress_line(self.console, " · ".join(self._line()))

    # -- figures ------------------------------------------------------------------------------------------------------

    @property
    def _finished(self) -> int:
        """Rows that got a result since this view was opened."""
        return self.status.rows_done + self.status.rows_failed

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.began

    def _recent(self) -> tuple[float, float]:
        """Rows and output tokens per second over the last `RECENT_S` seconds."""
        first, last = self.samples[0], self.samples[-1]
        span = last.at - first.at
        return ((last.rows - first.rows) / span, (last.tokens - first.tokens) / span) if span > 0 else (0.0, 0.0)

    def _left(self) -> str:
        rate, open = self._recent()[0], self.status.rows.open
        if not self.status.fed:
            return "still reading the input"
        return f"{_duration(open / rate)} left" if rate and open else ""

    def _cost(self) -> Iterable[str]:
        """The cost of this run, and the share of the budget that all runs used."""
        status, finished = self.status, self._finished
        if not status.asked or not (self.priced or status.cost_usd):
            return
        unknown = f" and the unknown cost of {counted(status.cost_unknown, 'request')}" if status.cost_unknown else ""
        yield f"${status.cost_usd:.4g}{unknown} in this run"
        if status.fed and finished and not status.cost_unknown:
            yield f"${status.cost_usd * (1 + status.rows.open / finished):.4g} projected"
        if self.budget_usd is not None:
            yield f"${status.spent:.4g} of ${self.budget_usd:g} spent or in flight in all runs"

    def _counts(self) -> list[str]:
        status = self.status
        cells = row_cells(status.rows, status.fed)
        if status.in_flight:
            there = f" ({status.finished_there:,} finished at the provider)" if status.finished_there else ""
            cells.append(f"{counted(status.in_flight, 'request')} in flight{there}")
        return cells

    def _start(self) -> str:
        """The step of the start that the replicas are in. Empty as soon as one replica works."""
        if self._finished or self.status.finished or self.status.gone.done:
            return ""
        states = Counter(heartbeat.state for heartbeat in self.status.replicas.values())
        waiting = max(states["loading"], self.expected - (states.total() - states["loading"]))
        if states.total() > states["loading"] or not waiting:
            return ""
        return f"{self.loads} in {counted(waiting, 'replica')}"

    def _line(self) -> list[str]:
        """The cells of a line for a log."""
        rows, tokens = self._recent()
        cells = [self._start(), *self._counts(), *_speed(rows, tokens), self._left(), *self._cost()]
        if self.status.trouble:
            cells.append(f"retrying: {visible(self.status.trouble)}")
        return [cell for cell in [*cells, f"{_duration(self.elapsed)} since the start"] if cell]

    # -- the live view ------------------------------------------------------------------------------------------------

    def render(self) -> RenderableType:
        """The live view. Lines are filled cell by cell, so a narrow terminal shows more lines."""
        status, width = self.status, self.console.width
        rows, tokens = self._recent()
        resolved = status.rows.done + status.rows.failed
        share = f"{resolved / status.read:.0%}" if status.read else ""
        bar = Table.grid(padding=(0, 1))
        size = max(10, min(width - 8, 60))
        bar.add_row(ProgressBar(max(1, status.read), resolved, width=size, pulse=not status.read), share)
        progress = [self._start(), *self._counts(), self._left(), f"{_duration(self.elapsed)} since the start"]
        overall = self._finished / max(1e-9, time.monotonic() - self.started)
        speed = [*_speed(rows, tokens), f"{overall:,.1f} rows/s overall"]
        lines = [*flow(progress, width), *flow([*speed, *self._cost()], width), *flow(self._load(), width)]
        body: list[RenderableType] = [Text(self.title, "bold", no_wrap=True, overflow="ellipsis"), bar, *map(Text, lines)]
        if status.trouble:
            body.append(Text(f"retrying: {visible(status.trouble)}", "yellow", no_wrap=True, overflow="ellipsis"))
        return Group(*body, *self._replicas())

    def _load(self) -> list[str]:
        """Cells with concurrency, retries and waits for limits, summed over all replicas."""
        heartbeats = [*self.status.replicas.values(), self.status.gone]
        cells = []
        if admitted := [heartbeat.admitted for heartbeat in heartbeats if heartbeat.admitted is not None]:
            most = sum(heartbeat.most for heartbeat in heartbeats)
            cells.append(f"at most {sum(admitted):,.0f} of {counted(most, 'request')} at once")
        retried, throttled, waited_s = (
            sum(getattr(heartbeat, name) for heartbeat in heartbeats) for name in ("retried", "throttled", "waited_s")
        )
        cells += [counted(retried, "retry", "retries")] if retried >= 1 else []
        cells += [f"{throttled:,} × 429"] if throttled >= 1 else []
        return cells + ([f"{waited_s:,.0f} s for limits"] if waited_s >= 1 else [])

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


def _speed(rows: float, tokens: float) -> list[str]:
    return [f"{rows:,.1f} rows/s", f"{tokens:,.0f} tokens/s out"]


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
    return str(datetime.timedelta(seconds=round(seconds))) if seconds < 1e9 else "more than 30 years"
