"""Shared by the jobs that read an output directory: open it, read its rows, print them safely, parse the arguments."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import orjson
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from rich.console import Console
from rich.text import Text
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from engines.errors import ConfigError, ErrorCode, nearest
from engines.text import flattened, one_line, visible
from jobs.env_file import load
from pipeline.configuration.layer import placed
from pipeline.configuration.saved import HIDDEN, hidden
from pipeline.dataset.arrow_rows import readable_rows
from pipeline.origin import typed_words
from pipeline.output.openai_bodies import body_values
from pipeline.storage.claim import STALE_S
from pipeline.storage.exact_json import finite, loads, plain
from pipeline.storage.filesystem import canonical_place, exists, listing, resolve
from pipeline.storage.ledger_index import read_index
from pipeline.storage.lock import held
from pipeline.storage.output_files import BATCHES, MANIFEST, MARKER, SEGMENTS, STATE
from pipeline.storage.retry import TRIES, steadily

# Bytes of one read. A part has one row group, and its texts may not fit into memory at once.
BUFFER = 4 << 20
StoredRow = dict[str, Any]
Place = tuple[int, int]  # the number of a part, and of a row in it


# -- the directory ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Output:
    """The state of an output directory at this moment."""

    path: str
    fs: pafs.FileSystem
    root: str
    manifest: dict[str, Any] | None  # None also if a later run has started
    run: dict[str, Any] | None  # `_run.json` of a run that did not complete
    live: bool  # a run is in progress

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the run without secrets; empty if it is not known."""
        return (self.manifest or self.run or {}).get("config", {})

    @property
    def hidden(self) -> list[str]:
        """The keys of the secrets that `config` lacks. Older versions did not write them: then each value with `***`."""
        found: list[str] | None = (self.manifest or self.run or {}).get("hidden_keys")
        return hidden(self.config) if found is None else found

    @property
    def style(self) -> str:
        return str(self.config.get("output", {}).get("style", "eagleray"))

    @property
    def entries(self) -> dict[str, Any]:
        """The manifest of a complete output, or else the state of the run."""
        return self.manifest or self.run or {}

    @property
    def references(self) -> dict[str, str]:
        """The references to environment variables in the places of secrets. Older versions did not write them."""
        return dict(self.entries.get("references", {}))

    @property
    def directory(self) -> str:
        """The directory in which the run was started; empty if it is this one, or is not known or not there."""
        directory = (self.entries.get("command") or {}).get("directory", "")
        return directory if directory not in ("", str(Path.cwd())) and Path(directory).is_dir() else ""

    def command(self, **changes: Any) -> str | None:
        """The command that continues the run with these changes of `run`. None if the configuration is not known."""
        if not self.config:
            return None
        changed = {f"run.{name}": value for name, value in changes.items() if self.config["run"].get(name) != value}
        values = {name: str(value).lower() if isinstance(value, bool) else f"{value:g}" for name, value in changed.items()}
        if (typed := self._typed()) is not None:
            words, directory = typed
            if self.config["run"].get("resume") is False:  # it would remove the results
                values = {"run.resume": "true", **values}
            words = [word for word in words if word.partition("=")[0] not in (*values, "output.overwrite")]
            text = shlex.join(["eagleray", *words, *(f"{k}={v}" for k, v in values.items())])
            return f"cd {shlex.quote(directory)} && {text}" if directory != str(Path.cwd()) else text
        values |= {name: HIDDEN for name in self.hidden if name not in self.references}
        return shlex.join(["eagleray", "infer", "--again", self.path, *(f"{k}={v}" for k, v in values.items())])

    def _typed(self) -> tuple[list[str], str] | None:
        """The words of the run's own command, if they still name this output, and the directory for them."""
        typed = typed_words(self.entries)
        if typed is None or self.config.get("dataset", {}).get("path") == "-":  # standard input is gone
            return None
        there = canonical_place(placed(str(self.config["output"]["path"]), typed[1]))
        return typed if there == canonical_place(self.path) else None


def open_output(path: str) -> Output:
    """Reads the state of a directory. Raises `ConfigError` if it is not an output directory of Eagleray."""
    out = find_output(path)
    if out is None:
        if exists(*resolve(path.removeprefix("output.path="))):
            text = f"{path} is not an output directory of Eagleray: it is empty"
            raise ConfigError(text, code=ErrorCode.OUTPUT_NOT_OURS)
        raise ConfigError(f"there is no directory {path}")
    return out


