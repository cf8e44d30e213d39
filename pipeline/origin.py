"""The origin of a run: the command and the run file that started it. The manifest keeps them, without secrets."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import STDOUT, cleaned, without_typed_secret

# A typed command up to this length is shown again as it was typed. `eagleray infer --again OUT` replaces a longer one.
SHORT = 120


@dataclass(frozen=True, slots=True)
class Origin:
    """A run that a program started has no words."""

    words: tuple[str, ...] = ()  # of the command, after `eagleray`; secrets are replaced by `***`
    varies: bool = False  # the same words may name another dataset or output later
    references: Mapping[str, str] = field(default_factory=dict)  # key of a secret -> its reference to a variable
    run_file: Mapping[str, Any] | None = None  # its path and content, without comments

    @classmethod
    def of(
        cls, job: str, argv: Sequence[str], varies: bool, references: Mapping[str, str], run_file: tuple[str, Any] | None
    ) -> Origin:
        """`run_file` is the path of the file and its content."""
        kept = None
        if run_file is not None:
            kept = {"path": os.path.abspath(run_file[0]), "content": cleaned(run_file[1])}
        return cls((job, *map(without_typed_secret, argv)), varies, references, kept)

    def entries(self) -> dict[str, Any]:
        """The entries of `manifest.json` and `_run.json`."""
        command = {"words": list(self.words), "directory": str(Path.cwd()), "varies": self.varies}
        entries = {"command": command, "references": dict(self.references)} if self.words else {}
        return entries | ({"run_file": dict(self.run_file)} if self.run_file is not None else {})

    def command(self, output: str | None) -> str:
        """The command that continues this run in this directory; empty for the run of a program."""
        if self.varies and output and output != STDOUT:
            return shlex.join(["eagleray", "infer", "--again", output])
        return shlex.join(["eagleray", *self.words]) if self.words else ""


def typed_words(entries: Mapping[str, Any]) -> tuple[list[str], str] | None:
    """The words of the command in a manifest that can be typed again, and the directory for it. None: there is none."""
    command = entries.get("command")
    if not isinstance(command, Mapping) or command["varies"] or "--again" in command["words"]:
        return None
    words, directory = list(command["words"]), str(command["directory"])
    if words[:2] == ["batch", "submit"]:
        words[1] = "fetch"
    is_short = len(shlex.join(words)) <= SHORT and Path(directory).is_dir()
    return (words, directory) if is_short else None
