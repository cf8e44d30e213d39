"""The tasks that a GGUF model can serve on engine=llamacpp, from its metadata.

A model with the pooling type `rank` is a classifier: a cross-encoder if it has one output. One with another pooling type
gives embeddings. Any other model generates; `engine.kwargs.pooling` makes embeddings of its token vectors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.config import EngineConfig
from engines.errors import ConfigError
from engines.local.checkpoint_tasks import CLASSIFIES, EMBEDS, GENERATES, SCORES, no_pooling

# The architectures of encoders. They have no KV cache, and read a whole text at once.
_ENCODERS = frozenset((
    "bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert", "eurobert",
    "gemma-embedding", "llama-embed", "t5encoder",
))  # fmt: skip
_POOLINGS = {"1": "mean", "2": "cls", "3": "last", "4": "rank"}  # by llama.cpp's numbers
GIVEN_POOLINGS = ("mean", "cls", "last")


@dataclass(frozen=True, slots=True)
class GGUFHead:
    """The tasks of a model, and the pooling that they need: mean, cls, last or rank; None if it has no pooling."""

    tasks: frozenset[str]
    pooling: str | None
    encoder: bool


def gguf_head(get: Callable[[str], str | None], kwargs: Mapping[str, Any], outputs: int = 1) -> GGUFHead:
    """The head of a model with this metadata. Raises `ConfigError` for an unknown pooling.

    `outputs` is the number of a classifier's outputs, which only a loaded model tells.
    """
    given = kwargs.get("pooling")
    if given is not None and given not in GIVEN_POOLINGS:
        raise ConfigError(
            f"engine.kwargs.pooling must be one of {', '.join(GIVEN_POOLINGS)}, not {given!r:.80}", key="engine.kwargs"
        )
    encoder = get("general.architecture") in _ENCODERS
    pooling = _POOLINGS.get(get("*.pooling_type") or "")
    if pooling == "rank":
        # Qwen3's rerankers have the outputs yes and no; llama.cpp gives their probabilities.
        one = outputs <= 1 or get("general.architecture") == "qwen3"
        return GGUFHead(SCORES if one else CLASSIFIES, "rank", encoder)
    if encoder or pooling:
        return GGUFHead(EMBEDS, given or pooling, encoder)
    return GGUFHead(GENERATES | EMBEDS if given else GENERATES, given, encoder)


def gguf_tasks(config: EngineConfig) -> frozenset[str] | None:
    """The tasks of `engine.model`; None if its file is not on this machine, or without llama.cpp. Downloads nothing."""
    from engines.local.gguf import PACKAGED_MODEL

    name = str(config.model or PACKAGED_MODEL)
    if name == PACKAGED_MODEL:
        return GENERATES | EMBEDS if config.kwargs.get("pooling") else GENERATES
    if not Path(name).expanduser().exists():
        return None
    try:
        from engines.local.gguf_files import resolve_model

        path = resolve_model(config, config.kwargs.get("filename"))
        return gguf_head(_metadata(str(path), path.stat().st_mtime_ns).get, config.kwargs).tasks
    except (ConfigError, ImportError, OSError):
        return None


@functools.lru_cache(maxsize=8)
def _metadata(path: str, modified: int) -> Any:
    from engines.local.gguf import GGUFMetadata

    return GGUFMetadata(Path(path))


def check_pooling(head: GGUFHead, model: object) -> None:
    """Raises `ConfigError` for an encoder whose file does not say how it pools."""
    if head.encoder and head.pooling is None:
        raise ConfigError(no_pooling(model), key="engine.kwargs")
