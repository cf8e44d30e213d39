"""The rows that wait in a worker for a slot of the engine, and the slots that wait for a row."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Iterable

from pipeline.executors.live.byte_limits import ENGINE_BYTES
from pipeline.executors.live.recorder import LeasedRow


class WaitingRows:
    """A queue. A row leaves it when it would not wait in the engine, and when there is memory for it and for its result."""

    def __init__(self, full: Callable[[], bool], at_once: Callable[[], int] = lambda: sys.maxsize) -> None:
        """`full`: true if the results that wait to be written leave no room for another one. `at_once`: the most rows that
        fit into the engine's memory."""
        self.full, self.at_once = full, at_once
        self.room: Callable[[], int] = lambda: sys.maxsize  # further rows that the engine takes without letting them wait
        self.rows: deque[LeasedRow] = deque()
        self.busy = 0  # rows in the engine
        self.inside_bytes = 0  # of the rows in the engine
        self.ended = False  # no more rows will come
        self.held_back = False  # the next row waits for memory
        self.idle = 0  # slots that wait
        self.changed = asyncio.Condition()  # rows came, there is room, or the end came
        self.waking: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self.rows)

    def __bool__(self) -> bool:
        return bool(self.rows)

    async def add(self, rows: Iterable[LeasedRow]) -> None:
        before = len(self.rows)
        self.rows.extend(rows)
        await self.wake(min(len(self.rows) - before, self.room()))

    async def take(self) -> LeasedRow | None:
        """The next row, which then counts as in the engine. Waits for it. None at the end."""
        if not self._can_enter():
            async with self.changed:
                self.idle += 1
                try:
                    await self.changed.wait_for(lambda: self._can_enter() or self.ended)
                finally:
                    self.idle -= 1
            if not self.rows:
                return None
        row = self.rows.popleft()
        self.inside_bytes += len(row.request)
        self.busy += 1
        return row

    def leave(self, row: LeasedRow) -> None:
        """The row came out of the engine."""
        self.busy -= 1
        self.inside_bytes -= len(row.request)

    def put_back(self, row: LeasedRow) -> None:
        """The row, which came out of the engine without a result, is the next one."""
        self.rows.appendleft(row)

    async def share_room(self) -> None:
        """Wakes other slots if the row that left makes room for more than its own slot's next row."""
        if self.held_back:
            await self.wake()
        elif self.idle and self.rows and 1 < (room := self._room()) < sys.maxsize:
            await self.wake(room - 1)

    async def wake_held_back(self) -> None:
        """Results were written: there may be memory again."""
        if self.held_back:
            await self.wake()

    async def wake(self, slots: int = sys.maxsize) -> None:
        async with self.changed:
            self.changed.notify(min(slots, len(self.rows)))

    def note_room(self) -> None:
        """A row in the engine waits for a retry, or went to a fallback: there is room for another one."""
        if self.idle and self.rows:
            task = asyncio.get_running_loop().create_task(self.wake(1))
            self.waking.add(task)
            task.add_done_callback(self.waking.discard)

    async def end(self) -> None:
        self.ended = True
        self.rows.clear()
        async with self.changed:
            self.changed.notify_all()

    def _room(self) -> int:
        """Further rows that the engine takes without letting them wait, and that fit into memory."""
        at_once = self.at_once()
        return self.room() if at_once == sys.maxsize else min(self.room(), at_once - self.busy)

    def _can_enter(self) -> bool:
        if not self.rows:
            return False
        is_large = self.inside_bytes and self.inside_bytes + len(self.rows[0].request) > ENGINE_BYTES
        self.held_back = bool(is_large) or self.full()
        return not self.held_back and (not self.busy or (self.busy < self.at_once() and self.room() > 0))
