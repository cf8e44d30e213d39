"""Reads YAML with the line of every key, and says in plain words what is wrong with it.

Types follow YAML 1.2: `yes`, `no` and `on` are texts, `1e5` is a number, `12:30`, `007` and `2026-11-26` are texts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import yaml

Node = yaml.nodes.Node
MAP, SEQUENCE = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"
# The beginning of PyYAML's message -> ours. `True`: the error is where its context begins.
_PROBLEMS = {
    "found unexpected end of stream": ("this quote has no end", True),
    "expected ',' or ']'": ("this list has no end: ] is missing", True),
    "expected ',' or '}'": ("this mapping has no end: } is missing", True),
    "expected the node content": ("this list or mapping is not complete", True),
    "mapping values are not allowed here": ("the indentation is wrong, or a text that contains ': ' needs quotes", False),
    "expected <block end>": ("the indentation is wrong: keys of one level must begin in the same column", False),
    "could not find expected ':'": ("a colon is missing after this key", True),
    "but found another document": ("only one document is possible: remove the line ---", False),
    "could not determine a constructor": ("tags with ! are not possible; ${oc.env:NAME} is an environment variable", False),
}


class YamlError(Exception):
    """A text is not YAML. `line` is the number of the wrong line."""

    def __init__(self, text: str, line: int) -> None:
        super().__init__(text)
        self.line = line


_FLOAT = r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}


for _tag, _pattern, _first in (
    ("merge", r"<<", "<"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
):
    characters = [each if each != "\0" else "" for each in _first]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), characters)


class YamlText:
    """A YAML document as nodes. Raises `YamlError`."""

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()
        try:
            self._loader = _Loader(text)
            self.root: Node | None = self._loader.get_single_node()
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise YamlError(f"there is a character that YAML does not allow, with the code {_code(error)}", line) from None
        except yaml.MarkedYAMLError as error:
            raise self._explained(error) from None

    def items(self, node: Node) -> Iterator[tuple[str | None, int, Node]]:
        """The keys of a mapping, with their lines and values. None for a key that is not a single word or number."""
        assert isinstance(node, yaml.MappingNode)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise YamlError(f"'{key.value}' is already on line {seen[key.value]}", line_of(key))
                seen[key.value] = line_of(key)
        merged = {}
        try:
            self._loader.flatten_mapping(node)
        except yaml.MarkedYAMLError as error:
            raise self._explained(error) from None
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            merged[name] = (name, line_of(key), value)  # a key beside `<<` comes after the merged ones, and replaces them
        yield from merged.values()

    def value(self, node: Node) -> Any:
        """The value of a node as plain Python."""
        try:
            for each in _mappings(node):
                list(self.items(each))  # raises for keys that are twice in a mapping
            return self._loader.construct_object(node, deep=True)
        except yaml.MarkedYAMLError as error:
            raise self._explained(error) from None
        except (ValueError, RecursionError) as error:
            raise YamlError(f"this value cannot be read: {error}", line_of(node)) from None

    def _explained(self, error: yaml.MarkedYAMLError) -> YamlError:
        """The error with its line, and a remedy for the usual mistakes."""
        mark, start = error.problem_mark, error.context_mark
        problem, at_start = next(
            (ours for theirs, ours in _PROBLEMS.items() if (error.problem or "").startswith(theirs)),
            (f"not YAML: {error.problem}", False),
        )
        mark = (start if at_start else mark) or mark or start
        number = min(mark.line if mark else 0, max(0, len(self.lines) - 1))
        for at in (number, number - 1, start.line if start else number):
            if 0 <= at < len(self.lines) and (remedy := _remedy(self.lines[at])):
                return YamlError(remedy, at + 1)
        return YamlError(problem, number + 1)


def _code(error: yaml.reader.ReaderError) -> str:
    return hex(ord(error.character) if isinstance(error.character, str) else int(error.character))


def line_of(node: Node) -> int:
    """The number of the line on which the node starts. The first line is 1."""
    return int(node.start_mark.line) + 1


def _mappings(node: Node, inside: tuple[Node, ...] = ()) -> Iterator[Node]:
    if node in inside:
        raise ValueError("an alias inside its own anchor")
    if isinstance(node, yaml.MappingNode):
        yield node
    if isinstance(node, yaml.CollectionNode):
        for each in node.value:
            for child in each if isinstance(each, tuple) else (each,):
                yield from _mappings(child, (*inside, node))


_KEY_VALUE = re.compile(r"^[\s-]*(?:(?P<key>[\w.$/-]+)\s*:\s+)?(?P<value>\S.*?)\s*$")


def _remedy(line: str) -> str:
    """The remedy for the usual mistakes in a line; empty if it has none of them."""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return "this line is indented with a tab: use spaces"
    found = _KEY_VALUE.match(line)
    if found is None:
        return ""
    key, value = found["key"], found["value"]
    if key is None and re.match(r"^\s*[\w.]+:\S", line):
        return "a space is missing after the colon"
    if key is not None and re.match(r"^[\w./-]+=\S", value):
        return f"write {key} with a colon and keys below it, or one key in a line: name: value"
    special = value[0] in "@`%*&" or value.startswith("{{") or (value[0] not in "'\"[{|>#" and re.search(r":\s", value))
    if special:
        quote = "'" if '"' in value else '"'
        return f"this text needs quotes: {f'{key}: ' if key else ''}{quote}{value[:60]}{'…' if len(value) > 60 else quote}"
    return ""


class _Dumper(yaml.SafeDumper):
    """Writes what both YAML 1.1 and 1.2 read in the same way."""

    yaml_implicit_resolvers = {
        first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()), *_Loader.yaml_implicit_resolvers.get(first, ())]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
    }

    def _text(self, text: str) -> Node:
        if re.search("[\x85\u2028\u2029]", text):  # YAML reads them as line breaks, except as escapes between quotes
            return self.represent_scalar("tag:yaml.org,2002:str", text, '"')
        is_block = "\n" in text.strip("\n") and not re.search(r"[ \t]\n|\t", text)
        return self.represent_scalar("tag:yaml.org,2002:str", text, "|" if is_block else None)


_Dumper.add_representer(str, _Dumper._text)


def dumped(key: str, value: Any, width: int = 100) -> str:
    """A key with its value as YAML. A short list or mapping is written in one line."""
    if isinstance(value, (list, dict)):
        line = f"{key}: {_dump(value, True, sys.maxsize).strip()}"
        if len(line) <= width and "\n" not in line:
            return line
    return _dump({key: value}, False, width).rstrip("\n")


def _dump(value: Any, flow: bool, width: int) -> str:
    text: str = yaml.dump(value, None, _Dumper, default_flow_style=flow, sort_keys=False, allow_unicode=True, width=width)
    return text