def find_output(path: str) -> Output | None:
    """As `open_output`. None if there is no directory, or an empty one."""
    path = path.removeprefix("output.path=")
    fs, root = resolve(path)
    names = {info.base_name for info in listing(fs, root)}
    if not names:
        return None
    if not names & {MARKER, MANIFEST, STATE, SEGMENTS, BATCHES}:
        text = f"{path} is not an output directory of Eagleray: it has neither {MANIFEST} nor {SEGMENTS}/"
        raise ConfigError(text, code=ErrorCode.OUTPUT_NOT_OURS)
    live = held(fs, root)
    run, manifest = _json(fs, f"{root}/{STATE}"), _json(fs, f"{root}/{MANIFEST}")
    if manifest is not None and not _shaped(manifest, _MANIFEST):
        raise ConfigError(f"{path}/{MANIFEST} was not written by Eagleray", code=ErrorCode.OUTPUT_NOT_OURS)
    if run is not None and not (_shaped(run, _RUN) and _shaped(run["config"], _CONFIG) and _samples(run["recent"])):
        text = f"{path}/{STATE} was not written by Eagleray; delete it: the ledger has the state of the run"
        raise ConfigError(text, code=ErrorCode.OUTPUT_NOT_OURS)
    if run is not None and manifest is not None and run["started_at"] < manifest["finished_at"] and not live:
        run = None  # killed after the manifest was written
    if run is not None and run["ended"] is None and run["host"] != socket.gethostname():
        live = live or time.time() - run["beat_at"] < STALE_S  # not every file system shows the locks of other hosts
    return Output(path, fs, root, None if run or live else manifest, run, live)


_NUMBER = (int, float)
_MANIFEST = {"rows": dict, "config": dict, "files": dict, "finished_at": _NUMBER}
_RUN = {
    "config": dict, "status": dict, "recent": list, "started_at": _NUMBER, "began_at": _NUMBER, "beat_at": _NUMBER,
    "pid": int, "host": str, "phase": str, "ended": (str, type(None)),
}  # fmt: skip
_CONFIG = {"engine": dict, "run": dict, "output": dict}


def _shaped(found: dict[str, Any], shape: dict[str, Any]) -> bool:
    """True if these keys have values of these types. A file of another program with the same name fails this test."""
    return all(name in found and isinstance(found[name], kind) for name, kind in shape.items())


def _samples(recent: list[Any]) -> bool:
    fine = (isinstance(one, list) and len(one) == 4 and all(isinstance(n, _NUMBER) for n in one) for one in recent)
    return bool(recent) and all(fine)


def _json(fs: pafs.FileSystem, path: str) -> dict[str, Any] | None:
    try:
        with fs.open_input_stream(path) as file:
            found = orjson.loads(file.read())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} cannot be read: it does not contain a JSON object")
    return found


# -- rows -------------------------------------------------------------------------------------------------------------


class StoredRows:
    """The finished rows of an output.

    A complete output has them in data/, in input order. Until then the ledger has them, without prompts and without
    their places in the input. Rows are read in batches, and only the columns that are needed.
    """

    def __init__(self, out: Output, failed: bool = False) -> None:
        """With `failed`, files without a failed row are left out."""
        self.fs, self.style, self.complete = out.fs, out.style, out.manifest is not None
        self.paths: list[str] = []
        self.sizes: list[int] = []
        self.best: list[frozenset[int]] = []  # for each segment, the rows that are the latest record of their key
        if out.manifest is not None:
            files = out.manifest["files"]
            for name in sorted(name for name in files if name.startswith("data/")):
                if not failed or name.replace("data/", "errors/") in files:
                    self.paths.append(f"{out.root}/{name}")
                    self.sizes.append(files[name])
            return
        index = read_index(out.fs, out.root)
        for number, path in enumerate(index.paths):
            mine = index.row[(index.segment == number) & (index.failed | (not failed))]
            if len(mine):
                self.paths.append(path)
                self.best.append(frozenset(mine.tolist()))

    def names(self) -> list[str]:
        """The names of the columns. All files of an output have the same ones."""
        if not self.paths:
            return []
        if self.paths[0].endswith(".jsonl"):
            return list(next((row for _, row in self._read(0, (), {0})), {}))
        with self.fs.open_input_file(self.paths[0]) as file:
            return list(pq.read_schema(file).names)

    def scan(self, *columns: str) -> Iterator[tuple[Place, StoredRow]]:
        """Every row with those of these columns that exist; with all columns if none is named."""
        for part in range(len(self.paths)):
            for at, row in steadily(partial(self._read, part, columns, self.best[part] if self.best else None)):
                yield (part, at), row

    def fetch(self, places: Iterable[Place]) -> Iterator[StoredRow]:
        """Complete rows, in the order of their places."""
        wanted: dict[int, set[int]] = {}
        for part, at in places:
            wanted.setdefault(part, set()).add(at)
        for part in sorted(wanted):
            for _, row in steadily(partial(self._read, part, (), wanted[part])):
                yield row

    def _read(self, part: int, columns: Sequence[str], wanted: Collection[int] | None) -> Iterator[tuple[int, StoredRow]]:
        last = max(wanted) if wanted else sys.maxsize
        with self.fs.open_input_file(self.paths[part]) as file:
            if self.paths[part].endswith(".jsonl"):
                for at, line in enumerate(io.BufferedReader(file, BUFFER)):  # Arrow's file cannot iterate over lines
                    if at > last:
                        return
                    if wanted is None or at in wanted:
                        yield at, self._row(self.paths[part], at, line)
                return
            parquet = pq.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False)
            names = [name for name in columns if name in parquet.schema_arrow.names] if columns else None
            at = 0
            for batch in parquet.iter_batches(4096 if names else 256, columns=names):
                mine = [i for i in range(len(batch)) if wanted is None or at + i in wanted]
                rows = readable_rows(batch.take(pa.array(mine, pa.int64())))
                yield from zip((at + i for i in mine), rows, strict=True)
                at += len(batch)
                if at > last:
                    return

    def _row(self, path: str, at: int, line: bytes) -> StoredRow:
        try:
            return in_our_format(loads(line), self.style)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ConfigError(
                f"{path}, line {at + 1}, was not written by Eagleray: run the command of this output again"
            ) from None


