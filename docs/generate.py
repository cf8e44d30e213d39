"""Writes what the code knows into the docs: docs/configuration.md, and the tables of docs/engines.md.

`make docs` runs it; a test fails where the files are not what it makes.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from engines.config import Capabilities, config_from_keys  # noqa: E402
from engines.params import GENERATION_FIELDS, GenerationParams  # noqa: E402
from engines.registry import HTTP_ENGINES, REGISTRY  # noqa: E402
from engines.remote.batch.factory import WIRES  # noqa: E402
from engines.remote.provider import Provider  # noqa: E402
from jobs.compose import GROUPS, conf_dir, options  # noqa: E402
from jobs.guide import anchor  # noqa: E402
from pipeline.config import OPEN_KEYS, known_keys  # noqa: E402

HEAD = """\
# Configuration

Every key of `eagleray`, made from the code by `make docs`. A key is set on the command line, `key=value`; a group's
option, `group=option`, sets several at once, and keys beside it go before it. Values are YAML: `[a, b]` is a list,
`{a: b}` a mapping, `null` nothing. `eagleray infer … --cfg job` prints what a command line comes to; secrets in it are
`***`.

Files of your own, `DIR/engine/mine.yaml` say, are options too with `--config-dir DIR`: `engine=mine`. They hold keys of
their group, as the packaged ones below do. `${oc.env:NAME}` is a variable of the environment, `${now:%Y-%m-%d}` today.

