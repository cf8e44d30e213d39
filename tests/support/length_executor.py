"""An executor for tests that answers in this process, without an engine and without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engines.errors import Failure
from engines.types import Choice, Completion
from pipeline.dataset.plan import SplitInput
from pipeline.dataset.reader import SplitSummary
from pipeline.executors.base import Execution, Executor
from pipeline.executors.requests import read_split
from pipeline.monitor.status import RunStatus
from pipeline.storage.exact_json import loads
from pipeline.storage.ledger import Record, write_segment
from pipeline.storage.ledger_index import DedupFilter
from pipeline.storage.ledger_snapshot import LedgerSnapshot


class LengthExecutor(Executor):
    """Answers each row with the length of its question, in this process; a question of "?" fails."""

    prepared = 0
    closed = 0
    passes: list[int] = []  # rows asked in each call
    skip_first: Sequence[str] = ()  # questions that the first call leaves without a record
    unfinished: str | None = None

    @classmethod
    def manifest_entries(cls, context: Any) -> dict[str, Any]:
        return {"lengths": sum(cls.passes)}

    def prepare(self) -> None:
        type(self).prepared += 1

    def close(self) -> None:
        type(self).closed += 1

    def execute(self, inputs: SplitInput, known: LedgerSnapshot) -> Execution:
        status, summaries, seen = RunStatus(fed=True), dict[int, SplitSummary](), DedupFilter()
        self.context.state.enter("asking")
        self.context.state.status = status
        for split in inputs.splits:
            summary = summaries[split.number] = SplitSummary()
            for table in read_split(split, self.context.row_reader, known.index, False, summary):
                new = seen.add(table["key"])
                rows = [row for row, fresh in zip(table.to_pylist(), new, strict=True) if fresh]
                records = [record for row in rows if (record := self._record(row))]
                if records:
                    write_segment(self.context.fs, self.context.root, "length", records)
                status.done += sum(record.completion.error is None for record in records)
                status.failed += sum(record.completion.error is not None for record in records)
        self.passes.append(status.done + status.failed)
        return Execution(status, summaries, self.unfinished)

    def _record(self, row: dict[str, Any]) -> Record | None:
        text = loads(row["request"])["messages"][0]["content"]
        if not self.passes and text in self.skip_first:
            return None
        choice = Choice({"role": "assistant", "content": str(len(text))}, "stop")
        error = Failure("bad_request", "no question") if text == "?" else None
        completion = Completion([] if error else [choice], engine="length", error=error)
        return Record(row["key"], row["id"], completion, 1.0)
