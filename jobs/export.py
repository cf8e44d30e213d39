"""`eagleray export`: writes the finished rows of an output, complete or not, into one CSV, JSON lines or Parquet file."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from rich.console import Console

from engines.errors import ConfigError, ErrorCode
from engines.text import counted
from jobs.export_files import FORMATS
from jobs.infer import saved_config
from jobs.reading import Arguments, Output, OutputConsole, open_output, print_json, say
from pipeline.configuration.compose import compose
from pipeline.configuration.saved import HIDDEN_KEYS
from pipeline.dataset.stdin import STDIN, kept_input
from pipeline.output.export import LedgerExport, PartsExport
from pipeline.storage.filesystem import canonical_place, exists, is_within, resolve, whole_file

STDOUT = "-"
_OVERRIDE = re.compile(r"[+~]*[a-z_]+(\.[\w-]+)+=")
# Keys that shape answers. If one of them has a secret, it must be given again: without it, no answer would be found.
_SHAPING = ("engine.extra_body", "engine.kwargs", "engine.base_url", "engine.provider")


def main(argv: list[str]) -> int:
    """Writes the file. Returns the exit status."""
    what = (
        "Write the finished rows of an output into one file, in the order of the input. If the run is in progress or\n"
        "stopped, the rows come from its ledger and its input. Rows without a result are left out.\n"
        "key=value changes the saved configuration: for example dataset.path, if the input was moved."
    )
    examples = (
        "out\nout results.csv\nout s3://bucket/results.parquet --done\nout - --format jsonl\nout dataset.path=moved.jsonl"
    )
    overrides = [word for word in argv if _OVERRIDE.match(word) and not word.startswith("output.path=")]
    parser = Arguments("export", what, examples)
    name = "the file to write, or - for standard output (default: the name of OUT with the format, in this directory)"
    parser.add_argument("FILE", nargs="?", help=name)
    parser.add_argument("--format", choices=FORMATS, help="the format (default: by the name of FILE, or csv)")
    parser.add_argument("--done", action="store_true", help="leave out failed rows")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    return parser.run([word for word in argv if word not in overrides], lambda args, _: _run(args, overrides))


def _run(args: argparse.Namespace, overrides: list[str]) -> int:
    out = open_output(args.OUT)
    file = args.FILE or f"{Path(canonical_place(out.path)).name}.{args.format or 'csv'}"
    _check(file, out, args)
    form = args.format or next((name for name in FORMATS if file.endswith(f".{name}")), None)
    if form is None:
        known = ", ".join(f".{name}" for name in FORMATS)
        raise ConfigError(f"--format is missing: the name of {file} ends with none of {known}")
    rows = _rows_of(out, overrides, Console(stderr=True), with_failed=not args.done)
    try:
        with _opened(file, args.overwrite) as stream, contextlib.closing(FORMATS[form](stream, rows.schema)) as target:
            for some in rows.rows():
                target.add(some)
    except FileExistsError:  # another program wrote it meanwhile
        raise _exists(file) from None
    _report(file, form, out, rows, args)
    return 0


def _report(file: str, form: str, out: Output, rows: LedgerExport | PartsExport, args: argparse.Namespace) -> None:
    count = rows.count
    if args.json:
        counts = {"total": count.total, "done": count.done, "failed": count.failed, "open": count.open}
        complete = out.manifest is not None
        print_json({"output": out.path, "file": file, "format": form, "complete": complete, "rows": counts})
        return
    console = OutputConsole(stderr=file == STDOUT)
    name, left = "standard output" if file == STDOUT else file, ", left out" if args.done and count.failed else ""
    say(console, f"{name}: {count.done:,} of {counted(count.total, 'row')} done, {count.failed:,} failed{left}.", "bold")
    if count.open:
        say(console, f"{counted(count.open, 'row has', 'rows have')} no result yet: the file lacks them.")
    if isinstance(rows, LedgerExport) and len(rows.index) and not count.done:
        text = "No answer in the ledger belongs to a row of this input. Did the input, or a file of the model, change?"
        say(console, text, "yellow")


def _check(file: str, out: Output, args: argparse.Namespace) -> None:
    """Raises `ConfigError` if the file must not be written."""
    if file == STDOUT:
        if args.json:
            raise ConfigError("--json and the rows cannot both go to standard output: name a file")
        if sys.stdout.isatty():
            raise ConfigError("rows are not written to a terminal, because a model's texts may control it: name a file")
        return
    place = canonical_place(file)
    if is_within(place, canonical_place(out.path)):
        raise ConfigError(f"{file} is inside the output, where only Eagleray's own files belong: name another place")
    fs, path = resolve(file)
    if not args.overwrite and exists(fs, path):
        raise _exists(file)


def _exists(file: str) -> ConfigError:
    return ConfigError(f"{file} exists: name another file, or add --overwrite to replace it")


def _rows_of(out: Output, overrides: list[str], console: Console, *, with_failed: bool) -> LedgerExport | PartsExport:
    files = out.manifest["files"] if out.manifest is not None else {}
    if out.manifest is not None and files and not overrides and all(name.endswith(".parquet") for name in files):
        return PartsExport(out.fs, out.root, out.manifest, with_failed)
    if not out.config:
        text = f"{out.path} has no saved configuration, which names the input: run its command again, and then export"
        raise ConfigError(text, code=ErrorCode.NO_SAVED_CONFIGURATION)
    saved = saved_config(out.path)
    saved[HIDDEN_KEYS] = [name for name in saved[HIDDEN_KEYS] if name.startswith(_SHAPING)]
    config = compose(overrides, saved=saved)
    piped = kept_input(out.fs, out.root, out.path) if config.dataset.path == STDIN else None
    if config.dataset.path == STDIN and piped is None:
        raise ConfigError(f"the copy of standard input in {out.path} is missing", key="dataset.path")
    return LedgerExport(config, out.fs, out.root, console, piped, with_failed)


def _opened(file: str, overwrite: bool) -> AbstractContextManager[BinaryIO]:
    return contextlib.nullcontext(sys.stdout.buffer) if file == STDOUT else whole_file(file, overwrite=overwrite)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
