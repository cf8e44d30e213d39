"""An executor for tests, and the example for a new one. It answers in this process, without an engine and without Ray."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console

from engines.errors import Failure
from engines.types import Choice, Completion
from pipeline.configuration.compose import compose
from pipeline.dataset.plan import SplitInput
from pipeline.dataset.reader import SplitSummary
from pipeline.executors.base import Execution, Executor
from pipeline.executors.requests import read_split
from pipeline.executors.row_counter import RowCounter
from pipeline.monitor.status import RunStatus
from pipeline.run import Outcome, run
from pipeline.storage.exact_json import loads
from pipeline.storage.ledger import Record, write_segment
from pipeline.storage.ledger_index import DedupFilter
from pipeline.storage.ledger_snapshot import LedgerSnapshot


class LengthExecutor(Executor):
    """Answers each row with the length of its question, in this process; a question of "?" fails.

    It does not do the last two duties of an executor: it has no budget, and does not stop early.
    """

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
        counter = RowCounter(status)
        self.context.state.begin_pass()
        self.context.state.status = status
        for split in inputs.splits:
            summary = summaries[split.number] = SplitSummary()
            for table in read_split(split, self.context.row_reader, known.index, False, summary):
                new = seen.add(table["key"])
                rows = [row for row, fresh in zip(table.to_pylist(), new, strict=True) if fresh]
                counter.read(
                    [row["key"] for row in rows],
                    [key for key, fresh in zip(table["key"].to_pylist(), new, strict=True) if not fresh],
                )
                records = [record for row in rows if (record := self._record(row))]
                if records:
                    write_segment(self.context.fs, self.context.root, "length", records)
                status.done += sum(record.completion.error is None for record in records)
                failures = {r.key: r.completion.error.type for r in records if r.completion.error is not None}
                status.failed += len(failures)
                status.sent += len(records)
                counter.finish([record.key for record in records], failures, [])
            status.read += summary.rows
            status.invalid += summary.invalid
            status.answered += summary.answered
            status.failed_before += summary.failed
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


class Job:
    """`job(data, "key=value", …)` runs the main job with this executor; keeps what it printed."""

    def __init__(self, out: Path) -> None:
        self.out, self.printed = out, ""

    def __call__(self, data: Path, *overrides: str) -> Outcome:
        console = Console(file=io.StringIO(), width=200)
        base = ["engine=echo", f"dataset.path={data}", f"output.path={self.out}", "run.mode=length"]
        try:
            return run(compose([*base, *overrides]), console)
        finally:
            self.printed = console.file.getvalue()  # type: ignore[attr-defined]

    def answers(self) -> list[str | None]:
        answers: list[str | None] = pq.read_table(self.out / "data")["response"].to_pylist()
        return answers
