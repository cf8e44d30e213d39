"""The documentation as the tests see it: pages, fenced blocks, commands, anchors."""

from __future__ import annotations

import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pipeline.configuration.run_file import is_run_file

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# These take a configuration; the others take the path of an output.
CONFIGURED = ("infer", "plan", "tune", "batch", "serve", "chat")
STEPS = ("submit", "status", "fetch", "cancel", "list")


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:  # as a test's name
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A line that a reader may type."""

    page: str
    text: str
    language: str = ""

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    @property
    def job(self) -> str:
        words = self.words
        return (
            words[words.index("eagleray") + 1]
            if "eagleray" in words
            else words[words.index("-m") + 1].removeprefix("jobs.")
        )

    @property
    def overrides(self) -> list[str]:
        """Its keys, without a step of `eagleray batch`, a run file, and flags."""
        words = self.words
        words = words[words.index("eagleray") + 2 :] if "eagleray" in words else words[words.index("-m") + 2 :]
        if self.job == "batch" and words[0] in STEPS:
            words = words[1:]
        for flag in ("--config-dir", "--env-file", "--again", "--save", "-c"):
            if flag in words:
                at = words.index(flag)
                words = words[:at] + words[at + 2 :]
        return [word for word in words if not is_run_file(word) and word not in ("--write", "--json")]

    @property
    def run_file(self) -> str | None:
        words = self.words
        words = words[words.index("eagleray") :] if "eagleray" in words else words[words.index("-m") :]
        return next((word for word in words if is_run_file(word) and "--save" not in words), None)

    @property
    def runs(self) -> bool:
        """Whether all that it needs is here, and no other test runs it (test_howto.py runs ```sh)."""
        return "docs/examples" in self.text and self.language != "sh" and not re.search(r" engine=openai\b", self.text)


def blocks(page: Path) -> list[Block]:
    found, lines = [], page.read_text(encoding="utf-8").splitlines()
    start, language = None, ""
    for at, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start, language = at, line[3:].strip()
        else:
            found.append(Block(page.name, start + 1, language, "\n".join(lines[start + 1 : at]) + "\n"))
            start = None
    assert start is None, f"{page}: a fence is never closed"
    return found


def commands(page: Path) -> list[Command]:
    found = []
    for block in blocks(page):
        if block.language in ("", "bash", "console", "sh"):
            text = block.text.replace("\\\n", " ")
            # What cron wants around a command, and in it.
            text = re.sub(
                r"^(?:\S+ +){5}cd \S+ && \S*/(eagleray [^>\n]*).*", lambda m: m[1].replace("\\%", "%"), text, flags=re.M
            )
            found += [Command(page.name, line, block.language) for line in text.splitlines()
                      if re.match(r"(\w+=\S+ )*(eagleray [a-z]|ray job submit )", line)]  # fmt: skip
    return found


def anchors(page: Path) -> set[str]:
    """What a link into a page may name: its headings as GitHub makes anchors of them, and `<a id>`."""
    text = page.read_text(encoding="utf-8")
    found = set(re.findall(r'<a id="([^"]+)"', text))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found


def leads_somewhere(place: str) -> bool:
    """True if `docs/page.md#anchor` exists."""
    path, _, name = place.partition("#")
    return name in anchors((ROOT / path).resolve())


def links(page: Path) -> list[str]:
    """The relative links of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "", text)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


def generator() -> ModuleType:
    """docs/generate.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
