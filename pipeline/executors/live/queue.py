"""The queue of rows that no worker has. Its order lets engines reuse cached prefixes."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter

from pipeline.executors.requests import PendingRequest


class PrefixQueue:
    """Rows with one prefix go to one worker, whose KV cache has that prefix.

    If a worker's prefix has no more rows, the worker takes the prefix that has waited longest. If other workers have all
    prefixes, it takes rows of the largest one. So no worker is idle while rows wait.
    """

    def __init__(self) -> None:
        self.groups: OrderedDict[int, deque[PendingRequest]] = OrderedDict()
        self.at: dict[str, int] = {}  # worker -> its prefix
        self.owners: Counter[int] = Counter()
        self.rows = 0
        self.bytes = 0  # of the rows' requests

    def __len__(self) -> int:
        return self.rows

    def add(self, rows: Iterable[PendingRequest]) -> None:
        for prefix, same in groupby(rows, attrgetter("prefix")):
            found = list(same)
            self.groups.setdefault(prefix, deque()).extend(found)
            self.rows += len(found)
            self.bytes += sum(len(row.request) for row in found)

    def put_back(self, rows: list[PendingRequest]) -> None:
        """Returns rows to the front of the queue."""
        for row in reversed(rows):
            self.groups.setdefault(row.prefix, deque()).appendleft(row)
            self.groups.move_to_end(row.prefix, last=False)
            self.bytes += len(row.request)
        self.rows += len(rows)

    def take(self, worker: str, want: int) -> list[PendingRequest]:
        """Up to `want` rows for a worker."""
        taken: list[PendingRequest] = []
        while len(taken) < want and self.groups:
            prefix = self._next(worker)
            group = self.groups[prefix]
            if len(group) <= want - len(taken):
                taken += group
                del self.groups[prefix]
            else:
                taken += [group.popleft() for _ in range(want - len(taken))]
        self.rows -= len(taken)
        self.bytes -= sum(len(row.request) for row in taken)
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
        """Other workers may take the worker's prefix."""
        at = self.at.pop(worker, None)
        if at is not None:
            self.owners[at] -= 1
            if not self.owners[at]:
                del self.owners[at]

    def longest_first(self) -> None:
        """Puts the rows that may take longest first, when all rows are read: so the last workers end together."""
        groups = [deque(sorted(group, key=lambda row: -row.max_tokens)) for group in self.groups.values()]
        groups.sort(key=lambda group: -group[0].max_tokens)
        self.groups = OrderedDict((group[0].prefix, group) for group in groups)
