"""Rows that wait for a worker, in an order that serves the engines' prefix caches."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable

from pipeline.executors.requests import PendingRequest


class PrefixQueue:
    """Rows of one prefix go to one worker while there are any, for its KV cache has that prefix already.

    A worker that has come to the end of its own takes the prefix that has waited longest; where others have them all,
    it helps with the largest. So no worker waits, and no row for longer than the buffer takes to pass.
    """

    def __init__(self) -> None:
        self.groups: OrderedDict[int, deque[PendingRequest]] = OrderedDict()
        self.at: dict[str, int] = {}  # worker -> the prefix it was last at
        self.owners: Counter[int] = Counter()
        self.rows = 0

    def __len__(self) -> int:
        return self.rows

    def add(self, rows: Iterable[PendingRequest]) -> None:
        for row in rows:
            group = self.groups.get(row.prefix)
            if group is None:
                group = self.groups[row.prefix] = deque()
            group.append(row)
            self.rows += 1

    def put_back(self, rows: list[PendingRequest]) -> None:
        """Rows that a worker gave back are the next."""
        for row in reversed(rows):
            self.groups.setdefault(row.prefix, deque()).appendleft(row)
            self.groups.move_to_end(row.prefix, last=False)
        self.rows += len(rows)

    def take(self, worker: str, want: int) -> list[PendingRequest]:
        """Up to `want` rows for a worker."""
        taken: list[PendingRequest] = []
        while len(taken) < want and self.groups:
            prefix = self._next(worker)
            group = self.groups[prefix]
            for _ in range(min(want - len(taken), len(group))):
                taken.append(group.popleft())
            if not group:
                del self.groups[prefix]
        self.rows -= len(taken)
        return taken

    def _next(self, worker: str) -> int:
        at = self.at.get(worker)
        if at is not None and at in self.groups:
            return at
        found = next((prefix for prefix in self.groups if prefix not in self.owners), None)
        if found is None:
            found = max(self.groups, key=lambda prefix: len(self.groups[prefix]))
        self.leave(worker)
        self.at[worker] = found
        self.owners[found] += 1
        return found

    def leave(self, worker: str) -> None:
        """What a worker was at is free for others."""
        at = self.at.pop(worker, None)
        if at is not None:
            self.owners[at] -= 1
            if not self.owners[at]:
                del self.owners[at]

    def longest_first(self) -> None:
        """The end is near: rows that may take longest go first, so that none is left alone when the others are done."""
        groups = [deque(sorted(group, key=lambda row: -row.max_tokens)) for group in self.groups.values()]
        groups.sort(key=lambda group: -group[0].max_tokens)
        self.groups = OrderedDict((group[0].prefix, group) for group in groups)
