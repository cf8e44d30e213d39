"""Checks the rows, the engine and the output directory before a run. Sends nothing and writes nothing.

`run.dry_run=true` reads the whole input and shows the first requests as they would be sent. A real run checks its
configuration and stops at once if it is wrong. Then it reads the first rows and prints an estimate from them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engines.base import Engine
from engines.errors import ConfigError, EngineError, ErrorCode
from engines.local.preflight import model_on_this_machine
from engines.local.prompt_renderer import PromptRenderer
from engines.rendering import render_messages
from engines.text import counted, visible
from engines.types import Request
from pipeline.config import Config
from pipeline.context import RunContext
from pipeline.dataset.reader import ReadSplit
from pipeline.executors.registry import executor_of
from pipeline.monitor.console import warn
from pipeline.output.up_to_date import unchanged
from pipeline.preflight.checks import examine, output_state
from pipeline.preflight.dataset_estimate import Check, DatasetEstimate, ReportLine
from pipeline.storage.filesystem import exists
from pipeline.storage.ledger_index import read_index
from pipeline.storage.output_files import MANIFEST

# A real run estimates its size from the first rows, and searches more of them for one that can be asked.
FIRST_ROWS, FIRST_S = 1000, 1.0
SEARCH_ROWS, SEARCH_S = 100_000, 30.0


# -- a real run -------------------------------------------------------------------------------------------------------


def look_at_configuration(context: RunContext) -> Check | None:
    """Checks the configuration. Raises `ConfigError` if no row could be answered. Prints doubtful findings."""
    findings = examine(context.config, thorough=False)
    if findings.engine is not None:
        findings.engine.close()
    # A complete output needs no engine, unless it is to be made again.
    complete = context.config.run.resume and exists(context.fs, f"{context.root}/{MANIFEST}")
    if findings.wrong and not complete:
        raise findings.wrong[0].error()
    for finding in findings.doubtful:
        warn(context.console, finding.text if finding.is_warning else f"On this machine: {finding.text}")
    return findings.check


def look_at_rows(context: RunContext, splits: list[ReadSplit], check: Check | None) -> None:
    """Prints an estimate for all rows from the first ones. Raises `ConfigError` if no row can be asked.

    It reads on until a row can be asked, up to `SEARCH_ROWS` rows and `SEARCH_S` seconds. If that is not the whole input,
    the run goes on: a later row may be valid.
    """
    config, console = context.config, context.console
    estimate = DatasetEstimate(config, check=check)
    try:
        estimate.read(splits, context.row_reader, max_rows=FIRST_ROWS, seconds=FIRST_S)
        if not estimate.askable and not estimate.whole:
            estimate = DatasetEstimate(config, check=check)
            estimate.read(splits, context.row_reader, max_rows=SEARCH_ROWS, seconds=SEARCH_S, until_askable=True)
    except Exception:  # the run reports the error of the row; this look ahead must not end a run
        return
    if problem := estimate.no_row():
        raise ConfigError(problem, code=ErrorCode.NO_ROW)
    total = _total(splits, estimate)
    factor = total / estimate.rows if total and estimate.rows else 1.0
    rows = f"{counted(estimate.rows, 'row')} in {counted(estimate.files, 'file')}"
    if not estimate.whole:
        first = f"the first {counted(estimate.rows, 'row')}"
        rows = f"About {counted(total, 'row')}, by {first}" if total else first.capitalize()
    tokens = sum(estimate.prompts) * factor
    words = "at most" if estimate.bounded and estimate.whole else "about"
    cost = f"; cost: {estimate.cost(factor)}" if config.engine.provider or config.engine.price.known else ""
    console.print(
        f"{rows}: about {tokens:,.0f} tokens in, {words} {estimate.output * factor:,.0f} out{cost}.",
        highlight=False, markup=False,
    )  # fmt: skip
    for count, (one, many), examples in (
        (estimate.invalid, ("cannot be read",) * 2, estimate.reasons),
        (estimate.refused, ("is refused by this engine", "are refused by this engine"), estimate.refusals),
    ):
        if count:
            of = "them" if estimate.whole else f"the first {counted(estimate.rows, 'row')}"
            what = f"{one} and becomes an error row" if count == 1 else f"{many} and become error rows"
            warn(console, f"{count:,} of {of} {what}, for example {examples[0]}"[:400])
    for sentence in estimate.columns():
        console.print(Text(f"{sentence}."))


def _total(splits: list[ReadSplit], estimate: DatasetEstimate) -> int | None:
    """The number of all rows, estimated from the size if necessary. None if it is unknown until all of them are read."""
    if estimate.whole:
        return estimate.rows
    file_splits = [split.file_split for split in splits]
    taken = [len(file_split.take) for file_split in file_splits if file_split.take is not None]
    if taken and len(taken) == len(file_splits):
        return sum(taken)
    if estimate.size and all(file_split.kind == "jsonl" and file_split.stop >= 0 for file_split in file_splits):
        size = sum(file_split.stop - file_split.start for file_split in file_splits)
        return max(estimate.rows, round(size / (estimate.size / estimate.rows)))
    return None


# -- a dry run --------------------------------------------------------------------------------------------------------


def dry_run(context: RunContext, splits: list[ReadSplit]) -> tuple[DatasetEstimate, list[str]]:
    """Reads the whole input and prints what a run would do. Returns the estimate, and reasons why a run is impossible."""
    config, fs, root, console = context.config, context.fs, context.root, context.console
    index = read_index(fs, root)
    findings = examine(config, thorough=True)
    wrong = [finding.text for finding in findings.wrong]
    length, renderer = model_on_this_machine(config.engine)
    known = index.only(failed_count_as_answered=not config.run.retry_failed)
    estimate = DatasetEstimate(config, length, renderer, findings.check)
    executor = executor_of(config)
    estimate.preview = None if executor.findings(config) else executor.preview(config)
    estimate.read(splits, context.row_reader, known)
    if problem := estimate.no_row():
        wrong.append(problem)
    if estimate.invalid and config.dataset.on_bad_input == "fail":
        wrong.append(f"{estimate.reasons[0]} (dataset.on_bad_input=quarantine would make it an error row)")
    complete = unchanged(config, fs, root, splits, index) is not None
    state, unusable = output_state(fs, root, len(index), estimate.answered, complete)
    if unusable:
        wrong.append(state)
    doubtful = [
        finding.text if finding.is_warning else f"{finding.text} (the replicas' machines may have it)"
        for finding in findings.doubtful
    ]
    show(_about(config, estimate, doubtful, wrong, state, unusable), console)
    if estimate.first:
        first = counted(len(estimate.first), "request, as it would be sent:", "requests, as they would be sent:")
        console.print(Text(f"The first {first}", "bold"))
    for id, request in estimate.first:
        console.print(Text(f"\n{visible(id)}", "bold cyan"))
        console.print(Text(shown_request(findings.engine, renderer, request)), soft_wrap=True)
    if findings.engine is not None:
        findings.engine.close()
    return estimate, wrong


def _about(
    config: Config, estimate: DatasetEstimate, doubtful: list[str], wrong: list[str], state: str, unusable: bool
) -> Iterable[ReportLine]:
    yield (
        "dataset",
        f"{counted(estimate.rows, 'row')} in {counted(estimate.files, 'file')}: {estimate.answered:,} done, "
        f"{estimate.invalid:,} invalid, {estimate.open:,} open: {counted(estimate.requests, 'request')} to send, "
        f"{counted(estimate.duplicates, 'duplicate')}.",
        False,
    )
    yield from (("", reason, True) for reason in estimate.reasons)
    yield from (("" if at else "columns", f"{sentence}.", False) for at, sentence in enumerate(estimate.columns()))
    yield "tokens in", f"{sum(estimate.prompts):,} ({estimate.way})", False
    yield "tokens out", estimate.answers, False
    yield "cost", estimate.cost(), False
    for title, sentence in estimate.preview.lines() if estimate.preview else ():
        yield title, sentence, False
    if config.run.budget_usd is not None:
        yield "budget", f"${config.run.budget_usd:g} for all runs into this output", False
    engine = config.engine
    yield "engine", " ".join(filter(None, (engine.kind, engine.model, engine.adapter))), False
    if estimate.refused:
        yield "refused", f"{counted(estimate.refused, 'request is', 'requests are')} refused by this engine", True
        yield from (("", example, True) for example in estimate.refusals)
    yield from estimate.lengths(bool(estimate.too_long))
    yield "output", state, unusable
    for text in doubtful:
        yield "warning", text, True
    for text in wrong:
        yield "cannot run", text, True


def show(lines: Iterable[ReportLine], console: Console) -> None:
    """Prints a table of titles and texts. Problems are red."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    for title, text, bad in lines:
        # As `Text`, because it may quote a row, which must not be interpreted as markup.
        table.add_row(title, Text(text, "red" if bad else ""))
    console.print(table, "", highlight=False)


def shown_request(engine: Engine | None, renderer: PromptRenderer | None, request: Request) -> str:
    """A request as it would be sent: the HTTP request of a remote engine, the prompt of a local one. Secrets are `***`."""
    render = engine.render_request if engine else renderer.render_request if renderer else render_messages
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return visible(render(request))
    except EngineError as error:
        return visible(f"(cannot be sent: {error})")
