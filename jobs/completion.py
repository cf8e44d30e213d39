"""`eagleray completion`: prints the script that makes a shell complete commands, flags, engines, keys and options.

The script calls `eagleray completion --complete SHELL …` at each press of the tab key, so that new engines and keys need no
new script. Nothing heavy is imported for that.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from jobs.cli import JOBS

SHELLS = ("bash", "zsh", "fish")
# Instead of candidates: the shell completes the names of files, or of directories.
FILES, DIRECTORIES = ":files", ":directories"
Candidate = tuple[str, str]  # a word, and its description

# The flags of the jobs that take a configuration; each with the kind of its value, or None.
_CONFIGURED = {
    "--help": None, "--again": DIRECTORIES, "--cfg": "job", "--config-dir": DIRECTORIES, "--env-file": FILES, "-c": FILES,
    "--save": FILES,
}  # fmt: skip
_JSON = {"--help": None, "--json": None, "--env-file": FILES}
FLAGS: dict[str, dict[str, str | None]] = {
    "infer": _CONFIGURED,
    "batch": _CONFIGURED,
    "init": {"--help": None},
    "rerun": {"--help": None},
    "from-oumi": {"--help": None},
    "serve": _CONFIGURED,
    "chat": _CONFIGURED,
    "plan": _CONFIGURED,
    "tune": {**_CONFIGURED, "--write": None, "--json": None},
    "engines": {**_JSON, "--config-dir": DIRECTORIES},
    "models": {**_JSON, "--config-dir": DIRECTORIES},
    "status": {**_JSON, "--watch": None},
    "wait": {**_JSON, "--timeout": ""},
    "show": {**_JSON, "--id": "", "--row": "", "--index": "", "--failed": None, "--limit": ""},
    "errors": {**_JSON, "--limit": ""},
    "export": {**_JSON, "--format": "csv jsonl parquet", "--done": None, "--overwrite": None},
    "cost": {**_JSON, "--by": "run lane engine model day"},
    "diff": {**_JSON, "--id": "", "--column": "", "--limit": ""},
    "completion": {"--help": None},
}
# Job -> the sections whose keys it takes.
_GROUPS = ("engine", "hardware", "dataset", "generation", "output", "run")
# Keys without a section -> their description.
_PLAIN = {"task": "what each row asks: chat, embed, classify, …"}
SECTIONS = {
    "infer": _GROUPS,
    "batch": _GROUPS,
    "plan": _GROUPS,
    "tune": ("tune", *_GROUPS),
    "init": _GROUPS,
    "serve": ("engine", "hardware", "generation", "serve", "run"),
    "chat": ("engine", "generation"),
    "models": ("engine",),
}
STEPS = ("submit", "status", "fetch", "list", "cancel")  # of `eagleray batch`
# Keys whose values are paths.
_PATHS = ("dataset.path", "output.path", "engine.model", "engine.adapter", "generation.response_format")


def main(argv: list[str]) -> int:
    """Prints a script, or candidates for one. Returns the exit status."""
    if argv[:1] == ["--complete"]:
        _print_candidates(*argv[1:])
        return 0
    if "-h" in argv or "--help" in argv:
        print(HELP)
        return 0
    if len(argv) != 1 or argv[0] not in SHELLS:
        from engines.errors import no_such

        what = no_such("shell", argv[0], SHELLS) if argv else f"missing: the shell, one of {', '.join(SHELLS)}"
        print(f"eagleray: {what} (eagleray completion --help)", file=sys.stderr)
        return 2
    print((Path(__file__).parent / f"completion.{argv[0]}").read_text(encoding="utf-8"), end="")
    return 0


HELP = """\
Print the script that lets a shell complete the words of `eagleray` when you press the tab key: commands, flags, engines,
options of groups, configuration keys, and directories.

  eagleray completion bash|zsh|fish

For the shell that runs now:
  bash:  eval "$(eagleray completion bash)"
  zsh:   eval "$(eagleray completion zsh)"        (after compinit)
  fish:  eagleray completion fish | source

