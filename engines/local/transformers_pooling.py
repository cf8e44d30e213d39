"""The embedding of a text from its token vectors: pooling, dense layers, normalisation.

A sentence-transformers checkpoint declares them in `modules.json`. For any other checkpoint, `engine.kwargs.pooling` and
`engine.kwargs.normalize` do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from engines.errors import ConfigError
from engines.text import one_line

# Finds a file of the checkpoint by its name; None if the checkpoint does not have it.
FindFile = Callable[[str], Path | None]

# The names of pooling in a sentence-transformers checkpoint of version 5 or earlier; all that are true are concatenated.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_MODES = frozenset(_FLAGS.values())
# The values of `engine.kwargs.pooling`.
POOLINGS = {"mean": "mean", "cls": "cls", "last": "lasttoken", "max": "max"}


@dataclass
class Pooling:
    """Makes embeddings of token vectors. `modes` are names of sentence-transformers, whose results are concatenated."""

    modes: tuple[str, ...]
    layers: list[Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=list)  # applied after pooling
    normalized: bool = False  # the last layer normalises
    declared: bool = False  # by the checkpoint
    include_prompt: bool = True  # the tokens of a prompt count
    folder: str = ""  # the folder of the transformer inside the checkpoint
    max_length: int | None = None  # longer texts are cut, as the checkpoint declares
    lower_case: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    prompt_name: str | None = None  # of the prompt that texts get

    def to(self, device: torch.device) -> None:
        """Moves the layers to the device of the token vectors."""
        for layer in self.layers:
            if isinstance(layer, torch.nn.Module):
                layer.to(device)

    def embed(self, hidden: torch.Tensor, lengths: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
        """Embeddings (rows, dimensions) in float32 of token vectors (rows, length, width), padded at the end.

        The first `skipped` tokens of each row do not count.
        """
        hidden, places = hidden.float(), torch.arange(hidden.shape[1], device=hidden.device)
        mask = (places < lengths[:, None]) & (places >= skipped[:, None])
        vectors = torch.cat([_pool(mode, hidden, mask, lengths) for mode in self.modes], dim=-1)
        for layer in self.layers:
            vectors = layer(vectors)
        return vectors


def _pool(mode: str, hidden: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(len(hidden), device=hidden.device)
    if mode == "cls":
        return hidden[rows, mask.int().argmax(1)]
    if mode == "lasttoken":
        return hidden[rows, lengths - 1]
    if mode == "max":
        return hidden.masked_fill(~mask[..., None], -torch.inf).amax(1)
    weights = mask.float()
    if mode == "weightedmean":
        weights = weights * torch.arange(1, mask.shape[1] + 1, device=hidden.device)
    total = weights.sum(1, keepdim=True).clamp(min=1e-9)
    summed = (hidden * weights[..., None]).sum(1)
    return summed / (total.sqrt() if mode == "mean_sqrt_len_tokens" else total)


def normalize(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


def declared_pooling(find: FindFile) -> Pooling | None:
    """The pooling of a sentence-transformers checkpoint; None for another checkpoint.

    Raises `ConfigError` for a module that this engine does not have.
    """
    listed = find("modules.json")
    if listed is None:
        return None
    pooling: Pooling | None = None
    folder, layers, normalized = "", list[Callable[[torch.Tensor], torch.Tensor]](), False
    for module in json.loads(listed.read_text(encoding="utf-8")):
        kind, path = str(module["type"]).rpartition(".")[2], module.get("path") or ""
        about = _read(find, f"{path}/config.json")
        if kind == "Transformer":
            folder = path
        elif kind == "Pooling":
            pooling = Pooling(_modes(about), declared=True, include_prompt=about.get("include_prompt", True))
        elif kind == "Normalize":
            layers.append(normalize)
        elif kind == "Dense":
            layers.append(_dense(find, path, about))
        else:
            raise ConfigError(
                f"engine.model: engine=transformers does not have the module '{module['type']}' of modules.json",
                key="engine.model",
            )
        normalized = kind == "Normalize"
    if pooling is None:
        return None
    pooling.folder, pooling.layers, pooling.normalized = folder, layers, normalized
    transformer = _read(find, f"{folder}/sentence_bert_config.json".lstrip("/"))
    if "message" in (transformer.get("modality_config") or {}):
        raise ConfigError(
            "engine.model: engine=transformers does not put texts into a chat template for embeddings, as "
            "sentence_bert_config.json of this checkpoint says",
            key="engine.model",
        )
    pooling.max_length = transformer.get("max_seq_length")
    pooling.lower_case = bool(transformer.get("do_lower_case"))
    whole = _read(find, "config_sentence_transformers.json")
    pooling.prompts, pooling.prompt_name = whole.get("prompts") or {}, whole.get("default_prompt_name")
    return pooling


def given_pooling(name: str, normalized: bool) -> Pooling:
    """The pooling of `engine.kwargs.pooling`. Raises `ConfigError` for an unknown name."""
    if name not in POOLINGS:
        known = ", ".join(POOLINGS)
        raise ConfigError(f"engine.kwargs.pooling must be one of {known}, not {name!r:.80}", key="engine.kwargs")
    return Pooling((POOLINGS[name],), [normalize] if normalized else [], normalized)


def _read(find: FindFile, name: str) -> dict[str, Any]:
    path = find(name)
    found = json.loads(path.read_text(encoding="utf-8")) if path else {}
    return found if isinstance(found, dict) else {}


def _modes(about: dict[str, Any]) -> tuple[str, ...]:
    """The modes of a Pooling module. Raises `ConfigError` for one that this engine does not have."""
    given = about.get("pooling_mode") or [mode for flag, mode in _FLAGS.items() if about.get(flag)] or "mean"
    modes = (given,) if isinstance(given, str) else tuple(given)
    if unknown := set(modes) - _MODES:
        raise ConfigError(f"engine.model: engine=transformers does not have the pooling {min(unknown)}", key="engine.model")
    return modes


def _dense(find: FindFile, path: str, about: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A Dense module: a linear layer, then an activation of torch. Raises `ConfigError` if it cannot be loaded."""
    named = str(about.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = getattr(torch.nn, named.rpartition(".")[2], None) if named.startswith("torch.nn.") else None
    plain = not about.get("use_residual") and about.get("module_input_name") in (None, "sentence_embedding")
    if activation is None or not plain:
        raise ConfigError(f"engine.model: {path} has a form that engine=transformers does not have", key="engine.model")
    try:
        safe = find(f"{path}/model.safetensors")
        weights = load_file(safe) if safe else torch.load(find(f"{path}/pytorch_model.bin"), weights_only=True)  # type: ignore[arg-type]
        weight, bias = weights["linear.weight"], weights.get("linear.bias")
    except Exception as error:  # a missing file, a missing tensor, an old pickle
        raise ConfigError(f"engine.model: {path} could not be loaded: {one_line(error)}", key="engine.model") from error
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return torch.nn.Sequential(layer, activation()).float().requires_grad_(False)
