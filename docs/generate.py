"""Generates docs/configuration.md and the tables of other pages from the code. Those of docs/scale.md are measurements.

`make docs` runs this script. A test fails if the files differ from its output.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench import scale_tables  # noqa: E402
from engines.config import config_from_keys  # noqa: E402
from engines.params import GENERATION_FIELDS, GenerationParams  # noqa: E402
from engines.registry import HTTP_ENGINES, REGISTRY, capabilities_of  # noqa: E402
from engines.remote.batch.factory import batch_limits  # noqa: E402
from engines.remote.provider import Provider  # noqa: E402
from engines.tasks import CHAT, TASKS  # noqa: E402
from jobs.guide import anchor  # noqa: E402
from pipeline.config import OPEN_KEYS, known_keys  # noqa: E402
from pipeline.configuration.errors import GROUPS  # noqa: E402
from pipeline.configuration.options import conf_dir, options  # noqa: E402

HEAD = """\
# Configuration

This page lists every key of `eagleray`. `make docs` generates it from the code. Set a key on the command line with
`key=value`. `group=option` selects an option, a file that sets several keys of its group. A single key overrides the
option. Values are YAML: `[a, b]` is a list, `{a: b}` is a mapping, `null` is no value. `eagleray infer … --cfg job` prints
the resulting configuration, with `***` in place of secrets.

`--config-dir DIR` adds your own options: `DIR/engine/mine.yaml` becomes `engine=mine`. Such a file contains keys of its
group, like the packaged options below. `${oc.env:NAME}` is an environment variable. `${now:%Y-%m-%d}` is today's date.

