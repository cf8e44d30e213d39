"""The memory that a model takes, computed from its config.json or its GGUF metadata.

Weights are never read, and nothing heavy is imported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engines.config import EngineConfig
from engines.errors import ConfigError
from engines.local.checkpoint_files import (
    checkpoint_file,
    gguf_metadata,
    is_gguf,
    read_json,
    stored_numbers,
)
from engines.registry import kind_of

# One layer in this many has full attention, by model type, if the config does not say so.
_FULL_EVERY = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4}
# Model types whose feed-forward layers have two matrices; all others have three (with a gate).
_UNGATED = ("bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "nemotron", "opt", "phi", "starcoder2")


@dataclass(frozen=True, slots=True)
class Footprint:
    """A model's size. Values that its files do not contain are computed from its dimensions, without biases."""

    parameters: int
    heads: int
    kv_heads: int
    context: int  # tokens of a conversation, prompt and answer
    kv_bytes: float  # per token, in the layers that keep all tokens
    window_bytes: float = 0.0  # per token, in the layers that keep the last `window` tokens
    window: int = 0
    weight_bytes: float = 0.0
    weight_format: str = ""  # the number format of the weights, for people
    counted: bool = False  # `parameters` is counted in the files, not computed

    def sequence_bytes(self, tokens: int, tensor: int = 1) -> float:
        """The KV cache of one sequence on each of `tensor` GPUs. If there are more GPUs than KV heads, they hold copies."""
        return (self.kv_bytes * tokens + self.window_bytes * min(tokens, self.window)) / min(tensor, self.kv_heads)


def weights_bytes(parameters: float, bits: float) -> float:
    """The bytes of `parameters` numbers of `bits` bits each."""
    return parameters * bits / 8


def footprint(config: EngineConfig) -> Footprint | None:
    """The size of an engine's model. None for an engine that loads no model, or one in a format of its own.

    Raises `ConfigError` if the model's files cannot be found or read, or do not contain its dimensions.
    """
    kind = kind_of(config)
    if not kind.holds_model or kind.own_format:
        return None
    found = _of_gguf(config) if is_gguf(config) else _of_checkpoint(config)
    if found.context < 1:
        raise ConfigError(
            "engine.model: its config has no context length; set engine.kwargs.max_model_len", key="engine.model"
        )
    return found


# --- GGUF files ------------------------------------------------------------------------------------------------------


def _of_gguf(config: EngineConfig) -> Footprint:
    from engines.local.gguf import check_gguf_kwargs, context_length, requantize_to

    metadata, kwargs = gguf_metadata(config), config.kwargs

    def number(name: str, default: float = 0) -> float:
        value = json.loads(metadata.get(f"*.{name}") or str(default))
        return sum(value) / len(value) if isinstance(value, list) else value  # a list has one value per layer

    heads = int(number("attention.head_count", 1))
    kv_heads, width = number("attention.head_count_kv", heads), number("embedding_length") / max(heads, 1)
    trained, number_format = int(number("context_length")), requantize_to(config)
    stored = number_format or {"0": "f32"}.get(metadata.get("general.file_type") or "")
    cache = "f32" if stored == "f32" else "f16"  # as `LlamaModel.cache_type`
    # Layers with a sliding window count as full ones: the metadata does not say which layers have one.
    kv_bits = sum(
        number(f"attention.{name}_length", width) * _ggml_bits(kwargs.get(f"type_{name[0]}", cache))
        for name in ("key", "value")
    )
    if kind_of(config).gguf_only:
        context = context_length(check_gguf_kwargs(kwargs), trained)
    else:
        context = kwargs.get("max_model_len") or trained
    converted = weights_bytes(metadata.parameters, _ggml_bits(number_format))
    return Footprint(
        metadata.parameters,
        heads,
        max(1, math.ceil(kv_heads)),
        context,
        number("block_count") * kv_heads * kv_bits / 8,
        weight_bytes=converted if number_format else metadata.bytes,
        weight_format=number_format or f"{metadata.bytes * 8 / metadata.parameters:.1f} bits a parameter",
        counted=True,
    )


def _ggml_bits(number_format: Any) -> float:
    """Bits per number. Formats such as q4_k and q8_0 store about half a bit of scales per number in addition."""
    found = re.search(r"\d+", number_format) if isinstance(number_format, str) else None
    return int(found[0]) + (0.5 if "q" in number_format.lower() else 0) if found else 16


# --- Checkpoints -----------------------------------------------------------------------------------------------------


def _of_checkpoint(config: EngineConfig) -> Footprint:
    path = checkpoint_file(config, "config.json")
    given, kwargs = read_json(path), config.kwargs
    text = given.get("text_config")  # a model with image input has one
    shape, embeddings = _shape({**given, **(text if isinstance(text, dict) else {})}, path)
    stored = stored_numbers(path.parent, config)
    known = _dtype(config, given)
    dtype = known or (stored.most_common(1)[0][0] if stored else "16-bit numbers, it is assumed")
    packed = _quantised_bits(given.get("quantization_config"))
    bits = packed or _quantised_bits(kwargs) or _quantised_bits(kwargs.get("quantization_config"))
    counted = stored is not None and not packed  # one stored number holds several packed weights
    parameters = stored.total() if stored and counted else shape.parameters
    weights = weights_bytes(parameters, _bits(dtype))
    if packed and stored:
        weights = sum(weights_bytes(count, _bits(kind)) for kind, count in stored.items())
    elif bits:  # embeddings are not quantised
        weights = weights_bytes(parameters - embeddings, bits) + weights_bytes(embeddings, _bits(dtype))
    cache, limit = kwargs.get("kv_cache_dtype"), kwargs.get("max_model_len")
    kv_bytes = _bits(cache if isinstance(cache, str) and cache != "auto" else dtype) / 8
    return replace(
        shape,
        parameters=parameters,
        context=limit if isinstance(limit, int) and limit > 0 else shape.context,
        kv_bytes=shape.kv_bytes * kv_bytes,
        window_bytes=shape.window_bytes * kv_bytes,
        weight_bytes=weights,
        weight_format=f"{bits} bits" if bits else dtype,
        counted=counted,
    )