def in_our_format(row: StoredRow, style: str) -> StoredRow:
    """A line of an output style in our format, with the fields that the style keeps."""
    if style == "oumi":
        rest = row["metadata"].get("eagleray", {})
        return {"id": row["conversation_id"], "messages": row["messages"], **rest}
    if style != "openai_batch":
        return row
    body, error = row["response"]["body"], row["error"]
    found: StoredRow = {"id": row["custom_id"], "index": int(row["id"].rpartition("_")[2])}
    if error is not None:
        return {**found, "error": {"type": error["code"], "message": error["message"]}}
    usage = body["usage"]
    tokens = usage and {"input": usage["prompt_tokens"], "output": usage["completion_tokens"], "cached_input": 0}
    if values := body_values(body):
        return {**found, **values, "usage": tokens, "model": body["model"], "error": None}
    first = body["choices"][0]
    message = first["message"]
    text = message.get("content")
    return {**found, "response": text, "messages": [message], "finish_reason": first["finish_reason"],
            "tool_calls": message.get("tool_calls"), "usage": tokens, "model": body["model"], "error": None}  # fmt: skip


# Repeats work if a file is missing: a run merges files of the ledger into larger ones.
steady = Retrying(
    stop=stop_after_attempt(TRIES), wait=wait_fixed(0.2), retry=retry_if_exception_type(FileNotFoundError), reraise=True
)


# -- the terminal -----------------------------------------------------------------------------------------------------


class OutputConsole(Console):
    """A console whose `BrokenPipeError` reaches the caller. rich would end the program with status 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def brief(value: Any, length: int = 200) -> str:
    """A value on one line of at most `length` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=plain)
    text = flattened(text[: 4 * length])
    return text if len(text) <= length else text[: length - 1] + "…"


def print_json(value: Any, indent: int | None = 2) -> None:
    """Prints a value as JSON in ASCII, which is safe on a terminal as well."""
    print(json.dumps(finite(value), indent=indent, default=plain))


def say(console: Console, text: str, style: str = "") -> None:
    """Prints one line without markup and without wrapping."""
    console.print(Text(visible(text), style), soft_wrap=True)


def ago(seconds: float) -> str:
    """A time span with a unit that suits it."""
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {name}"
    return f"{max(0.0, seconds):,.0f} s"


# -- the command line -------------------------------------------------------------------------------------------------


class Arguments(argparse.ArgumentParser):
    """A parser of arguments whose errors are `ConfigError`, printed as one line."""

    def __init__(self, job: str, what: str, examples: str, outputs: Sequence[str] = ("OUT",)) -> None:
        examples = "examples:\n" + "\n".join(f"  eagleray {job} {line}" for line in examples.splitlines())
        super().__init__(
            f"eagleray {job}",
            description=what,
            epilog=examples,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name in outputs:
            self.add_argument(name, help="an output directory: a local path, s3://… or another URL")
        self.add_argument("--json", action="store_true", help="print JSON for programs")
        self.add_argument(
            "--env-file", metavar="FILE", help="set environment variables from a file, such as a store's keys"
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.replace('the following arguments are required:', 'missing:')} ({self.prog} --help)")

    def run(self, argv: list[str], work: Callable[[argparse.Namespace, Console], int]) -> int:
        """Runs the job and returns the exit status. Errors are one line; an unknown option gets the nearest name."""
        try:
            args, rest = self.parse_known_intermixed_args(argv)
            if rest:
                known = [name for action in self._actions for name in action.option_strings]
                word = rest[0].partition("=")[0]
                unknown = f"there is no option {word}{nearest(word, known)}"
                self.error(unknown if word.startswith("-") else f"unexpected argument {word}")
            if args.env_file is not None:
                load(args.env_file)
            return work(args, OutputConsole())
        except SystemExit as end:  # --help
            return int(end.code or 0)
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (ConfigError, OSError, pa.ArrowException) as error:
            print(f"eagleray: {visible(one_line(error))}", file=sys.stderr)
            return 2


def number(least: int) -> Callable[[str], int]:
    """The type of an option: a whole number of at least `least`."""

    def convert(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
        return int(text)

    return convert