All keys are checked before a run starts. For an unknown key or option, the error message suggests the nearest known name.
The keys under OPEN
are free. An engine checks the names of its own `kwargs`.
"""

# Text for the section of a group.
ABOUT = {
    "engine": "The engine and its settings. [Engines](engines.md) has an example of each engine. "
    "[Providers](providers.md) describes the remote engines.",
    "hardware": "The number of replicas, and the resources of each replica. See [replicas](concepts.md#replicas).",
    "dataset": "The input. See [the formats](datasets.md#formats) and [datasets](datasets.md).",
    "generation": "The sampling parameters, the same for all engines. A parameter that the engine does not support is "
    "refused before a request is sent ([table](engines.md#what-each-takes)). A row's own `generation` overrides these "
    "keys. If a key is not set, the engine's default applies: local engines decode greedily, up to 1,024 tokens.",
    "output": "The output. See [the output directory](concepts.md#the-output-directory).",
    "run": "When a run stops, resumes and retries. See [exit statuses](errors.md#exit-statuses).",
    "task": "What each row of the dataset asks. See [tasks](tasks.md).",
    "tune": "The measurements of `eagleray tune`. See [tuning](tune.md).",
    "serve": "The server of `eagleray serve`. See [serving](serving.md).",
}
# Links for single keys.
MORE = {
    "dataset.columns": "[columns](datasets.md#columns-with-a-meaning)",
    "dataset.template": "[templates](datasets.md#templates)",
    "dataset.last_answer": "[the last answer](datasets.md#the-last-answer)",
    "engine.adapter": "[LoRA](engines.md#lora-adapters)",
    "engine.kwargs": "[keywords of each engine](engines.md)",
    "engine.provider": "[its keys](providers.md#adding-one)",
    "engine.unsupported": "[supported parameters](engines.md#what-each-takes)",
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
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [_row(name, item) for name, item in keys.items() if f"{name}.".startswith(f"{section}.")]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _row(name: str, item: Any) -> str:
    if name == "engine.kind":
        return f'| <a id="{anchor(name)}"></a>`{name}` | text | the option\'s | the kind of engine; `engine=…` sets it |'
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
    """Quotes braces and stars of a help text for Markdown."""
    return re.sub(r"(\{[^}]*\})", r"`\1`", text).replace("*", "\\*")


def _options(group: str) -> list[str]:
    """The options of a group: the comment at the top of each file and, except for engines, the keys it sets."""
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


def features() -> str:
    """A table of the capabilities of all engines."""
    lines = [
        "| engine | unsupported parameters | `response_format` | images | row's model | row's adapter |",
        "|---|---|---|---|---|---|",
    ]
    for kind in REGISTRY:
        found = capabilities_of(config_from_keys(kind, {}))
        lacks = ", ".join(f"`{name}`" for name in GENERATION_FIELDS if name in found.unsupported) or "none"
        formats = [name for name in FORMATS if name in found.response_formats]
        shown = "all" if len(formats) == len(FORMATS) else ", ".join(f"`{name}`" for name in formats) or "none"
        images = "depends on the model" if REGISTRY[kind].images_by_model else _yes(found.images)
        lines.append(f"| `{kind}` | {lacks} | {shown} | {images} | {_yes(found.row_model)} | {_yes(found.row_adapter)} |")
    return "\n".join(lines)


def batches() -> str:
    """A table of the engines with a batch API."""
    lines = ["| engine | batch API | maximum rows | maximum bytes | share of the live price |", "|---|---|---|---|---|"]
    without = []
    for kind in REGISTRY:
        declared = config_from_keys(kind, {}).provider.get("batch")
        if not declared:
            without.append(f"`{kind}`")
            continue
        rows, size = batch_limits(declared)
        lines.append(f"| `{kind}` | {declared['wire']} | {rows:,} | {size:,} | {declared.get('price', 'not declared')} |")
    return "\n".join([*lines, "", f"Engines without a batch API: {', '.join(without)}."])


def remote() -> str:
    """A table of the remote engines, from their YAML files."""
    lines = ["| engine | class | API key from | address | wire format |", "|---|---|---|---|---|"]
    for kind in (*HTTP_ENGINES, "bedrock"):
        config = config_from_keys(kind, {})
        provider = Provider.of(config)
        auth = {"google": "Google's default credentials", "aws": "AWS's credential chain", "optional": "not needed"}
        key = f"`{config.api_key_env}`" if config.api_key_env else auth[provider.auth]
        url = f"`{config.base_url}`" if config.base_url else "AWS's in `AWS_REGION`" if kind == "bedrock" else "your server"
        name = HTTP_ENGINES.get(kind, REGISTRY[kind].target.partition(":")[2])
        lines.append(f'| <a id="{kind}"></a>`{kind}` | `{name}` | {key} | {url} | `{provider.wire}` |')
    return "\n".join(lines)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def tasks() -> str:
    """A table of the engines with tasks other than a chat."""
    names = [name for name in TASKS if name != CHAT]
    lines = [f"| engine | {' | '.join(f'`{name}`' for name in names)} |", f"|---|{'---|' * len(names)}"]
    without = []
    for kind in REGISTRY:
        # Of an engine that loads a model: the tasks that it has for any model, not those of its default model.
        found = (REGISTRY[kind].capabilities or capabilities_of(config_from_keys(kind, {}))).tasks
        if found == {CHAT}:
            without.append(f"`{kind}`")
        else:
            lines.append(
                f"| [`{kind}`](engines.md#{kind}) | {' | '.join('yes' if name in found else '' for name in names)} |"
            )
    return "\n".join([*lines, "", f"Engines for chats only: {', '.join(without)}."])


# Page -> its tables.
TABLES = {
    "engines.md": {"features": features, "remote": remote, "batches": batches},
    "tasks.md": {"tasks": tasks},
    "scale.md": scale_tables.TABLES,
}


def filled(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """The page with new tables between `<!-- features -->` (and the like) and `<!-- end -->`."""
    for name, table in tables.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        text = f"{before}{mark}{table()}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return text


def pages() -> dict[Path, str]:
    """Every generated page with its text."""
    docs = ROOT / "docs"
    found = {docs / name: filled((docs / name).read_text(), tables) for name, tables in TABLES.items()}
    return {docs / "configuration.md": configuration(), **found}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
