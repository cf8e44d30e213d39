"""Writes a run file with comments: for `--save`, `eagleray init` and `eagleray from-oumi`."""

from __future__ import annotations

import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.errors import ConfigError, ErrorCode
from engines.text import visible
from pipeline.config import known_keys, literal_secrets
from pipeline.configuration.compose import Composed
from pipeline.configuration.layer import Move, folder_of, moved, value_of
from pipeline.configuration.run_file import RunFile
from pipeline.configuration.yaml_text import dumped

ORDER = ("dataset", "engine", "generation", "output", "run", "hardware", "serve", "tune")
_OPTION = {"engine": "eagleray engines lists all engines", "hardware": "docs/configuration.md lists all profiles"}
WIDTH, AT = 110, 34  # of a line, and the column of the comments


def save_command(path: str, composed: Composed, job: str) -> int:
    """Writes the keys of a command into a new run file, and does not run it. Returns the exit status."""
    values = typed_values(composed, path)
    if secrets := literal_secrets(values):
        text = (
            f"--save: {secrets[0]} is a secret, and a run file must not contain secrets: type ${{oc.env:NAME}} in its place"
        )
        raise ConfigError(text, code=ErrorCode.SECRET_IN_FILE, key=secrets[0])
    command = shlex.join(["eagleray", job or "infer", path])
    write_run_file(path, run_file_text(values, composed.options, [f"Run it: {command}"]))
    print(f"{path} is written; nothing was run. To run it: {command}", file=sys.stderr)
    return 0


def typed_values(composed: Composed, path: str) -> dict[str, Any]:
    """The keys of a command and of its run file, with paths relative to the new run file `path`."""
    values: dict[str, Any] = {}
    target, base = folder_of(path), composed.layer.base
    for name in dict.fromkeys([*composed.layer.names(), *composed.typed]):
        at, parts = value_of(composed.raw, name), name.split(".")
        if len(parts) == 2:  # not the keys in open sections
            from_file = name not in composed.typed
            at = moved(name, at, Move(base if from_file else "", target)) if not str(at).startswith("${") else at
        inside: Any = values
        for part in parts[:-1]:
            inside = inside.setdefault(part, {})
        inside[parts[-1]] = at
    return values


def run_file_text(
    values: Mapping[str, Any],
    options: Mapping[str, str],
    header: Sequence[str],
    suggested: Mapping[str, tuple[Any, str]] | None = None,
    notes: Iterable[str] = (),
) -> str:
    """The text of a run file. `suggested`: key -> an example and a comment, written as a comment. `notes` come last."""
    helps = {name: str(item.metadata.get("help", "")) for name, item in known_keys().items()}
    lines = [f"# {on_one_line(line)}".rstrip() for line in header]
    for name in values.keys() - {*ORDER}:  # keys without a section
        lines += ["", *(line.removeprefix("  ") for line in _entry(name, values[name], helps.get(name, "")))]
    for section in ORDER:
        given, option = values.get(section, {}), options.get(section)
        more = {name: item for name, item in (suggested or {}).items() if name.startswith(f"{section}.")}
        if not given and option is None and not more:
            continue
        lines.append("")
        if not given and not more:
            lines.append(f"{section}: {option}")
            continue
        lines.append(f"{section}:")
        if option is not None:
            lines += _entry("name", option, _OPTION.get(section, ""))
        for key, value in given.items():
            lines += _entry(key, value, helps.get(f"{section}.{key}", ""))
        for name, (example, comment) in more.items():
            key = name.partition(".")[2]
            if key not in given:
                lines += [f"  # {line.removeprefix('  ')}" for line in _entry(key, example, comment)]
    notes = list(notes)
    wrapped = (line for note in notes for line in textwrap.wrap(on_one_line(note), WIDTH - 2))
    lines += ["", *(f"# {line}" for line in wrapped)] if notes else []
    return "\n".join(lines).lstrip("\n") + "\n"


def _entry(key: str, value: Any, comment: str) -> list[str]:
    """The lines of a key, with its comment at the end of its only line, or else above it."""
    lines = [f"  {line}" for line in dumped(key, value).splitlines()]
    if not comment:
        return lines
    if len(lines) == 1 and len(f"{lines[0]:<{AT}}  # {comment}") <= WIDTH:
        return [f"{lines[0]:<{AT}}  # {comment}"]
    return [*(f"  # {line}" for line in textwrap.wrap(comment, WIDTH - 4)), *lines]


def on_one_line(text: str) -> str:
    """A text that may come from data, such as the names of columns, as one line of a comment: a line break would end the
    comment. Spaces stay, because they align tables."""
    return visible(" ".join(text.splitlines()))


def next_steps(path: str) -> list[str]:
    """The commands that check and run a new run file, with the words before them."""
    check, run = (shlex.join(["eagleray", job, path]) for job in ("plan", "infer"))
    return [f"To check it: {check}", f"To run it:   {run}"]


def write_run_file(path: str, text: str) -> None:
    """Writes a new run file. Raises `ConfigError`, and writes nothing, if it could not be read again, or if it exists."""
    try:
        RunFile.of(path, text)
    except ConfigError as error:
        raise ConfigError(f"{path} is not written: {error}", code=error.given_code, key=error.key) from None
    write_new(path, text)


def write_new(path: str, text: str) -> None:
    """Writes a file that does not exist yet. Raises `ConfigError` if it exists or cannot be written."""
    try:
        with Path(path).expanduser().open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        text = f"{path} exists and is not overwritten: choose another name, or delete it first"
        raise ConfigError(text, code=ErrorCode.FILE_EXISTS) from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", code=ErrorCode.FILE_EXISTS) from None
