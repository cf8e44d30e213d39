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
from engines.remote.provider import Provider
from engines.text import for_template
from engines.types import BYTES_PER_TOKEN, DEFAULT_MAX_TOKENS, FIRST_OUTPUT, Message, Request, answer
from pipeline.config import Config
from pipeline.dataset.reader import ParsedRow, ReadSplit, RowReader
from pipeline.storage.exact_json import dumps
from pipeline.storage.ledger_index import Index

SHOWN = 3  # number of requests, and of examples of each problem

ReportLine = tuple[str, str, bool]  # title, text, True for a problem
Check = Callable[[Request], None]  # raises `EngineError` if the engine cannot take a request


@dataclass(slots=True)
class DatasetEstimate:
    """The content of a dataset. Tokens are those of distinct requests, because equal deterministic ones are asked once."""

    config: Config
    context: int | None = None  # context length of the model in tokens, if known
    count: PromptRenderer | None = None  # counts tokens as the model does; without it, tokens are estimated from bytes
    check: Check | None = None
    whole: bool = True  # all rows were read
    files: int = 0
    rows: int = 0
    size: int = 0  # bytes of the rows that were read, as JSON; counted only with a row limit
    answered: int = 0  # rows whose answers the ledger has
    keys: set[bytes] = field(default_factory=set)  # the first 8 bytes of each distinct request's key
    prompts: array[int] = field(default_factory=lambda: array("q"))  # tokens of each distinct request
    output: float = 0.0  # upper bound of the tokens of all answers, if `bounded`; otherwise an estimate
    bounded: bool = True  # max_tokens limits every answer
    invalid: int = 0
    reasons: list[str] = field(default_factory=list)  # examples of invalid rows
    refused: int = 0  # requests that the engine does not take
    refusals: list[str] = field(default_factory=list)  # examples of refused requests
    too_long: int = 0  # prompts that do not fit the context
    cut: int = 0  # answers that the context may cut short of max_tokens
    long: list[str] = field(default_factory=list)  # examples of `too_long` and `cut`
    first: list[tuple[str, Request]] = field(default_factory=list)  # (id, request) of the first requests to be asked
    models: set[str] = field(default_factory=set)  # models that rows name

    @property
    def duplicates(self) -> int:
        return self.rows - self.invalid - self.answered - len(self.keys)

    @property
    def bad(self) -> int:
        return self.invalid + self.refused + self.too_long

    def read(
        self, splits: list[ReadSplit], row_reader: RowReader, known: Index | None = None, max_rows: int = sys.maxsize,
        seconds: float = math.inf,
    ) -> DatasetEstimate:  # fmt: skip
        """Reads all rows, or the first `max_rows` rows, for up to `seconds` seconds."""
        self.files = len({split.file_split.file for split in splits})
        until = time.monotonic() + seconds
        for items in (items for split in splits for items in row_reader.read(split)):
            keys = {id(item): item.key for item in items if item.key}
            answered = set(compress(keys, known.find(list(keys.values())) >= 0)) if known is not None else set()
            for item in items:
                if self.rows >= max_rows or (self.rows and self.rows % 32 == 0 and time.monotonic() > until):
                    self.whole = False
                    return self
                self.rows += 1
                if max_rows < sys.maxsize:
                    self.size += len(dumps(item.row.columns)) + 1 if item.row.columns is not None else 0
                if id(item) in answered:
                    self.answered += 1
                else:
                    self._add(item)
        return self

    def _add(self, item: ParsedRow) -> None:
        params = self.config.params()
        failure, tokens, turns, request = item.failure.message if item.failure else "", 0, 0, None
        try:
            if parsed := item.parsed:
                params, key = params.override(parsed.generation), (item.key or b"").hex()
                request = Request(parsed.messages, params, parsed.model, parsed.adapter, key, turns=parsed.turns)
                turns = len(request.turns)
                # Of a multi-turn request: its last request, with empty answers in place of the model's.
                last: list[Message] = [*request.messages]
                for turn in request.turns:
                    last += [answer(""), Message(role="user", content=turn)]
                if self.count:
                    tokens = self.count.count(last, params)
                else:  # the first estimate of a remote engine, before it has measured usage; images are left out
                    shown = [*map(for_template, last), *(params.tools or ())]
                    tokens = round(len(dumps(shown)) / BYTES_PER_TOKEN)
        except EngineError as error:
            failure = f"{item.id}: {error}"
        if failure or not item.key or request is None:
            self.invalid += 1
            self.reasons += [failure] if len(self.reasons) < SHOWN else []
            return
        limit = params.max_tokens
        context = self.context or math.inf
        if tokens + (limit or 1) > context:  # without max_tokens, an answer gets the rest of the context
            self.too_long += tokens >= context
            self.cut += tokens < context
            room = f" and {limit:,} for the answer" if limit else ""
            self.long += [f"{item.id}: {tokens:,} tokens{room}"] if len(self.long) < SHOWN else []
        if item.key[:8] in self.keys:
            return
        self.keys.add(item.key[:8])
        if request.model is not None and len(self.models) < SHOWN:
            self.models.add(request.model)
        self.prompts.append(tokens)
        remote = bool(self.config.engine.provider)
        max_output = limit or (FIRST_OUTPUT if remote else DEFAULT_MAX_TOKENS)
        self.output += (turns + (params.n or 1)) * max(0, min(max_output, context - tokens))
        self.bounded &= bool(limit or not remote)
        if len(self.first) < SHOWN:
            self.first.append((item.id, request))
        try:
            if self.check is not None:
                self.check(request)
        except EngineError as error:
            self.refused += 1
            self.refusals += [f"{item.id}: {error}"] if len(self.refusals) < SHOWN else []

    # -- in words -----------------------------------------------------------------------------------------------------

    @property
    def way(self) -> str:
        return "by the model's tokenizer and template" if self.count else "estimated: 4 bytes of JSON each"

    @property
    def answers(self) -> str:
        words = "at most" if self.bounded else "about (nothing bounds all of them; see generation.max_tokens)"
        return f"{words} {self.output:,.0f}"

    def lengths(self, bad: bool) -> Iterator[ReportLine]:
        """Lines about requests that do not fit the context."""
        if self.too_long + self.cut:
            fit = f"{self.too_long:,} prompts do not fit {self.context:,} tokens"
            yield "too long", f"{fit}; {self.cut:,} answers may be cut short by it", bad
            yield from (("", example, bad) for example in self.long)

    def cost(self, factor: float = 1.0) -> str:
        """The cost of these rows' requests in words. `factor` scales it from the rows that were read to all rows."""
        engine, batch = self.config.engine, self.config.run.mode == "batch"
        price, share = engine.price, Provider.of(engine).batch_share(engine.model) if batch else 1.0
        if not engine.provider and not price.known:
            return "none: the engine runs here"
        if not price.known:
            return "not known: set engine.price.input and engine.price.output"
        dollars = price.of(sum(self.prompts), 0, self.output) * factor * share
        words = "at most" if self.bounded and factor == 1 else "about"
        by = (f"the list price of {price.as_of}" if price.as_of else "engine.price") + " for batches" * batch
        others = f"; rows name other models ({', '.join(sorted(self.models))})" if self.models - {engine.model} else ""
        return f"{words} ${format_dollars(dollars)} by {by}{others}"


def format_dollars(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 1 or amount == 0 else f"{amount:.2g}" if amount >= 0.0001 else f"{amount:.1e}"
