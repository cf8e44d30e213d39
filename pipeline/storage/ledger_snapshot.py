"""The ledger at one moment, as executors and finalize see it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import pyarrow.fs as pafs

from pipeline.storage.filesystem import listing
from pipeline.storage.ledger_index import Index, OldCosts, read_index
from pipeline.storage.output_files import SEGMENTS

# A ledger of up to this size is read in the calling process: starting another process takes longer.
SMALL_BYTES = 8 << 20


class LedgerSnapshot:
    """The answered requests of an output directory. The ledger is read once, when `index` is first used. If an executor
    reads the ledger itself, nothing is read here.

    `failed_count_as_answered`: if False, failed requests are sent again.
    """

    def __init__(
        self,
        fs: pafs.FileSystem,
        root: str,
        old_costs: OldCosts,
        read_large: Callable[[bool], tuple[Index, Any]],
        *,
        failed_count_as_answered: bool,
    ) -> None:
        self.fs, self.root, self.old_costs, self.failed_count_as_answered = fs, root, old_costs, failed_count_as_answered
        self.read_large = read_large  # reads a large ledger in another process; also returns a reference to the index
        self.reference: Any = None  # to the index, or to a lookup service, for other processes: see `RayCluster.share`

    @cached_property
    def small(self) -> bool:
        """True if the ledger is so small that one process reads it and writes the output."""
        return sum(info.size or 0 for info in listing(self.fs, f"{self.root}/{SEGMENTS}")) <= SMALL_BYTES

    @cached_property
    def index(self) -> Index:
        if self.small:
            return read_index(self.fs, self.root, self.old_costs).only(
                failed_count_as_answered=self.failed_count_as_answered
            )
        index, self.reference = self.read_large(self.failed_count_as_answered)
        return index
