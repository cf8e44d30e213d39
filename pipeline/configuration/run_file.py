"""A run file: the keys of a run in one YAML file, nested or dotted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.errors import ConfigError, ErrorCode, nearest
from pipeline.config import literal_secrets
from pipeline.configuration.errors import GROUPS, SECTIONS, check_key
from pipeline.configuration.layer import Layer, folder_of
from pipeline.configuration.options import options
from pipeline.configuration.yaml_text import MAP, SEQUENCE, Node, YamlError, YamlText, line_of

MAX_BYTES = 4 << 20
SUFFIXES = (".yaml", ".yml")


# The keys of errors that do not name their key, because their code has a section of the docs.
_KEYS = {
    ErrorCode.INPUT_FILES: "dataset.path",
    ErrorCode.NO_ROW: "dataset.path",
    ErrorCode.OTHER_DATASET: "output.path",
    ErrorCode.INPUT_IN_OUTPUT: "output.path",
    ErrorCode.FILE_IN_THE_WAY: "output.path",
}


class RunFileError(ConfigError):
    """A wrong configuration, with the file and line of the wrong key."""


@dataclass(slots=True)
class RunFile:
    """The content of a run file. Make it with `read`."""

    path: str  # as it was typed
    values: dict[str, Any] = field(default_factory=dict)  # section -> key -> value, or key -> value; with interpolations
    options: dict[str, str] = field(default_factory=dict)  # group -> option
    lines: dict[str, int] = field(default_factory=dict)  # dotted key -> line

    @classmethod
    def read(cls, path: str) -> RunFile:
        """Reads and checks a run file. Raises `RunFileError`, or `ConfigError` if there is no such file."""
        return cls.of(path, file_text(path))

    @classmethod
    def of(cls, path: str, text: str) -> RunFile:
        """As `read`, for the text of the file."""
        found = cls(path)
        try:
            found._parse(YamlText(text))
        except YamlError as error:
            raise found.error(error.line, str(error)) from None
        if secrets := literal_secrets(found.values):
            raise found.error(
                found.line_of(secrets[0]) or 1,
                f"{secrets[0]} is a secret, and a run file must not contain secrets: write ${{oc.env:NAME}} in its place, "
                "and set the environment variable NAME",
                code=ErrorCode.SECRET_IN_FILE,
            )
        return found

    @property
    def layer(self) -> Layer:
        return Layer(self.values, self.options, folder_of(self.path))

    @property
    def content(self) -> dict[str, Any]:
        """The content as one mapping, without comments. It has no secrets."""
        sections = {name: dict(value) if isinstance(value, dict) else value for name, value in self.values.items()}
        for group, option in self.options.items():
            sections[group] = {"name": option, **sections.get(group, {})}
        return sections

    def error(self, line: int, text: str, *, code: ErrorCode = ErrorCode.RUN_FILE, key: str | None = None) -> RunFileError:
        return RunFileError(f"{self.path}:{line}: {text}", code=code, key=key)

    def line_of(self, key: str | None) -> int | None:
        """The line of a key; of the key above it, or of the first key below it, if the file does not have it."""
        if key is not None and key.startswith("engine="):  # an engine's keywords
            key = "engine.kwargs" if any(name.startswith("engine.kwargs") for name in self.lines) else "engine"
        above = key
        while above:
            if above in self.lines:
                return self.lines[above]
            above = above.rpartition(".")[0] if above.count(".") > 1 or "[" in above else ""
        return next((line for name, line in self.lines.items() if key and name.startswith(f"{key}.")), None)

    @contextmanager
    def located(self, typed: Sequence[str]) -> Iterator[None]:
        """Adds file and line to a `ConfigError` about a key that comes from this file. `typed` replaced its keys."""
        try:
            yield
        except RunFileError:
            raise
        except ConfigError as error:
            key = error.key or next((key for code, key in _KEYS.items() if error.code == code), None)
            names = [word.lstrip("+~").partition("=")[0] for word in typed]
            line = self.line_of(key)
            if line is None or any(key == name or str(key).startswith((f"{name}.", f"{name}[")) for name in names):
                raise
            raise RunFileError(f"{self.path}:{line}: {error}", code=error.given_code, key=error.key) from None

    # -- reading ------------------------------------------------------------------------------------------------------

    def _parse(self, text: YamlText) -> None:
        root = text.root
        if root is None:
            raise ConfigError(f"{self.path} is empty: eagleray init writes a run file", code=ErrorCode.RUN_FILE)
        if root.tag != MAP:
            how = (
                "write key: value, not key=value"
                if "=" in str(root.value)
                else "write keys with values, as in engine: openai"
            )
            raise self.error(line_of(root), f"this is not a run file: {how}")
        for name, line, node in text.items(root):
            if name in ("defaults", "hydra"):
                raise self.error(line, f"a run file has no '{name}'; engine: openai chooses an option", key="engine")
            self._set(text, "", str(name) if name is not None else None, line, node)

    def _set(self, text: YamlText, above: str, name: str | None, line: int, node: Node) -> None:
        """Reads one key, or a section with its keys."""
        if name is None or not name:
            raise self.error(line, "this is not a key: put a template in quotes, as in template: '{{ question }}'")
        key = f"{above}.{name}" if above else name
        section, _, rest = key.partition(".")
        if not rest and section in SECTIONS:
            return self._section(text, section, line, node)
        if rest == "name" and section in GROUPS:
            return self._option(section, text.value(node), line)
        try:
            check_key(key)
        except ConfigError as error:
            raise self.error(line, str(error), code=ErrorCode.CONFIGURATION, key=error.key) from None
        if key == "engine.price" and node.tag == MAP:
            for inner, at, value in text.items(node):
                self._set(text, key, inner, at, value)
            return None
        if key in self.lines:
            raise self.error(line, f"'{key}' is already on line {self.lines[key]}", key=key)
        self.lines[key] = line
        self._lines_below(text, key, node)
        values, (*path, last) = self.values, key.split(".")
        for part in path:
            values = values.setdefault(part, {})
            if not isinstance(values, dict):
                raise self.error(line, f"'{key}' is a key below another key that has a value already", key=key)
        value, before = text.value(node), values.get(last)
        values[last] = before | value if isinstance(before, dict) and isinstance(value, dict) else value
        return None

    def _section(self, text: YamlText, section: str, line: int, node: Node) -> None:
        self.lines.setdefault(section, line)
        if node.tag == MAP:
            items = list(text.items(node))
            names = {name for name, _, _ in items}
            for name, at, value in items:
                if name == "kind" and section == "engine" and "name" not in names and self._is_option(text.value(value)):
                    name = "name"  # as `--cfg job` prints it
                self._set(text, section, name, at, value)
        elif node.tag == SEQUENCE and section == "hardware":
            self._set(text, section, "profiles", line, node)
        elif node.tag == SEQUENCE or section not in GROUPS:
            option = "the name of an option, or " if section in GROUPS else ""
            raise self.error(line, f"{section} needs {option}keys with values below it", key=section)
        elif (option := text.value(node)) is not None:
            self._option(section, option, line)

    def _is_option(self, name: Any) -> bool:
        return name in options("engine")

    def _option(self, group: str, option: Any, line: int) -> None:
        if group in self.options:
            raise self.error(line, f"the option of {group} is already on line {self.lines[group]}", key=group)
        if not isinstance(option, (str, int)):
            raise self.error(line, f"{group}.name must be the name of an option, not {option!r}", key=group)
        self.lines[group] = line
        self.options[group] = str(option)

    def _lines_below(self, text: YamlText, key: str, node: Node) -> None:
        if node.tag == MAP:
            for name, line, value in text.items(node):
                if name:
                    self.lines.setdefault(f"{key}.{name}", line)
                    self._lines_below(text, f"{key}.{name}", value)
        elif key == "hardware.profiles" and node.tag == SEQUENCE:
            for at, entry in enumerate(node.value):
                self.lines[f"hardware[{at}]"] = line_of(entry)
                self._lines_below(text, f"hardware[{at}]", entry)


def is_run_file(word: str) -> bool:
    """True for an argument that names a run file."""
    return not word.startswith("-") and "=" not in word and word.lower().endswith(SUFFIXES)


def file_text(path: str) -> str:
    """The text of a run file. Raises `ConfigError` if it cannot be read."""
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        folder = Path(path).expanduser().parent
        names = [each.name for each in folder.glob("*.y*ml")] if folder.is_dir() else []
        hint = nearest(Path(path).name, names) if isinstance(error, FileNotFoundError) and names else ""
        raise ConfigError(f"cannot read the run file {path}: {error.strerror}{hint}", code=ErrorCode.RUN_FILE) from None
    try:
        if len(data) > MAX_BYTES:
            raise ValueError
        return data.decode("utf-8-sig")
    except ValueError:
        raise ConfigError(
            f"{path} is not a run file: it must be YAML, in UTF-8; dataset.path={path} reads it as a dataset",
            code=ErrorCode.RUN_FILE,
        ) from None
