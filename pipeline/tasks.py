"""Runs the same work over many items, in this process or in others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from pipeline.storage.ledger_index import KeyLookup
from pipeline.storage.ledger_snapshot import LedgerSnapshot

Item = TypeVar("Item")
Result = TypeVar("Result")


class TaskRunner(Protocol):
    """Calls `work(item, lookup)` for each item. The results come in any order. Raises `OSError` if the storage failed,
    or if a machine was lost with its work."""

    def map(
        self, work: Callable[[Item, KeyLookup], Result], items: Sequence[Item], snapshot: LedgerSnapshot
    ) -> Iterator[Result]: ...


class LocalTasks:
    """One item after the other, in this process."""

    def map(
        self, work: Callable[[Item, KeyLookup], Result], items: Sequence[Item], snapshot: LedgerSnapshot
    ) -> Iterator[Result]:
        return (work(item, snapshot.index) for item in items)