What a key may be is checked before anything starts; an unknown key or option is refused with the nearest right name. Keys
under these are your own: OPEN.
"""

# What there is to say of a group besides its keys.
ABOUT = {
    "engine": "[Engines](engines.md) has an example of each and what it takes; [providers](providers.md) the particulars "
    "of the remote ones.",
    "hardware": "How many replicas run, and what each reserves. [Concepts](concepts.md#replicas)",
    "dataset": "What is read. [The formats](../README.md#input)",
    "generation": "How answers are sampled. The same for all engines; what an engine does not take is refused before "
    "anything is asked ([which](engines.md#what-each-takes)). A row's own `generation` goes before these. Unset leaves it "
    "to the engine; local engines then decode greedily, up to 1,024 tokens.",
    "output": "What is written, and where. [The output directory](concepts.md#the-output-directory)",
    "run": "When to stop, resume and retry. [Exit statuses](errors.md#exit-statuses)",
}
# Further reading for single keys.
MORE = {
    "engine.adapter": "[LoRA](engines.md#lora-adapters)",
    "engine.kwargs": "[each engine's](engines.md)",
    "engine.provider": "[its keys](providers.md#adding-one)",
    "engine.unsupported": "[what each takes](engines.md#what-each-takes)",
    "generation.response_format": "[structured output](engines.md#structured-output)",
    "run.mode": "[batch APIs](engines.md#batch-apis)",
    "run.max_engine_deaths": "[engines that die](errors.md#engines-that-die)",
    "run.max_outage_s": "[outages](errors.md#a-server-that-does-not-answer)",
    "run.resume": "[resume](concepts.md#resume)",
}
TYPES = {"str": "text", "int": "whole number", "float": "number", "bool": "true, false", "Any": "", "Price": "mapping"}


def configuration() -> str:
    """The text of docs/configuration.md."""
    keys = known_keys()
    sections = list(dict.fromkeys(name.partition(".")[0] for name in keys))
    lines = [HEAD.replace("OPEN", ", ".join(f"`{key}`" for key in OPEN_KEYS))]
    for section in sections:
        lines += [f"## {section}", ""]
        if about := ABOUT.get(section):
            lines += [about, ""]
        if section in GROUPS:
            lines += _options(section)
        lines += ["| key | | default | |", "|---|---|---|---|"]
        lines += [_row(name, item) for name, item in keys.items() if name.startswith(f"{section}.")]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _row(name: str, item: Any) -> str:
    if name == "engine.kind":
        return f'| <a id="{anchor(name)}"></a>`{name}` | text | the option\'s | which engine; `engine=…` sets it |'
    if name.startswith("generation."):
        declared = next(f for f in dataclasses.fields(GenerationParams) if f.name == name.partition(".")[2])
        kind, default = str(declared.type), None
    else:
        kind = str(item.type)
        default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
    kind = kind.removesuffix(" | None")
    word = "mapping" if kind.startswith("dict") else "list" if kind.startswith("list") else TYPES.get(kind, kind)
    if isinstance(default, bool):
        default = str(default).lower()
    shown = f"`{default}`" if isinstance(default, (int, float, str)) else ""
    text = item.metadata["help"].replace("|", "\\|")
    more = f"; {MORE[name]}" if name in MORE else ""
    return f'| <a id="{anchor(name)}"></a>`{name}` | {word} | {shown} | {_escaped(text)}{more} |'


def _escaped(text: str) -> str:
    """Braces and stars in a help text are meant as they are."""
    return re.sub(r"(\{[^}]*\})", r"`\1`", text).replace("*", "\\*")


def _options(group: str) -> list[str]:
    """The options of a group with what they set: all of it, or for engines the comment on top of the file."""
    lines = [f"| `{group}=` | |", "|---|---|"]
    defaults = {name: value for entry in _yaml(conf_dir() / "config.yaml")["defaults"] if isinstance(entry, dict)
                for name, value in entry.items()}  # fmt: skip
    for name in options(group):
        path = conf_dir() / group / f"{name}.yaml"
        comments = [line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# ")]
        about = " ".join(comment for comment in comments if not comment.startswith("http"))
        about = re.sub(r" https://\S+", "", about)
        sets = "" if group == "engine" else ", ".join(f"`{key}: {_shown(v)}`" for key, v in _yaml(path).items())
        mark = " (default)" if defaults.get(group) == name else ""
        title = f"[`{name}`](engines.md#{name})" if group == "engine" else f"`{name}`"
        lines.append(f"| {title}{mark} | {' '.join(filter(None, (about, sets)))} |")
    return [*lines, ""]


def _shown(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("...").strip()
    return text.replace("\n", " ").replace("|", "\\|")


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


# -- engines ------------------------------------------------------------------------------------------------------------

FORMATS = ("json_object", "json_schema", "regex", "choice", "grammar")


def capabilities(kind: str) -> Capabilities:
    """What an engine declares. Read from its source where it is a local one, whose library may be missing here."""
    provider = config_from_keys(kind, {}).provider
    if provider:
        return Provider.of(config_from_keys(kind, {})).capabilities()
    module, name = REGISTRY[kind].target.split(":")
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "capabilities":
            found = eval(ast.unparse(node.value), {"Capabilities": Capabilities, "frozenset": frozenset})
            assert isinstance(found, Capabilities)
            return found
    if kind == "sglang_offline":  # a server of its own, asked as any other
        return capabilities("sglang")
    return Capabilities()


def features() -> str:
    """A table of all engines: what each takes."""
    lines = [
        "| engine | parameters it does not take | `response_format` | images | a row's model | a row's adapter |",
        "|---|---|---|---|---|---|",
    ]
    for kind in REGISTRY:
        found = capabilities(kind)
        lacks = ", ".join(f"`{name}`" for name in GENERATION_FIELDS if name in found.unsupported) or "none"
        formats = [name for name in FORMATS if name in found.response_formats]
        shown = "all" if len(formats) == len(FORMATS) else ", ".join(f"`{name}`" for name in formats) or "none"
        images = "by the model" if REGISTRY[kind].images_by_model else _yes(found.images)
        lines.append(f"| `{kind}` | {lacks} | {shown} | {images} | {_yes(found.row_model)} | {_yes(found.row_adapter)} |")
    return "\n".join(lines)


def batches() -> str:
    """A table of the engines with a batch API."""
    lines = ["| engine | batch API | rows at most | bytes at most | share of the live price |", "|---|---|---|---|---|"]
    without = []
    for kind in REGISTRY:
        declared = config_from_keys(kind, {}).provider.get("batch")
        if not declared:
            without.append(f"`{kind}`")
            continue
        wire = WIRES[declared["wire"]]
        rows, size = declared.get("rows", wire.max_rows), declared.get("bytes", wire.max_bytes)
        lines.append(f"| `{kind}` | {declared['wire']} | {rows:,} | {size:,} | {declared.get('price', 1.0)} |")
    return "\n".join([*lines, "", f"Without one: {', '.join(without)}."])


def remote() -> str:
    """A table of the engines behind HTTP, from their files."""
    lines = ["| engine | class | key from | address | answers with |", "|---|---|---|---|---|"]
    for kind in (*HTTP_ENGINES, "bedrock"):
        config = config_from_keys(kind, {})
        provider = Provider.of(config)
        auth = {"google": "Google's default credentials", "aws": "AWS's credential chain", "optional": "none needed"}
        key = f"`{config.api_key_env}`" if config.api_key_env else auth[provider.auth]
        url = f"`{config.base_url}`" if config.base_url else "AWS's of `AWS_REGION`" if kind == "bedrock" else "yours"
        name = HTTP_ENGINES.get(kind, REGISTRY[kind].target.partition(":")[2])
        lines.append(f'| <a id="{kind}"></a>`{kind}` | `{name}` | {key} | {url} | `{provider.wire}` |')
    return "\n".join(lines)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


TABLES = {"features": features, "remote": remote, "batches": batches}


def filled(text: str) -> str:
    """A page with its generated parts made anew: what is between `<!-- features -->` and `<!-- end -->`."""
    for name, table in TABLES.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        text = f"{before}{mark}{table()}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return text


def pages() -> dict[Path, str]:
    """Every generated page and what it should be."""
    docs = ROOT / "docs"
    return {docs / "configuration.md": configuration(), docs / "engines.md": filled((docs / "engines.md").read_text())}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
