"""Checks the rows, the engine and the output directory before a run. Sends nothing and writes nothing.

`run.dry_run=true` reads the whole input and shows the first requests as they would be sent. A real run checks only its
configuration and the first rows, and stops at once if no row could be answered.
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
    found = examine(config, thorough=False)
    if found.engine is not None:
        found.engine.close()
    # A complete output needs no engine, unless it is to be made again.
    if found.wrong and not (config.run.resume and exists(fs, f"{root}/{MANIFEST}")):
        raise found.wrong[0].error()
    for finding in found.doubtful:
        console.print(Text(f"On this machine: {finding.text}", "yellow"))
    return found.check


def look_at_rows(
    config: Config, splits: list[ReadSplit], row_reader: RowReader, check: Check | None, console: Console
) -> None:
    """Prints an estimate for all rows from the first ones."""
    try:
        found = DatasetEstimate(config, check=check).read(splits, row_reader, max_rows=FIRST_ROWS, seconds=FIRST_S)
    except Exception:  # the run itself will report the error for the row; reading ahead must not end a run
        return
    total = _total(splits, found)
    factor = total / found.rows if total and found.rows else 1.0
    rows = f"{found.rows:,} rows in {found.files:,} files"
    if not found.whole:
        rows = f"About {total:,} rows, by the first {found.rows:,}" if total else f"The first {found.rows:,} rows"
    tokens = sum(found.prompts) * factor
    words = "at most" if found.bounded and found.whole else "about"
    cost = f"; cost: {found.cost(factor)}" if config.engine.provider or config.engine.price.known else ""
    console.print(
        f"{rows}: about {tokens:,.0f} tokens in, {words} {found.output * factor:,.0f} out{cost}.",
        highlight=False, markup=False,
    )  # fmt: skip
    for number, what, examples in (
        (found.invalid, "cannot be read", found.reasons),
        (found.refused, "are not for this engine", found.refusals),
    ):
        if number:
            of = "them" if found.whole else f"the first {found.rows:,} rows"
            text = f"{number:,} of {of} {what} and become error rows, such as {examples[0]}"
            console.print(Text(text[:400], "yellow"))


def _total(splits: list[ReadSplit], found: DatasetEstimate) -> int | None:
    """The number of all rows, estimated from the size if necessary. None if only reading all of them would show it."""
    if found.whole:
        return found.rows
    if splits and all(split.limit is not None for split in splits):
        return sum(split.limit or 0 for split in splits)
    if found.size and all(split.file_split.kind == "jsonl" and split.file_split.stop >= 0 for split in splits):
        size = sum(split.file_split.stop - split.file_split.start for split in splits)
        return max(found.rows, round(size / (found.size / found.rows)))
    return None


# -- a dry run --------------------------------------------------------------------------------------------------------


def dry_run(
    config: Config, fs: pafs.FileSystem, root: str, row_reader: RowReader, splits: list[ReadSplit], console: Console
) -> tuple[DatasetEstimate, list[str]]:
    """Reads the whole input and prints what a run would do. Returns the estimate, and why a run is impossible."""
    index = read_index(fs, root)
    seen = examine(config, thorough=True)
    wrong = [finding.text for finding in seen.wrong]
    context, renderer = model_on_this_machine(config.engine)
    known = index.only(failed_too=not config.run.retry_failed)
    found = DatasetEstimate(config, context, renderer, seen.check).read(splits, row_reader, known)
    if found.invalid and config.dataset.on_bad_input == "fail":
        wrong.append(f"{found.reasons[0]} (dataset.on_bad_input=quarantine would go on)")
    complete = unchanged(config, fs, root, splits, index) is not None
    state, unusable = output_state(fs, root, len(index), found.answered, complete)
    if unusable:
        wrong.append(state)
    doubtful = [finding.text for finding in seen.doubtful]
    show(_about(config, found, doubtful, wrong, state, unusable), console)
    if found.first:
        console.print(Text(f"The first {len(found.first)} requests, as they would be sent:", "bold"))
    for id, request in found.first:
        console.print(Text(f"\n{visible(id)}", "bold cyan"))
        console.print(Text(shown_request(seen.engine, renderer, request)), soft_wrap=True)
    if seen.engine is not None:
        seen.engine.close()
    return found, wrong


def _about(
    config: Config, found: DatasetEstimate, doubtful: list[str], wrong: list[str], state: str, unusable: bool
) -> Iterable[ReportLine]:
    yield (
        "dataset",
        f"{found.rows:,} rows in {found.files:,} files: {len(found.keys):,} requests to ask, "
        f"{found.duplicates:,} duplicates, {found.answered:,} already answered, {found.invalid:,} cannot be read.",
        False,
    )
    yield from (("", reason, True) for reason in found.reasons)
    yield "tokens in", f"{sum(found.prompts):,} ({found.way})", False
    yield "tokens out", found.answers, False
    yield "cost", found.cost(), False
    if config.run.budget_usd is not None:
        yield "budget", f"${config.run.budget_usd:g} for all runs into this output", False
    engine = config.engine
    yield "engine", " ".join(filter(None, (engine.kind, engine.model, engine.adapter))), False
    if found.refused:
        yield "refused", f"{found.refused:,} requests are not for this engine", True
        yield from (("", example, True) for example in found.refusals)
    yield from found.lengths(bool(found.too_long))
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
