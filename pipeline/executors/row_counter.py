"""Counts rows by the result of their request. A request serves all rows with its key: the first one and its duplicates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import compress

import numpy as np

from pipeline.monitor.status import RunStatus
from pipeline.storage.ledger_index import DedupFilter


class RowCounter:
    """Sets the counts of rows in `status` (`duplicates`, `rows_done`, `rows_failed`, `rows_truncated`, `errors`)."""

    def __init__(self, status: RunStatus, reads_ahead: bool = False) -> None:
        """`reads_ahead`: all rows are read before the first request has a result.

        Memory: with `reads_ahead`, 8 bytes for each request, and one dictionary entry for each request with duplicates.
        Otherwise one entry for each request without a result, and 8 bytes for each failed or truncated one, because
        duplicates may be read after their request has its result.
        """
        self.status = status
        self.rows: dict[bytes, int] = {}
        self.failed: dict[str, DedupFilter] = {}  # error type -> keys
        self.truncated = DedupFilter()
        self.finished = DedupFilter() if reads_ahead else None

    def read_again(self) -> None:
        """All rows without a result are about to be read once more."""
        self.rows.clear()
        self.status.duplicates = 0

    def read(self, new: Iterable[bytes], duplicates: Sequence[bytes]) -> None:
        """Rows were read: `new` are the keys of the first rows of requests, `duplicates` the keys of further rows."""
        self.status.duplicates += len(duplicates)
        if self.finished is not None:
            for key in duplicates:
                self.rows[key] = self.rows.get(key, 1) + 1
            return
        self.rows |= dict.fromkeys(new, 1)
        late = []
        for key in duplicates:
            if key in self.rows:
                self.rows[key] += 1
            else:
                late.append(key)
        if late:
            self._read_late(late)

    def _read_late(self, keys: list[bytes]) -> None:
        """Counts rows whose request has a result already."""
        status, failed = self.status, 0
        for type, known in self.failed.items():
            rows = int(np.count_nonzero(known.contains(keys)))
            status.errors[type] += rows
            failed += rows
        status.rows_failed += failed
        status.rows_done += len(keys) - failed
        status.rows_truncated += int(np.count_nonzero(self.truncated.contains(keys)))

    def finish(self, keys: Sequence[bytes], failures: Mapping[bytes, str], truncated: Sequence[bytes]) -> None:
        """These requests have a result. `failures` has the error types of those that failed. Each request counts once."""
        status, cut, alone = self.status, set(truncated), 0
        if self.finished is not None:
            keys, alone = list(compress(keys, self.finished.add(keys))), 1
        by_type: dict[str, list[bytes]] = {}
        for key in keys:
            rows = self.rows.pop(key, alone)
            if not rows:  # counted before
                continue
            if (type := failures.get(key)) is not None:
                status.rows_failed += rows
                status.errors[type] += rows
                by_type.setdefault(type, []).append(key)
            else:
                status.rows_done += rows
                status.rows_truncated += rows if key in cut else 0
        if self.finished is None:
            self.truncated.add(truncated)
            for type, found in by_type.items():
                self.failed.setdefault(type, DedupFilter()).add(found)
