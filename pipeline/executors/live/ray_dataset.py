"""Reads a large input with Ray Data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from pipeline.dataset.reader import ReadSplit, RowReader, SplitSummary
from pipeline.executors.requests import ROWS_SCHEMA, read_split
from pipeline.garbage import collect_rarely

# Bytes and rows of a block. Small blocks: the first rows arrive while a file is still being read. Each block costs Ray Data
# several milliseconds in the process that takes them.
BLOCK_BYTES, BLOCK_ROWS = 2 << 20, 8192
# The most read tasks at once. They read far more rows than one dispatcher leases, and each one starts a process.
READERS = 128


def dataset_of(splits: list[ReadSplit], row_reader: RowReader, done: Any, fail_on_bad_input: bool, report: Any) -> Any:
    """A Ray Dataset of the rows to ask. `done` is a reference to an index; `report(number, summary)` a remote method."""
    import ray
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    def task(split: ReadSplit) -> ReadTask:
        def read() -> Iterator[pa.Table]:
            collect_rarely()
            summary = SplitSummary()
            yield ROWS_SCHEMA.empty_table()
            yield from _blocks(read_split(split, row_reader, ray.get(done), fail_on_bad_input, summary))
            ray.get(report.remote(split.number, summary))

        return ReadTask(read, BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None))

    class Conversations(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            return [task(split) for split in splits]

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.target_max_block_size = BLOCK_BYTES
    context.target_min_block_size = 1
    # A provider that is down for an hour must not end the run from inside Ray Data.
    if hasattr(context, "execution_no_progress_timeout_s"):
        context.execution_no_progress_timeout_s = -1
    return ray.data.read_datasource(
        Conversations(),
        override_num_blocks=max(1, len(splits)),
        # No CPU is reserved: replicas may have reserved all of them, and would wait for rows for ever.
        ray_remote_args={"num_cpus": 0, "max_retries": 3},
        concurrency=min(READERS, max(2, int(ray.cluster_resources().get("CPU", 2)))),
    )


def _blocks(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        waiting.append(table)
        rows, size = rows + len(table), size + table.nbytes
        if rows >= BLOCK_ROWS or size >= BLOCK_BYTES:
            yield pa.concat_tables(waiting)
            waiting, rows, size = [], 0, 0
    if waiting:
        yield pa.concat_tables(waiting)
