"""The batches that a run would make, for a dry run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from engines.remote.batch.factory import batch_limits
from engines.text import counted
from engines.types import Request
from pipeline.config import Config
from pipeline.executors.base import Preview
from pipeline.storage.exact_json import dumps

# Bytes of a line beside its messages, parameters and tools: the names, the id and the model.
_LINE_BYTES = 200


class BatchPreview(Preview):
    """Counts requests and their approximate bytes by model, because a batch holds requests of one model."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.max_rows, self.max_bytes = batch_limits(config.engine.provider["batch"], queue=True)
        self.rows: Counter[str | None] = Counter()
        self.bytes: Counter[str | None] = Counter()

    def add(self, request: Request) -> None:
        model = request.model or self.config.engine.model
        self.rows[model] += 1
        self.bytes[model] += _LINE_BYTES + len(dumps([request.messages, request.generation.given(), request.extra_body]))

    def lines(self) -> Iterator[tuple[str, str]]:
        count = sum(
            max(_parts(self.rows[model], self.max_rows), _parts(self.bytes[model], self.max_bytes)) for model in self.rows
        )
        size = self.bytes.total() / 1e6
        yield (
            "batches",
            (
                f"about {count:,}, with {counted(self.rows.total(), 'request')} and {size:,.1f} MB in all; "
                f"one holds at most {counted(self.max_rows, 'request')} and {self.max_bytes / 1e6:,.0f} MB of one model"
            ),
        )
        poll = self.config.run.batch_poll_s
        yield (
            "time",
            f"answers come within 24 h of each batch's start; the run asks for news every {poll:g} s at the latest",
        )


def _parts(amount: int, most: int) -> int:
    return -(-amount // most)
