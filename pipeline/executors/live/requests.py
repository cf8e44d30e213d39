"""From parsed rows to the requests that the dispatcher hands out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from engines.errors import ConfigError
from engines.params import GenerationParams
from engines.types import Request
from pipeline.dataset.formats import Parsed
from pipeline.dataset.reader import ParsedRow, ReadSplit, RowReader, SplitSummary
from pipeline.executors.live.queue import PendingRequest, prefix_of
from pipeline.storage.exact_json import dumps
from pipeline.storage.ledger_index import Index, RemoteIndex

# The columns of `PendingRequest`.
ROWS_SCHEMA = pa.schema(
    [
        ("key", pa.binary(32)),
        ("id", pa.string()),
        ("request", pa.binary()),
        ("prefix", pa.int64()),
        ("max_tokens", pa.int64()),
    ]
)


def read_split(
    split: ReadSplit, row_reader: RowReader, done: Index | RemoteIndex, fail_on_bad_input: bool, summary: SplitSummary
) -> Iterator[pa.Table]:
    """Tables of the rows of `split` that are still to be asked; fills `summary` on the way."""
    for items in row_reader.read(split):
        summary.rows += len(items)
        if split.file_split.kind != "parquet":
            summary.kinds.add([item.row.columns for item in items if item.row.columns is not None])
        good = [item for item in items if item.failure is None]
        if len(good) < len(items):
            summary.invalid += len(items) - len(good)
            if fail_on_bad_input:
                first = next(item.failure for item in items if item.failure is not None)
                raise ConfigError(f"{first.message} (dataset.on_bad_input=quarantine would go on)")
        for item in good:
            if item.parsed is not None and item.parsed.generation:
                summary.params.update(item.parsed.generation)
        wanted = np.flatnonzero(done.find([item.key or b"" for item in good]) < 0)
        summary.answered += len(good) - len(wanted)
        if len(wanted):
            yield _table([good[at] for at in wanted])


def _table(items: list[ParsedRow]) -> pa.Table:
    pending = [_pending_request(item.key, item.id, item.parsed) for item in items if item.key and item.parsed]
    columns = zip(*pending, strict=True)
    return pa.Table.from_arrays(
        [pa.array(column, kind) for column, kind in zip(columns, ROWS_SCHEMA.types, strict=True)], schema=ROWS_SCHEMA
    )


def _pending_request(key: bytes, id: str, parsed: Parsed) -> PendingRequest:
    limit = parsed.generation.get("max_tokens")
    return PendingRequest(
        key, id, _request(parsed), prefix_of(parsed), limit if isinstance(limit, int) and limit < 1 << 62 else 0
    )


def _request(parsed: Parsed) -> bytes:
    request: dict[str, Any] = {"messages": parsed.messages}
    for name in ("generation", "model", "adapter", "turns"):
        if value := getattr(parsed, name):
            request[name] = value
    return dumps(request)


def request_of(values: Mapping[str, Any], generation: GenerationParams, key: bytes) -> Request:
    """The request in what `_request` made, with its overrides laid over the run's parameters. Raises `EngineError`."""
    return Request(
        messages=values["messages"],
        generation=generation.override(values.get("generation") or {}),
        model=values.get("model"),
        adapter=values.get("adapter"),
        key=key.hex(),
        turns=values.get("turns") or [],
    )


def dataset_of(splits: list[ReadSplit], row_reader: RowReader, done: Any, fail_on_bad_input: bool, report: Any) -> Any:
    """A Ray Dataset of the rows to ask. `done` is a reference to an index; `report(number, summary)` a remote method."""
    import ray
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    def task(split: ReadSplit) -> ReadTask:
        def read() -> Iterator[pa.Table]:
            summary = SplitSummary()
            yield ROWS_SCHEMA.empty_table()
            yield from read_split(split, row_reader, ray.get(done), fail_on_bad_input, summary)
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
    # Small blocks: the first rows arrive while a file is still being read.
    context.target_max_block_size = 2 << 20
    context.target_min_block_size = 1
    # A provider that is down for an hour must not end the run from inside Ray Data.
    if hasattr(context, "execution_no_progress_timeout_s"):
        context.execution_no_progress_timeout_s = -1
    return ray.data.read_datasource(
        Conversations(),
        override_num_blocks=max(1, len(splits)),
        # No CPU is reserved: replicas may have reserved all of them, and would wait for rows for ever.
        ray_remote_args={"num_cpus": 0, "max_retries": 3},
        concurrency=max(2, int(ray.cluster_resources().get("CPU", 2))),
    )
