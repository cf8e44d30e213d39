"""Estimates the rows, tokens and cost of a dataset before any request is sent."""

from __future__ import annotations

import math
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import compress

from engines.errors import EngineError
from engines.local.prompt_renderer import PromptRenderer
from engines.tasks import TASKS, is_chat
from engines.text import counted, for_template
from engines.types import BYTES_PER_TOKEN, DEFAULT_MAX_TOKENS, FIRST_OUTPUT, Message, Request, answer
from pipeline.config import Config
from pipeline.dataset.formats import COLUMN_ROLES, RowParser
from pipeline.dataset.occurrences import Occurrences
from pipeline.dataset.reader import ParsedRow, ReadSplit, RowReader
from pipeline.dataset.task_inputs import INPUT_ROLES
from pipeline.executors.base import Preview
from pipeline.executors.registry import executor_of
from pipeline.storage.exact_json import dumps
from pipeline.storage.ledger_index import MISSING, DedupFilter, Index

SHOWN = 3  # number of requests, and of examples of each problem

# Roles that need no mention, and the meaning of the others.
_USUAL = ("id", "messages", "conversations", "body", "prompt", "turns", *INPUT_ROLES)
_MEANINGS = {
    "system": "the system message",
    "model": "the model that is asked",
    "adapter": "the adapter",
    "generation": "generation parameters",
    "tools": "the tools of the model",
}
_LAST_ANSWER = {
    "drop": "it is not sent, and goes into the column reference",
    "keep": "it is sent, and the model sees it",
    "continue": "the model continues it",
}

ReportLine = tuple[str, str, bool]  # title, text, True for a problem
Check = Callable[[Request], None]  # raises `EngineError` if the engine cannot take a request


