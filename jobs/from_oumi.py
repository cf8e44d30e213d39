"""`eagleray from-oumi`: writes a run file from an inference configuration of Oumi."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines.errors import ConfigError, ErrorCode, no_such
from engines.registry import REGISTRY
from jobs.guide import see
from jobs.write_run_file import next_steps, on_one_line, run_file_text, write_run_file
from pipeline.configuration.layer import Move, folder_of, moved
from pipeline.configuration.yaml_text import YamlError, YamlText

# Oumi's names of engines that are not ours in capitals.
_ENGINES = {
    "NATIVE": "transformers",
    "REMOTE": "openai_compatible",
    "GOOGLE_VERTEX": "vertex",
    "HUGGING_FACE_ROUTER": "huggingface",
}
# Oumi's key -> ours.
_KEYS = {
    "input_path": "dataset.path",
    "model.model_name": "engine.model",
    "model.adapter_model": "engine.adapter",
    "model.model_revision": "engine.revision",
    "model.model_kwargs": "engine.kwargs",
    "generation.max_new_tokens": "generation.max_tokens",
    "generation.stop_strings": "generation.stop",
    "remote_params.api_url": "engine.base_url",
    "remote_params.api_key_env_varname": "engine.api_key_env",
    "remote_params.max_retries": "engine.max_retries",
    "remote_params.connection_timeout": "engine.timeout_s",
    "remote_params.num_workers": "engine.max_concurrency",
    "remote_params.requests_per_minute": "engine.requests_per_minute",
    "remote_params.input_tokens_per_minute": "engine.input_tokens_per_minute",
    "remote_params.output_tokens_per_minute": "engine.output_tokens_per_minute",
    "remote_params.user_id": "engine.extra_body.user",
} | {
    f"generation.{name}": f"generation.{name}"
    for name in ("temperature", "top_p", "min_p", "seed", "frequency_penalty", "presence_penalty", "stop_token_ids",
                 "logit_bias", "tool_choice")
}  # fmt: skip
# Keys of the model that engines in the workers take as their keywords.
_KWARGS = (
    "device_map",
    "attn_implementation",
    "trust_remote_code",
    "chat_template",
    "chat_template_kwargs",
    "tool_call_parser",
)
# Keys that need no counterpart.
_ALWAYS = ("generation.exclude_prompt_from_response", "generation.use_cache", "generation.batch_size", "engine",
           "generation.use_sampling", "generation.num_beams", "remote_params.use_adaptive_concurrency",
           "remote_params.batch_completion_window", "output_path", "generation.guided_decoding")  # fmt: skip
# Keys whose values have keys of their own. A section comes before the keys in it.
_MAPPINGS = ("generation", "remote_params", "model.model_kwargs", "generation.guided_decoding")
# Values of a key that is not set.
_EMPTY: tuple[Any, ...] = (None, "", [], {})
# Values that Oumi treats as not set.
_UNSET = {"generation.min_p": 0, "generation.frequency_penalty": 0, "generation.presence_penalty": 0, "generation.top_p": 1}


def main(argv: list[str]) -> int:
    """Writes the run file. Returns the exit status."""
    if "-h" in argv or "--help" in argv or not argv:
        print(help_text())
        return 0 if argv else 2
    try:
        if len(argv) > 2 or any(word.startswith("-") for word in argv):
            raise ConfigError("eagleray from-oumi takes the path of Oumi's file and the path of the run file")
        source, target = argv[0], argv[1] if len(argv) > 1 else "run.yaml"
        text, notes = translated(_read(source), source, target)
        write_run_file(target, text)
    except ConfigError as error:
        print(f"eagleray: {error} {see(error)}", file=sys.stderr)
        return 2
    print(f"{target} is written.")
    for line in [*(f"- {on_one_line(note)}" for note in notes), *next_steps(target)]:
        print(line)
    return 0


def _read(path: str) -> Mapping[str, Any]:
    try:
        text = YamlText(Path(path).read_text(encoding="utf-8"))
        found = text.value(text.root) if text.root is not None else None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", code=ErrorCode.RUN_FILE) from None
    except (UnicodeDecodeError, YamlError) as error:
        line = f":{error.line}" if isinstance(error, YamlError) else ""
        raise ConfigError(f"{path}{line}: {error}", code=ErrorCode.RUN_FILE) from None
    if not isinstance(found, Mapping) or not isinstance(found.get("model"), Mapping):
        raise ConfigError(f"{path} is not an inference configuration of Oumi: it has no key model", code=ErrorCode.RUN_FILE)
    for key in _MAPPINGS:
        section, _, name = key.partition(".")
        value = found.get(section) if not name else (found.get(section) or {}).get(name)
        if value not in _EMPTY and not isinstance(value, Mapping):
            raise ConfigError(f"{path}: {key} must be a mapping of keys to values", code=ErrorCode.RUN_FILE)
    return found


def translated(oumi: Mapping[str, Any], source: str, target: str) -> tuple[str, list[str]]:
    """The text of the run file, and notes about what has no counterpart."""
    name = str(oumi.get("engine") or "NATIVE").rpartition(".")[2].upper()
    kind = _ENGINES.get(name, name.lower())
    if kind not in REGISTRY:
        known = [*_ENGINES, *(each.upper() for each in REGISTRY)]
        raise ConfigError(no_such("engine of Oumi", name, known), key="engine")
    values: dict[str, dict[str, Any]] = {
        "dataset": {},
        "engine": {},
        "generation": {"max_tokens": 1024, "temperature": 0.0},
    }
    notes: list[str] = []
    for key, value in _flat(oumi):
        if value in _EMPTY or (key in _UNSET and value == _UNSET[key]):
            continue
        if key in _KEYS:
            _put(values, _KEYS[key], value)
        elif not _of_model(values, kind, key, value) and key not in _ALWAYS:
            notes.append(_note(key))
    _guided(values, oumi.get("generation") or {}, notes)
    if (oumi.get("generation") or {}).get("num_beams", 1) not in (1, None):
        notes.append("generation.num_beams: beam search is not supported.")
    move = Move(folder_of(source), folder_of(target))
    output = str(oumi.get("output_path") or "out/answers")
    folder = output.removesuffix(".jsonl")
    values["output"] = {"path": folder, "format": "jsonl", "style": "oumi"}
    if not values["dataset"]:
        notes.append("input_path is not set: write dataset.path, or type it (dataset.path=conversations.jsonl).")
    if folder != output:
        notes.append(f"output_path is a file in Oumi; here it is the directory {folder}, with its lines in data/.")
    for section, given in values.items():
        for key, value in given.items():
            given[key] = moved(f"{section}.{key}", value, move)
    values["engine"]["unsupported"] = "drop"  # Oumi leaves such parameters out
    header = [f"From Oumi's {Path(source).name}. Run it: {shlex.join(['eagleray', 'infer', target])}"]
    suggested = {"dataset.path": ("conversations.jsonl", "the conversations, in Oumi's or another format")}
    lines = [f"Note: {note}" for note in notes]
    return run_file_text(values, {"engine": kind}, header, {} if values["dataset"] else suggested, lines), notes


def _flat(oumi: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in oumi.items():
        if name in ("model", "generation", "remote_params") and isinstance(value, Mapping):
            found += [(f"{name}.{key}", item) for key, item in value.items()]
        else:
            found.append((str(name), value))
    return found


def _put(values: dict[str, dict[str, Any]], key: str, value: Any) -> None:
    section, *path, last = key.split(".")
    at = values.setdefault(section, {})
    for part in path:
        at = at.setdefault(part, {})
    at[last] = {**at.get(last, {}), **value} if isinstance(value, Mapping) and isinstance(at.get(last), dict) else value


def _of_model(values: dict[str, dict[str, Any]], kind: str, key: str, value: Any) -> bool:
    """Writes a key of the model that is a keyword of an engine in the workers. False if it is none."""
    engine, name = REGISTRY[kind], key.removeprefix("model.")
    if not key.startswith("model.") or not engine.holds_model:
        return False
    keyword = {
        "model_max_length": "n_ctx" if engine.gguf_only else "max_model_len",
        "torch_dtype_str": "dtype" if engine.parallel_sizes else "torch_dtype",
        "tokenizer_name": "tokenizer" if engine.parallel_sizes else None,
        "processor_kwargs": "mm_processor_kwargs" if engine.parallel_sizes else None,
    }.get(name, name if name in _KWARGS and not (name == "trust_remote_code" and engine.gguf_only) else None)
    if keyword is not None and not (engine.gguf_only and keyword in ("torch_dtype", "device_map", "attn_implementation")):
        values["engine"].setdefault("kwargs", {}).setdefault(keyword, value)
        return True
    return False


def _guided(values: dict[str, dict[str, Any]], generation: Mapping[str, Any], notes: list[str]) -> None:
    guided = generation.get("guided_decoding") or {}
    if (schema := guided.get("json")) is not None:
        if isinstance(schema, Mapping):
            values["generation"]["response_format"] = dict(schema)
        else:
            notes.append("generation.guided_decoding.json: write the JSON schema into generation.response_format.")
    for name in ("regex", "choice"):
        if guided.get(name) is not None:
            values["generation"]["response_format"] = {"type": name, name: guided[name]}


def _note(key: str) -> str:
    if key == "remote_params.api_key":
        return "remote_params.api_key is not copied: set the environment variable of engine.api_key_env."
    if key == "remote_params.politeness_policy":
        return f"{key}: set engine.requests_per_minute."
    if key.startswith("model."):
        return f"{key}: this engine has no key for it, or its server sets it."
    return f"{key} has no counterpart."


def help_text() -> str:
    return """\
Write a run file from an inference configuration of Oumi (the file of `oumi infer -c`). It does not overwrite a file.

  eagleray from-oumi config.yaml [run.yaml]

The run file has the engine, the model, the generation parameters, the limits and the paths, and comments about keys that
have no counterpart. An API key in Oumi's file is not copied. docs/from-oumi.md has all names.

Exit status: 0; 2 the file cannot be read, is not Oumi's, or the run file exists."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
