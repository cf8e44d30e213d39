"""The functions in which this process spends its processor time, by samples of its stack.

A timer of processor time interrupts the main thread every millisecond. That distorts less than a profiler that traces
every call. Time in C counts for the Python function that called it.
"""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any, Self

EVERY_S = 0.001


class Sampler:
    """Takes samples of the main thread as long as the context."""

    def __init__(self) -> None:
        self.own: Counter[str] = Counter()  # samples in a function itself
        self.below: Counter[str] = Counter()  # samples in it or in what it calls
        self.samples = 0

    def __enter__(self) -> Self:
        signal.signal(signal.SIGPROF, self._sample)
        signal.setitimer(signal.ITIMER_PROF, EVERY_S, EVERY_S)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, signal.SIG_IGN)

    def _sample(self, _: int, frame: FrameType | None) -> None:
        self.samples += 1
        seen = set()
        while frame is not None:
            code = frame.f_code
            name = f"{'/'.join(Path(code.co_filename).parts[-2:])}:{code.co_qualname}"
            if not seen:
                self.own[name] += 1
            seen.add(name)
            frame = frame.f_back
        self.below.update(seen)

    def top(self, count: int = 20) -> list[str]:
        """The functions with most of the time: its own share, and that with its calls, in percent."""
        whole = max(1, self.samples)
        return [
            f"{100 * own / whole:5.1f}% {100 * self.below[name] / whole:5.1f}% {name}"
            for name, own in self.own.most_common(count)
        ]


def cpu_us(before: Any, after: Any, count: int) -> float:
    """Processor time (user and system) between two values of `os.times()`, in microseconds for each of `count`."""
    return round((after.user + after.system - before.user - before.system) * 1e6 / count, 1)