@dataclass(slots=True)
class DatasetEstimate:
    """The content of a dataset. Tokens are those of the requests, each of which may serve several rows."""

    config: Config
    context: int | None = None  # context length of the model in tokens, if known
    count: PromptRenderer | None = None  # counts tokens as the model does; without it, tokens are estimated from bytes
    check: Check | None = None
    parser: RowParser | None = None  # of the rows that are read
    whole: bool = True  # all rows were read
    files: int = 0
    rows: int = 0
    size: int = 0  # bytes of the rows that were read, as JSON; counted only with a row limit
    answered: int = 0  # rows whose results the ledger has
    requests: int = 0  # distinct requests without a result
    askable: bool = False  # the engine takes one of them, or the ledger has a result
    prompts: array[int] = field(default_factory=lambda: array("q"))  # tokens of each distinct request
    output: float = 0.0  # the tokens of all answers: an upper bound if `bounded`, otherwise an estimate
    bounded: bool = True  # max_tokens limits every answer
    invalid: int = 0
    reasons: list[str] = field(default_factory=list)  # examples of invalid rows
    refused: int = 0  # requests that the engine does not take
    refusals: list[str] = field(default_factory=list)  # examples of refused requests
    too_long: int = 0  # prompts that do not fit the context
    cut: int = 0  # answers that the context may cut short of max_tokens
    long: list[str] = field(default_factory=list)  # examples of `too_long` and `cut`
    first: list[tuple[str, Request]] = field(default_factory=list)  # (id, request) of the first requests to be asked
    preview: Preview | None = None  # gets each distinct request that would be sent
    _seen: DedupFilter = field(default_factory=DedupFilter)
    models: set[str] = field(default_factory=set)  # models that rows name
    special: dict[str, str] = field(default_factory=dict)  # column -> its role, for columns with a meaning
    data: set[str] = field(default_factory=set)  # columns with the name of a role, but without its meaning, in some row
    answered_ends: int = 0  # rows whose conversation ends with an answer

    @property
    def open(self) -> int:
        """Rows that need a request, or share one."""
        return self.rows - self.invalid - self.answered

    @property
    def duplicates(self) -> int:
        """Open rows that share the request of an earlier row."""
        return self.open - self.requests

    @property
    def bad(self) -> int:
        return self.invalid + self.refused + self.too_long

    def read(
        self, splits: list[ReadSplit], row_reader: RowReader, known: Index | None = None, max_rows: int = sys.maxsize,
        seconds: float = math.inf, until_askable: bool = False,
    ) -> DatasetEstimate:  # fmt: skip
        """Reads all rows, or the first `max_rows` rows, for up to `seconds` seconds. `until_askable` also ends with the
        first row that can be asked."""
        self.parser = row_reader.parser
        self.files = len({split.file_split.file for split in splits})
        until = time.monotonic() + seconds
        occurrences = Occurrences()
        for items in (items for split in splits for items in row_reader.read(split, occurrences)):
            good = [item for item in items if item.key]
            answered = set[int]()
            if known is not None:
                answered = set(map(id, compress(good, row_reader.results(good, known) != MISSING)))
            keys = {id(item): item.key for item in good if item.key and id(item) not in answered}
            fresh = set(compress(keys, self._seen.add(list(keys.values()))))
            for item in items:
                late = self.rows and self.rows % 32 == 0 and time.monotonic() > until
                if self.rows >= max_rows or late or (until_askable and self.askable):
                    self.whole = False
                    return self
                self.rows += 1
                if max_rows < sys.maxsize:
                    self.size += len(dumps(item.row.columns)) + 1 if item.row.columns is not None else 0
                if id(item) in answered:
                    self.answered += 1
                    self.askable = True
                else:
                    self._add(item, id(item) in fresh)
        return self

    def no_row(self) -> str:
        """The reason why a run is useless, if no row can be asked; empty if one can, or if a row was not read."""
        if self.askable or not self.whole or not self.rows:
            return ""
        rows = f"none of the {self.rows:,} rows" if self.rows > 1 else "the only row"
        return f"{rows} of dataset.path can{'not' if self.rows == 1 else ''} be asked: {(self.reasons + self.refusals)[0]}"

    def _add(self, item: ParsedRow, fresh: bool) -> None:
        params = self.config.params()
        self._add_columns(item)
        failure, tokens, turns, request = item.failure.message if item.failure else "", 0, 0, None
        try:
            if parsed := item.parsed:
                params, key = params.for_task(parsed.task).override(parsed.generation), (item.key or b"").hex()
                request = Request(
                    parsed.messages, params, parsed.model, parsed.adapter, key, parsed.turns,
                    extra_body=parsed.extra_body, continue_answer=parsed.continue_answer,
                    task=parsed.task, inputs=parsed.inputs,
                )  # fmt: skip
                turns = len(request.turns)
                # A multi-turn request counts as its last request, with empty answers in place of the model's.
                last: list[Message] = [*request.messages]
                for turn in request.turns:
                    last += [answer(""), Message(role="user", content=turn)]
                if self.count and last:
                    tokens = self.count.count(last, params, parsed.continue_answer)
                else:  # the first estimate of a remote engine, before it has measured usage; images are left out
                    shown = [*map(for_template, last), *(params.tools or ()), *request.inputs.values()]
                    tokens = round(len(dumps(shown)) / BYTES_PER_TOKEN)
        except EngineError as error:
            failure = f"{item.id}: {error}"
        if failure or not item.key or request is None:
            self.invalid += 1
            self.reasons += [failure] if len(self.reasons) < SHOWN else []
            return
        limit = params.max_tokens
        context = self.context or math.inf
        if (
            tokens + (limit or is_chat(request.task)) > context
        ):  # without max_tokens, an answer gets the rest of the context
            self.too_long += tokens >= context
            self.cut += tokens < context
            room = f" and {limit:,} for the answer" if limit else ""
            self.long += [f"{item.id}: {counted(tokens, 'token')}{room}"] if len(self.long) < SHOWN else []
        if not fresh:
            return
        self.requests += 1
        if request.model is not None and len(self.models) < SHOWN:
            self.models.add(request.model)
        self.prompts.append(tokens)
        if is_chat(request.task):  # other tasks have no output tokens
            remote = bool(self.config.engine.provider)
            max_output = limit or (FIRST_OUTPUT if remote else DEFAULT_MAX_TOKENS)
            self.output += (turns + (params.n or 1)) * max(0, min(max_output, context - tokens))
            self.bounded &= bool(limit or not remote)
        if len(self.first) < SHOWN:
            self.first.append((item.id, request))
        try:
            if self.check is not None:
                self.check(request)
            self.askable = True
            if self.preview is not None:
                self.preview.add(request)
        except EngineError as error:
            self.refused += 1
            self.refusals += [f"{item.id}: {error}"] if len(self.refusals) < SHOWN else []

    def _add_columns(self, item: ParsedRow) -> None:
        """Notes the columns with a meaning, and those that only have the name of a role."""
        if item.row.columns is None or self.parser is None:
            return
        found = self.parser.special_columns(item.row.columns)
        if item.parsed is not None:
            if item.parsed.model is None and found.get("model") != self.parser.columns.get("model"):
                found.pop("model", None)  # the engine holds one model
            messages, kind = item.parsed.messages, TASKS[item.parsed.task]
            ends = bool(messages) and messages[-1]["role"] == "assistant" and not kind.answer_is_input
            self.answered_ends += ends or item.parsed.reference is not None
        self.special |= {column: role for role, column in found.items()}
        names = set(COLUMN_ROLES) & item.row.columns.keys() - set(found.values())
        self.data |= {name for name in names if item.row.columns[name] not in (None, "", [])}

    # -- in words -----------------------------------------------------------------------------------------------------

    def columns(self) -> Iterator[str]:
        """Sentences about columns whose meaning a user should know. Empty if only the conversation and the id have one."""
        more = [f"{column} ({_MEANINGS.get(role, role)})" for column, role in self.special.items() if role not in _USUAL]
        if more:
            yield f"Columns with a meaning: {', '.join(more)}. dataset.columns.ROLE=null makes a column data"
        if data := sorted(self.data - self.special.keys()):
            yield f"Columns that are only data: {', '.join(data)}. dataset.columns.ROLE=COLUMN gives a column a meaning"
        if self.answered_ends:
            last = self.config.dataset.last_answer
            rows = counted(self.answered_ends, "row ends", "rows end")
            yield f"{rows} with an answer: {_LAST_ANSWER[last]} (dataset.last_answer={last})"

    @property
    def way(self) -> str:
        return "by the model's tokenizer and template" if self.count else "estimated: 4 bytes of JSON a token"

    @property
    def answers(self) -> str:
        words = "at most" if self.bounded else "about (not all answers have a limit: set generation.max_tokens)"
        return f"{words} {self.output:,.0f}"

    def lengths(self, bad: bool) -> Iterator[ReportLine]:
        """Lines about requests that do not fit the context."""
        if self.too_long + self.cut:
            fit = (
                f"{counted(self.too_long, 'prompt does', 'prompts do')} not fit into the context of {self.context:,} tokens"
            )
            yield "too long", f"{fit}; {counted(self.cut, 'answer')} may be truncated by it", bad
            yield from (("", example, bad) for example in self.long)

    def cost(self, factor: float = 1.0) -> str:
        """The cost of these rows' requests in words. `factor` scales it from the rows that were read to all rows."""
        engine, executor = self.config.engine, executor_of(self.config)
        price = engine.price
        if not engine.provider and not price.known:
            return "none: the engine runs on your machines"
        if not price.known:
            return "unknown: set engine.price.input and engine.price.output"
        rates = executor.price(engine)
        each = self.output / max(len(self.prompts), 1)
        dollars = sum(rates.at(prompt).of(prompt, 0, each) for prompt in self.prompts) * factor
        words = "at most" if self.bounded and factor == 1 else "about"
        by = (f"the list price of {price.as_of}" if price.as_of else "engine.price") + executor.price_name
        others = f"; rows name other models ({', '.join(sorted(self.models))})" if self.models - {engine.model} else ""
        return f"{words} ${format_dollars(dollars)} by {by}{others}"


def format_dollars(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 1 or amount == 0 else f"{amount:.2g}" if amount >= 0.0001 else f"{amount:.1e}"