For all shells to come:
  bash:  eagleray completion bash > ~/.local/share/bash-completion/completions/eagleray    (with bash-completion)
  zsh:   eagleray completion zsh > DIR/_eagleray                                           (a DIR of $fpath)
  fish:  eagleray completion fish > ~/.config/fish/completions/eagleray.fish"""


def _print_candidates(shell: str, *rest: str) -> None:
    """bash gives the characters that separate words, and the line up to the cursor; the others the words up to it."""
    if shell == "bash":
        breaks, line = rest
        try:
            words = shlex.split(line)
        except ValueError:  # inside quotes: bash completes names of files
            return
        if line[-1:].isspace():
            words.append("")
    else:
        breaks, words = "", ["eagleray", *rest]
    *before, current = words[1:] or [""]
    found = candidates(before, current)
    if isinstance(found, str):
        print(found)
        return
    cut = max((current.rfind(mark) for mark in breaks if mark in "=:"), default=-1) + 1  # bash replaces the rest only
    for word, about in found:
        if word.startswith(current):
            end = " " if shell == "bash" and word[-1] not in "=./" else ""
            print(f"{word[cut:]}{end}" if shell == "bash" else f"{word}\t{' '.join(about.split())}")


def candidates(words: Sequence[str], current: str) -> str | Iterable[Candidate]:
    """The words that may replace `current` after `words`: candidates, or FILES or DIRECTORIES."""
    if not words:
        return [*JOBS.items(), ("--help", "show the commands"), ("--version", "show the version")]
    job, *given = words
    flags = FLAGS.get(job, {"--help": None})
    kind = flags.get(given[-1]) if given else None
    flag, equals, _ = current.partition("=")
    if flag.startswith("--") and equals:
        kind, flag = flags.get(flag), f"{flag}="
    else:
        flag = ""
    if kind is not None:
        return kind if kind.startswith(":") else [(flag + value, "") for value in kind.split()]
    if current.startswith("-"):
        return [(name, "") for name in flags if name not in given]
    if job == "completion":
        return [(shell, "") for shell in SHELLS] if not given else []
    if job in SECTIONS:
        return _words_of_configuration(job, given, current)
    if job == "from-oumi":
        return FILES
    return DIRECTORIES if job != "engines" else []


def _words_of_configuration(job: str, given: Sequence[str], current: str) -> str | list[Candidate]:
    name, equals, _ = current.partition("=")
    config_dir = next((after for word, after in pairwise(given) if word == "--config-dir"), None)
    if equals:
        return _values(name, config_dir)
    found: list[Candidate] = []
    if not any(word for word in given if not word.startswith("-")):
        if job == "models":
            found += _options("engine", config_dir).items()
        if job == "batch":
            found += [(step, "a step") for step in STEPS]
    if job != "models":
        found += _run_files(current)
    return [*found, *_keys(SECTIONS[job], given, current)]


def _run_files(current: str) -> Iterator[Candidate]:
    """YAML files and, if a slash is typed, directories. Names that a shell would have to quote are left out."""
    folder, slash, _ = current.rpartition("/")
    place = Path(folder + slash).expanduser()
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        if re.fullmatch(r"[\w.-]+", path.name) and (path.suffix in (".yaml", ".yml") or (slash and path.is_dir())):
            yield f"{folder}{slash}{path.name}{'/' if path.is_dir() else ''}", "a run file" if path.is_file() else ""


def _keys(sections: Sequence[str], given: Sequence[str], current: str) -> Iterator[Candidate]:
    """Groups and sections; the keys of a section if its name is typed."""
    section, dot, _ = current.partition(".")
    if not dot:
        for name in sections:
            if len(_options(name)) > 1:
                yield f"{name}=", f"an option of {name}"
            yield f"{name}.", f"a key of {name}"
        if "dataset" in sections:
            yield from ((f"{name}=", about) for name, about in _PLAIN.items())
        return
    from pipeline.config import known_keys

    used = {word.lstrip("+~").partition("=")[0] for word in given}
    for name, item in known_keys().items():
        if section in sections and name.startswith(f"{section}.") and name not in ("engine.kind", *used):
            yield f"{name}=", item.metadata["help"]
    if section == "engine" and "engine" in sections:
        yield from ((f"engine.price.{rate}=", "US$ per million tokens") for rate in ("input", "cached_input", "output"))


def _values(name: str, config_dir: str | None) -> str | list[Candidate]:
    """The values of a key or a group."""
    if name in _PATHS:
        return FILES
    if name in _GROUPS:
        return [(f"{name}={option}", about) for option, about in _options(name, config_dir).items()]
    from engines.validation import OneOf
    from pipeline.config import known_keys

    item = known_keys().get(name)
    if item is None:
        return []
    check = item.metadata.get("check")
    values = check.known if isinstance(check, OneOf) else ("true", "false") if item.type == "bool" else ()
    return [(f"{name}={value}", "") for value in values]


def _options(group: str, config_dir: str | None = None) -> dict[str, str]:
    """The options of a group, including the user's own, each with the comment at the top of its file."""
    from pipeline.configuration.options import conf_dir

    folders = [conf_dir(), *([Path(config_dir).expanduser()] if config_dir else [])]
    paths = sorted((path.stem, path) for folder in folders for path in (folder / group).glob("*.yaml"))
    return {name: _comment(path) for name, path in paths}


def _comment(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        line = file.readline()
    return line[1:].partition("https://")[0].strip() if line.startswith("#") else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
