"""The files of a model before it is loaded: a checkpoint directory, a repository on the Hugging Face hub, or a GGUF file.

Weights are never read, and nothing heavy is imported.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from engines.config import EngineConfig
from engines.errors import ConfigError
from engines.registry import kind_of
from engines.text import one_line


def is_gguf(config: EngineConfig) -> bool:
    """The model is a GGUF file. vLLM takes such files too."""
    return kind_of(config).gguf_only or str(config.model).endswith(".gguf")


def gguf_metadata(config: EngineConfig) -> Any:
    """The `GGUFMetadata` of the model's file, downloaded if it is on the hub. Raises `ConfigError`."""
    from engines.local.gguf import GGUFMetadata
    from engines.local.gguf_files import resolve_model

    return GGUFMetadata(resolve_model(config, config.kwargs.get("filename")))


def checkpoint_file(config: EngineConfig, name: str) -> Path:
    """The path of a file of the checkpoint, downloaded if it is on the hub. Raises `ConfigError` if there is none."""
    if not config.model:
        raise ConfigError("engine.model is needed: a checkpoint directory or a hub id", key="engine.model")
    path = Path(config.model).expanduser() / name
    if path.is_file():
        return path
    if path.parent.is_dir():
        raise ConfigError(f"engine.model: {path.parent} has no {name}", key="engine.model")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", config.model):
        raise ConfigError(f"engine.model: there is no directory {path.parent}", key="engine.model")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ConfigError(
            f"engine.model: {config.model} is on the hub: run pip install huggingface_hub", key="engine.model"
        ) from None
    try:
        return Path(hf_hub_download(config.model, name, revision=config.revision))
    except Exception as error:  # the hub's client raises many types: no network, no such repository, gated, …
        raise ConfigError(
            f"engine.model: {name} of {config.model} cannot be downloaded from the hub: {one_line(error)}",
            key="engine.model",
        ) from None


def optional_file(config: EngineConfig, name: str) -> Path | None:
    """As `checkpoint_file`; None if the checkpoint has no such file or it cannot be downloaded."""
    try:
        return checkpoint_file(config, name)
    except ConfigError:
        return None


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises `ConfigError` if it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"engine.model: {path} cannot be read: {one_line(error)}", key="engine.model") from None


def own_chat_template(config: EngineConfig) -> tuple[str | None, str, str]:
    """The checkpoint's chat template, or None, and the texts of its first and last token (BOS and EOS)."""
    path = optional_file(config, "tokenizer_config.json")
    settings = read_json(path) if path else {}
    own = settings.get("chat_template")
    if isinstance(own, list):  # several templates by name
        own = {each["name"]: each["template"] for each in own}.get("default")
    if path := optional_file(config, "chat_template.jinja"):
        own = path.read_text(encoding="utf-8")
    ends = (settings.get("bos_token") or "", settings.get("eos_token") or "")
    bos, eos = (end["content"] if isinstance(end, dict) else end for end in ends)
    return own, bos, eos


def stored_numbers(folder: Path, config: EngineConfig) -> Counter[str] | None:
    """The count of numbers in the weights' files by number format, from the headers of the safetensors files.

    None if the headers cannot be read: a caller can estimate the count from the model's dimensions.
    """
    index = folder / "model.safetensors.index.json"
    named = set(read_json(index).get("weight_map", {}).values()) if index.is_file() else ()
    files = [folder / name for name in named] or sorted(folder.glob("model*.safetensors"))
    counts: Counter[str] = Counter()
    try:
        if (not files or not all(file.is_file() for file in files)) and folder != Path(str(config.model)).expanduser():
            from huggingface_hub import get_safetensors_metadata

            # Downloads only the first bytes of the files.
            return Counter(get_safetensors_metadata(str(config.model), revision=config.revision).parameter_count)
        for file in files:
            with file.open("rb") as stream:
                metadata = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            metadata.pop("__metadata__", None)
            for tensor in metadata.values():
                counts[tensor["dtype"]] += math.prod(tensor["shape"])
    except Exception:  # no network, no such file, a pointer of Git LFS, …
        return None
    return counts or None