def _dtype(config: EngineConfig, given: Mapping[str, Any]) -> str | None:
    """The number format that the keywords or the checkpoint's config name."""
    kwargs = config.kwargs
    names = (kwargs.get("dtype"), kwargs.get("torch_dtype"), given.get("dtype"), given.get("torch_dtype"))
    dtype = next((name for name in names if isinstance(name, str) and name != "auto"), None)
    if kind_of(config).no_float32 and kwargs.get("dtype") in (None, "auto") and dtype in ("float32", "float"):
        return "bfloat16"  # vLLM converts float32 by default
    return dtype


def _bits(dtype: str) -> int:
    """Bits per number: `bfloat16`, `BF16`, `fp8_e4m3`, `half`, …"""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else {"float": 32, "BOOL": 8}.get(dtype, 16)


def _quantised_bits(about: Any) -> int | None:
    """Bits per weight, from a `quantization_config` or an engine's keywords; None if weights are not quantised."""
    if not isinstance(about, Mapping):
        return None
    groups = about.get("config_groups") or {}  # the layout of compressed-tensors
    widths = [about.get("bits"), *(group["weights"].get("num_bits") for group in groups.values() if group.get("weights"))]
    widths += [bits for bits in (4, 8) if about.get(f"load_in_{bits}bit")]
    method = about.get("quant_method") or about.get("quantization")
    if isinstance(method, str):  # fp8, mxfp4, …; awq, gptq and bitsandbytes usually have 4
        widths.append(8 if "8" in method else 4)
    return next((bits for bits in widths if isinstance(bits, int)), None)


# --- A transformer's dimensions --------------------------------------------------------------------------------------

Get = Callable[..., int]  # the first of the named fields of a config that is a whole number, else 0


def _shape(about: Mapping[str, Any], path: Path) -> tuple[Footprint, int]:
    """A transformer's size by its dimensions, and the number of its embedding parameters.

    `kv_bytes` and `window_bytes` of the result count numbers, not bytes.
    """

    def get(*names: str) -> int:
        return next((about[name] for name in names if isinstance(about.get(name), int)), 0)

    layers = get("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    hidden, heads = get("hidden_size", "n_embd", "d_model"), get("num_attention_heads", "n_head", "n_heads")
    if not (layers and hidden and heads):
        raise ConfigError(
            f"engine.model: {path} needs num_hidden_layers, hidden_size and num_attention_heads", key="engine.model"
        )
    attention, kv_heads, kv_numbers = _attention(get, hidden, heads)
    embeddings = get("vocab_size") * hidden * (1 if about.get("tie_word_embeddings", True) else 2)
    norms = hidden * (2 * layers + 1)
    body = layers * attention + _feed_forward(about, get, layers, hidden) + norms
    full, sliding = _window_layers(about, get, layers)
    context = get("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    size = Footprint(
        body + embeddings, heads, kv_heads, context, full * kv_numbers, sliding * kv_numbers, get("sliding_window")
    )
    return size, embeddings


def _attention(get: Get, hidden: int, heads: int) -> tuple[int, int, int]:
    """Of one layer: the parameters of its attention, its KV heads, and the numbers it caches per token."""
    kv_heads, width = get("num_key_value_heads", "num_kv_heads") or heads, get("head_dim") or hidden // heads
    latent = get("kv_lora_rank")
    if not latent:
        return 2 * hidden * width * (heads + kv_heads), kv_heads, 2 * kv_heads * width
    # DeepSeek's multi-head latent attention: one compressed vector for all heads.
    rope, key, value = get("qk_rope_head_dim"), get("qk_nope_head_dim"), get("v_head_dim")
    rank = get("q_lora_rank")
    query = (hidden + heads * (key + rope)) * rank if rank else hidden * heads * (key + rope)
    attention = query + hidden * (latent + rope) + heads * (latent * (key + value) + value * hidden)
    return attention, 1, latent + rope


def _feed_forward(about: Mapping[str, Any], get: Get, layers: int, hidden: int) -> int:
    """The parameters of the feed-forward parts of all layers, with all experts."""
    matrices = 2 if about.get("model_type") in _UNGATED else 3
    inner = get("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    dense, sparse, experts = layers, 0, get("num_local_experts", "num_experts", "n_routed_experts")
    if experts:
        each = get("moe_intermediate_size") or inner
        shared = get("n_shared_experts") * each or get("shared_expert_intermediate_size")
        sparse = matrices * hidden * (experts * each + shared) + experts * hidden
        dense = get("first_k_dense_replace") or len(about.get("mlp_only_layers") or ())
    return dense * matrices * hidden * inner + (layers - dense) * sparse


def _window_layers(about: Mapping[str, Any], get: Get, layers: int) -> tuple[int, int]:
    """The number of layers with full attention, and with a sliding window.

    Layers of other kinds, such as linear attention, have a small state of fixed size and are not counted.
    """
    kinds = about.get("layer_types")
    if isinstance(kinds, list):
        return kinds.count("full_attention"), kinds.count("sliding_attention")
    if get("sliding_window") and about.get("use_sliding_window", True):
        every = get("sliding_window_pattern") or _FULL_EVERY.get(str(about.get("model_type")), 0)
        full = layers // every if every else 0
        return full, layers - full
    return layers, 0
