"""`eagleray tune`: measures settings of an engine on a sample of the rows, and writes the best into the run file."""

from __future__ import annotations

import difflib
import json
import os
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engines.errors import ConfigError, ErrorCode
from jobs.infer import begin_composed, guarded, keys_help
from pipeline.configuration.compose import Composed
from pipeline.configuration.run_file import RunFile, file_text

if TYPE_CHECKING:
    from rich.console import Console

    from engines.tuning import Option


def main(argv: list[str]) -> int:
    """Tunes an engine. Returns the exit status."""
    flags = {flag: flag in argv for flag in ("--write", "--json")}
    words = [word for word in argv if word not in flags]

    def run(composed: Composed, file: RunFile | None) -> int:
        return guarded(lambda console: Tuning(composed, file, flags["--write"], flags["--json"]).run(console))

    return begin_composed("tune", words, help_text, lambda composed, _, file: run(composed, file))


@dataclass(slots=True)
class Tuning:
    composed: Composed
    file: RunFile | None
    writes: bool
    as_json: bool

    def run(self, console: Console) -> int:
        """Measures, and prints the result to standard output. The progress goes to `console`, which is standard error."""
        from rich.console import Console as RichConsole

        from pipeline.tuning import report
        from pipeline.tuning.tune import tune

        config, engine = self.composed.config, self.composed.config.engine
        config.check(runs=False)
        if config.dataset.path in (None, "", []):
            raise ConfigError("dataset.path is missing: the measurements need rows of your dataset", key="dataset.path")
        if self.writes and self.file is None:
            raise ConfigError("--write needs a run file: eagleray tune run.yaml --write; --save run.yaml writes one first")
        before = file_text(self.file.path) if self.file else ""
        found, sample = tune(config, console)
        written = None
        if found.changes and self.file is not None:
            written = self.write(self.file.path, before, found.changes, report.comment(engine, found, sample), console)
        if self.as_json:
            print(json.dumps(report.as_json(engine, found, sample, written), indent=2))
            return 0
        out = RichConsole(highlight=False)
        out.print(report.table(engine, found), "")
        out.print(f"Result: {report.sentence(engine, found)}.", markup=False)
        if found.changes:
            out.print(f"Keys: {shlex.join(report.words(found.changes))}", markup=False, soft_wrap=True)
        return 0

    def write(self, path: str, before: str, changes: Option, comment: list[str], console: Console) -> str | None:
        """Writes the changes into the run file, or shows them. Returns the path of the file that was written.

        If its text cannot be changed safely, a new file beside it gets all keys: NAME.tuned.yaml.
        """
        from pipeline.configuration.edit import edited

        text = edited(path, before, changes, comment)
        if text is None:
            return self._write_beside(path, changes, comment, console)
        if not self.writes:
            lines = difflib.unified_diff(before.splitlines(), text.splitlines(), path, path, lineterm="")
            console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
            console.print(f"--write writes these lines into {path}.", markup=False, highlight=False)
            return None
        if file_text(path) != before:
            raise ConfigError(
                f"{path} was changed during the measurements and is not written: {' '.join(map(str, changes))}",
                code=ErrorCode.RUN_FILE,
            )
        _replace(Path(path).expanduser().resolve(), text)
        console.print(f"{path} is written.", markup=False, highlight=False)
        return path

    def _write_beside(self, path: str, changes: Option, comment: list[str], console: Console) -> str | None:
        from jobs.write_run_file import run_file_text, typed_values, write_run_file

        beside = str(Path(path).with_suffix(f".tuned{Path(path).suffix}"))
        if not self.writes:
            console.print(f"--write writes these keys into a new file, {beside}.", markup=False, highlight=False)
            return None
        values = typed_values(self.composed, beside)
        for name, value in changes.items():
            *parts, last = name.split(".")
            inside = values
            for part in parts:
                inside = inside.setdefault(part, {})
            inside[last] = value
        write_run_file(beside, run_file_text(values, self.composed.options, comment))
        console.print(f"{beside} is written; {path} stays as it is.", markup=False, highlight=False)
        return beside


def _replace(path: Path, text: str) -> None:
    """Replaces the text of a file at once, with its permissions. A byte order mark stays."""
    start = b"\xef\xbb\xbf" if path.read_bytes().startswith(b"\xef\xbb\xbf") else b""
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(start + text.encode())
        shutil.copymode(path, draft)
        Path(draft).replace(path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def help_text() -> str:
    """The help text: the keys that are of use."""
    lines = [
        "Measure a few settings of an engine on a random sample of your rows, on this machine and without Ray, and find",
        "the fastest ones. Nothing is written into output.path.",
        "",
        "  eagleray tune run.yaml [--write] [--json] [key=value …]",
        "",
        "Each measurement loads the engine in a process of its own. The best settings are measured against the",
        "configuration in turns, and count only if they gain more than the noise. --write writes them into the run file,",
        "with the table as a comment. --json prints the result for programs. Requests that cost money need run.budget_usd.",
        "",
        *keys_help(("tune", "engine", "dataset", "generation"), ("task", "run.budget_usd")),
        "",
        "Exit status: 0 measured; 2 wrong configuration; 4 the configuration itself cannot be measured; 130 interrupted.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
