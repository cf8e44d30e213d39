"""Changes keys of a run file in its text, so that comments and the order of keys stay."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.configuration.run_file import RunFile
from pipeline.configuration.yaml_text import MAP, Node, YamlText, dumped

# The comment of an earlier change, which the new one replaces.
_EARLIER = re.compile(r"\n*^# Tuned by eagleray tune.*\n(?:#   .*\n)*", re.MULTILINE)


def edited(path: str, text: str, changes: Mapping[str, Any], comment: Sequence[str]) -> str | None:
    """The text of a run file with these dotted keys changed. Keys that it does not have are added at its end.

    None if the text cannot be changed so that it has exactly these values, for example because a value is an alias.
    """
    before = RunFile.of(path, text)
    places = dict(_places(YamlText(text).root))
    new: list[str] = []
    replaced: list[tuple[int, int, str]] = []
    for name, value in changes.items():
        word = dumped("x", value, 1 << 30).removeprefix("x:").strip()
        if (node := places.get(name)) is None:
            new.append(f"{name}: {word}")
        else:
            begin, end = node.start_mark.index, node.end_mark.index
            replaced.append((begin, end, word if begin < end else f" {word}"))
    result = text
    for begin, end, word in sorted(replaced, reverse=True):
        result = result[:begin] + word + result[end:]
    result = _EARLIER.sub("\n", result.replace("\r\n", "\n")).rstrip("\n")
    result += "\n" + "".join(f"{line}\n" for line in ["", *(f"# {line}" for line in comment), *new])
    result = result.replace("\n", "\r\n") if "\r\n" in text else result
    try:
        after = RunFile.of(path, result)
    except Exception:  # it is no run file any more
        return None
    return result if (after.values, after.options) == (_changed(before.values, changes), before.options) else None


def _places(node: Node | None, above: str = "") -> Iterator[tuple[str, Node]]:
    """The nodes of all values, by their dotted keys."""
    for key, value in node.value if node is not None and node.tag == MAP else ():
        name = f"{above}{key.value}"
        yield name, value
        yield from _places(value, f"{name}.")


def _changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(dict(values))
    for name, value in changes.items():
        *path, last = name.split(".")
        inside = result
        for part in path:
            inside = inside.setdefault(part, {})
        inside[last] = value
    return result
