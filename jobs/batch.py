"""`eagleray batch`: runs the main job through a provider's batch API, in one command that waits or step by step."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engines.errors import ConfigError, EngineError, nearest
from engines.text import counted
from jobs.infer import begin, finish, guarded, start
from pipeline.config import Config, without_typed_secret
from pipeline.configuration.run_file import is_run_file
from pipeline.origin import Origin

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.executors.batch.session import BatchSession

STEPS = {
    "submit": "read the dataset, split it, upload and submit the batches; does not wait for answers",
    "status": "show the state of the batches of output.path",
    "fetch": "download finished batches and submit rows without an answer again; exit status 4 while batches remain",
    "cancel": "cancel the batches in progress; fetch downloads the answers that they have by then",
    "list": "show all batches of the account",
}


def main(argv: list[str]) -> int:
    """Runs one step, or all steps if none is named. Returns the exit status."""
    step, rest = (argv[0], argv[1:]) if argv and argv[0] in STEPS else ("", argv)
    if argv and not step and argv[0].isalpha():
        error = ConfigError(f"there is no step '{rest[0]}' of eagleray batch{nearest(rest[0], STEPS)}")
        return start([], help_text, lambda _: _fail(error))
    if rest and "=" not in rest[0] and not rest[0].startswith("-") and not is_run_file(rest[0]):
        rest = ["--again", *rest]

    def run(config: Config, origin: Origin) -> int:
        return _run(step, config, dataclasses.replace(origin, words=("batch", *map(without_typed_secret, argv))))

    return begin("batch", [*rest, "run.mode=batch"], help_text, run)


def _fail(error: ConfigError) -> int:
    raise error


def _run(step: str, config: Config, origin: Origin) -> int:
    if step in ("", "submit", "fetch"):
        return guarded(lambda console: _go(step, config, console, origin), origin.command(config.output.path))
    return guarded(lambda console: _look(step, config, console))


def _go(step: str, config: Config, console: Console, origin: Origin) -> int:
    from pipeline.executors.batch.store import BatchStore
    from pipeline.run import STOPPED
    from pipeline.storage.filesystem import resolve

    status = finish(config, console, step, origin)
    if step and status == STOPPED:
        _look("status", config, console)
        late = [batch for batch in BatchStore(*resolve(str(config.output.path))).open if batch.state != "submitted"]
        if step == "submit" and not late:
            return 0
        if late:
            text = counted(len(late), "batch is", "batches are")
            console.print(f"{text} not submitted yet: run the same command again to submit all.", highlight=False)
    return status


def _look(step: str, config: Config, console: Console) -> int:
    """Shows batches. The step `cancel` first cancels those under way."""
    from rich.markup import escape

    from pipeline.executors.batch.collector import BatchCollector
    from pipeline.executors.batch.session import BatchSession
    from pipeline.executors.batch.steps import BatchSteps
    from pipeline.output.ownership import NEW, Ownership
    from pipeline.run import STOPPED
    from pipeline.storage.filesystem import resolve
    from pipeline.storage.lock import run_lock

    config.check(runs=step != "list")
    fs, root = resolve(str(config.output.path or "."))
    # Raises where the directory is not Eagleray's. A new directory holds no batches, so nothing is locked there.
    state = NEW if step == "list" else Ownership.look(config, fs, root).state
    with contextlib.ExitStack() as stack:
        if step == "cancel" and state != NEW:  # a run that waits would go on with the batches
            stack.enter_context(run_lock(fs, root))
        session = stack.enter_context(contextlib.closing(BatchSession(config, fs, root)))
        steps = BatchSteps(session, BatchCollector(session))
        if step == "list":
            _show_account(session, console)
            return 0
        failed = False
        for batch in session.store.open:
            try:
                if step == "cancel":
                    steps.cancel(batch)
                if batch.state == "submitted":
                    batch.status = session.wire.status(str(batch.id))
            except EngineError as error:
                failed = True
                console.print(f"{batch.id or batch.name}: {escape(str(error))}", highlight=False)
        _show(session, console)
    return STOPPED if failed else 0


def _show(session: BatchSession, console: Console) -> None:
    from pipeline.executors.batch.session import done_of

    rows = []
    for batch in session.store.batches:
        state = batch.status.status if batch.status else batch.ended or batch.state
        done = batch.answered + batch.failed if batch.ended else done_of(batch.rows, batch.status)
        rows.append((batch.id or batch.name, str(state), f"{done:,}", f"{batch.rows:,}"))
    _table(console, ("batch", "state", "done", "of"), rows)
    waiting = sum(batch.rows for batch in session.store.open)
    console.print(
        f"{counted(waiting, 'row')} under way in {counted(len(session.store.open), 'batch', 'batches')}.", highlight=False
    )


def _show_account(session: BatchSession, console: Console) -> None:
    rows = []
    for batch in session.wire.list():
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(batch.created_at)) if batch.created_at else ""
        rows.append((batch.id, str(batch.status), f"{batch.done + batch.failed:,}", f"{batch.total:,}", created))
    _table(console, ("batch", "state", "done", "of", "created"), rows)


def _table(console: Console, titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in titles:  # users copy the id, so it must not be cut
        table.add_column(title, justify="right" if title in ("done", "of") else "left", no_wrap=title == "batch")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def help_text() -> str:
    """The help text: the steps. The keys are those of `eagleray infer`."""
    steps = "\n".join(f"  {name:<8}{what}" for name, what in STEPS.items())
    return f"""\
Run the main job through a provider's batch API: mostly for half the price, with answers within a day.

  eagleray batch [step] run.yaml [key=value …]
  eagleray batch [step] dataset.path=IN output.path=OUT engine=openai engine.model=… [key=value …]
  eagleray batch step OUT      the arguments of the last run into OUT

Steps (without a step, the command runs all of them and waits; you can kill it and start it again):
{steps}

Every step takes the same arguments; `eagleray infer --help` lists them and the exit statuses.
With run.batch_fallback=live, rows without an answer from a batch are sent as live requests with the same settings."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
