"""The tasks that a Hugging Face checkpoint can serve, from its `config.json` and `modules.json`.

A causal language model gives chats and log likelihoods. A sentence-transformers checkpoint gives embeddings, and scores
two texts by the cosine of their embeddings. A sequence classifier gives labels; one with a single output (a cross-encoder,
a reward model) also gives scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines.config import EngineConfig
from engines.local.checkpoint_files import read_json
from engines.tasks import CHAT

GENERATES = frozenset((CHAT, "loglikelihood"))
EMBEDS = frozenset(("embed", "score", "rerank"))
CLASSIFIES = frozenset(("classify",))
SCORES = frozenset(("classify", "score", "rerank"))


def checkpoint_tasks(config: EngineConfig, overrides: Mapping[str, Any] | None = None) -> frozenset[str] | None:
    """The tasks of `engine.model`; None if it is not a checkpoint directory on this machine. Nothing is downloaded.

    `overrides` replaces keys of `config.json`.
    """
    folder = Path(str(config.model or "")).expanduser()
    if not config.model or not (folder / "config.json").is_file():
        return None
    return tasks_of({**read_json(folder / "config.json"), **(overrides or {})}, has_pooling(folder))


def transformers_tasks(config: EngineConfig) -> frozenset[str] | None:
    """The tasks of a checkpoint on engine=transformers. Returns None as `checkpoint_tasks` does."""
    found = checkpoint_tasks(config)
    return None if found is None else with_pooling(found, config.kwargs)


def with_pooling(tasks: frozenset[str], kwargs: Mapping[str, Any]) -> frozenset[str]:
    """The tasks of a model on an engine that pools the token vectors of any model: `kwargs["pooling"]`."""
    return tasks | EMBEDS if CHAT in tasks and kwargs.get("pooling") else tasks


def no_pooling(model: object) -> str:
    return f"'{model}' does not declare how it pools: set engine.kwargs.pooling to mean, cls or last"


def tasks_of(settings: Mapping[str, Any], pooling: bool) -> frozenset[str]:
    """The tasks of a checkpoint with these `settings` (its `config.json`); `pooling`: it declares how it pools."""
    names = settings.get("architectures") or ()
    if any(name.endswith("ForSequenceClassification") for name in names):
        return SCORES if label_count(settings) == 1 else CLASSIFIES
    if any(name.endswith(("RewardModel", "ForRewardModeling")) for name in names):
        return frozenset(("score",))
    if pooling:
        return EMBEDS
    if any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names):
        return GENERATES
    if any(name.endswith("Model") for name in names):  # an encoder without a head
        return EMBEDS
    return GENERATES


def label_count(settings: Mapping[str, Any]) -> int:
    """The number of a classifier's outputs. `config.json` leaves `id2label` out if it is the default of two labels."""
    return int(settings.get("num_labels") or len(settings.get("id2label") or ()) or 2)


def has_pooling(folder: Path) -> bool:
    """True for a sentence-transformers checkpoint: its `modules.json` names a pooling module."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        return any(str(module.get("type", "")).endswith("Pooling") for module in modules)
    except (OSError, ValueError, AttributeError, TypeError):
        return False
