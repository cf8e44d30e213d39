"""Checks the rows, the engine and the output directory before a run. Sends nothing and writes nothing.

`run.dry_run=true` reads the whole input and shows the first requests as they would be sent. A real run checks its
configuration and stops at once if it is wrong. Then it reads the first rows and prints an estimate from them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import pyarrow.fs as pafs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engines.base import Engine
from engines.errors import EngineError
from engines.local.preflight import model_on_this_machine
from engines.local.prompt_renderer import PromptRenderer
from engines.rendering import render_messages
from engines.text import visible
from engines.types import Request
from pipeline.config import Config
from pipeline.dataset.reader import ReadSplit, RowReader
from pipeline.output.manifest import unchanged
from pipeline.preflight.checks import examine, output_state
from pipeline.preflight.dataset_estimate import Check, DatasetEstimate, ReportLine
from pipeline.storage.filesystem import exists
from pipeline.storage.ledger_index import read_index
from pipeline.storage.output_files import MANIFEST

# A real run reads at most `FIRST_ROWS` rows ahead. Listing and reading may take up to `FIRST_S` seconds each.
FIRST_ROWS, FIRST_S = 1000, 1.0


# -- a real run -------------------------------------------------------------------------------------------------------


def look_at_configuration(config: Config, fs: pafs.FileSystem, root: str, console: Console) -> Check | None:
    """Checks the configuration. Raises `ConfigError` if no row could be answered. Prints doubtful findings."""
    findings = examine(config, thorough=False)
    if findings.engine is not None:
        findings.engine.close()
    # A complete output needs no engine, unless it is to be made again.
    if findings.wrong and not (config.run.resume and exists(fs, f"{root}/{MANIFEST}")):
        raise findings.wrong[0].error()
    for finding in findings.doubtful:
        console.print(Text(f"On this machine: {finding.text}", "yellow"))
    return findings.check


def look_at_rows(
    config: Config, splits: list[ReadSplit], row_reader: RowReader, check: Check | None, console: Console
) -> None:
    """Prints an estimate for all rows from the first ones."""
    try:
        estimate = DatasetEstimate(config, check=check).read(splits, row_reader, max_rows=FIRST_ROWS, seconds=FIRST_S)
    except Exception:  # the run itself will report the error for the row; reading ahead must not end a run
        return
    total = _total(splits, estimate)
    factor = total / estimate.rows if total and estimate.rows else 1.0
    rows = f"{estimate.rows:,} rows in {estimate.files:,} files"
    if not estimate.whole:
        rows = f"About {total:,} rows, by the first {estimate.rows:,}" if total else f"The first {estimate.rows:,} rows"
    tokens = sum(estimate.prompts) * factor
    words = "at most" if estimate.bounded and estimate.whole else "about"
    cost = f"; cost: {estimate.cost(factor)}" if config.engine.provider or config.engine.price.known else ""
    console.print(
        f"{rows}: about {tokens:,.0f} tokens in, {words} {estimate.output * factor:,.0f} out{cost}.",
        highlight=False, markup=False,
    )  # fmt: skip
    for count, what, examples in (
        (estimate.invalid, "cannot be read", estimate.reasons),
        (estimate.refused, "are not for this engine", estimate.refusals),
    ):
        if count:
            of = "them" if estimate.whole else f"the first {estimate.rows:,} rows"
            text = f"{count:,} of {of} {what} and become error rows, such as {examples[0]}"
            console.print(Text(text[:400], "yellow"))


def _total(splits: list[ReadSplit], estimate: DatasetEstimate) -> int | None:
    """The number of all rows, estimated from the size if necessary. None if only reading all of them would show it."""
    if estimate.whole:
        return estimate.rows
    if splits and all(split.limit is not None for split in splits):
        return sum(split.limit or 0 for split in splits)
    if estimate.size and all(split.file_split.kind == "jsonl" and split.file_split.stop >= 0 for split in splits):
        size = sum(split.file_split.stop - split.file_split.start for split in splits)
        return max(estimate.rows, round(size / (estimate.size / estimate.rows)))
    return None


# -- a dry run --------------------------------------------------------------------------------------------------------


def dry_run(
    config: Config, fs: pafs.FileSystem, root: str, row_reader: RowReader, splits: list[ReadSplit], console: Console
) -> tuple[DatasetEstimate, list[str]]:
    """Reads the whole input and prints what a run would do. Returns the estimate, and why a run is impossible."""
    index = read_index(fs, root)
    findings = examine(config, thorough=True)
    wrong = [finding.text for finding in findings.wrong]
    context, renderer = model_on_this_machine(config.engine)
    known = index.only(failed_count_as_answered=not config.run.retry_failed)
    estimate = DatasetEstimate(config, context, renderer, findings.check).read(splits, row_reader, known)
    if estimate.invalid and config.dataset.on_bad_input == "fail":
        wrong.append(f"{estimate.reasons[0]} (dataset.on_bad_input=quarantine would go on)")
    complete = unchanged(config, fs, root, splits, index) is not None
    state, unusable = output_state(fs, root, len(index), estimate.answered, complete)
    if unusable:
        wrong.append(state)
    doubtful = [finding.text for finding in findings.doubtful]
    show(_about(config, estimate, doubtful, wrong, state, unusable), console)
    if estimate.first:
        console.print(Text(f"The first {len(estimate.first)} requests, as they would be sent:", "bold"))
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
        f"{estimate.rows:,} rows in {estimate.files:,} files: {len(estimate.keys):,} requests to ask, "
        f"{estimate.duplicates:,} duplicates, {estimate.answered:,} already answered, {estimate.invalid:,} cannot be read.",
        False,
    )
    yield from (("", reason, True) for reason in estimate.reasons)
    yield "tokens in", f"{sum(estimate.prompts):,} ({estimate.way})", False
    yield "tokens out", estimate.answers, False
    yield "cost", estimate.cost(), False
    if config.run.budget_usd is not None:
        yield "budget", f"${config.run.budget_usd:g} for all runs into this output", False
    engine = config.engine
    yield "engine", " ".join(filter(None, (engine.kind, engine.model, engine.adapter))), False
    if estimate.refused:
        yield "refused", f"{estimate.refused:,} requests are not for this engine", True
        yield from (("", example, True) for example in estimate.refusals)
    yield from estimate.lengths(bool(estimate.too_long))
    yield "output", state, unusable
    for text in doubtful:
        yield "here", f"{text} (the replicas' machines may have it)", True
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
        return visible(f"(cannot be asked: {error})")
