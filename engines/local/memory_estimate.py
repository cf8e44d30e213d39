"""What a model takes in memory, from its config.json or GGUF header, and how long prompts are in its tokens.

No weights are read and nothing heavy is imported. A checkpoint may be a directory or a hub id.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engines.config import EngineConfig
from engines.errors import ConfigError
from engines.local.chat_template import ChatTemplate
from engines.params import GenerationParams
from engines.registry import kind_of
from engines.rendering import render_messages
from engines.text import one_line
from engines.types import Message, Request

# Their feed-forward layers have two matrices; everybody else's have three.
# One layer in so many sees everything, where the config does not say so.
_FULL_EVERY = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4}
_UNGATED = ("bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "nemotron", "opt", "phi", "starcoder2")


@dataclass(frozen=True, slots=True)
class Footprint:
    """A model's size. What its own files do not tell is computed from its dimensions, and leaves biases out."""

    parameters: int
    heads: int
    kv_heads: int
    context: int  # tokens of a conversation, prompt and answer
    kv_bytes: float  # of each token, in the layers that keep all of them
    window_bytes: float = 0.0  # of each token, in the layers that keep the last `window`
    window: int = 0
    weight_bytes: float = 0.0
    numbers: str = ""  # the format of the weights
    counted: bool = False  # the parameters, in the files

    def sequence_bytes(self, tokens: int, tensor: int = 1) -> float:
        """The KV cache of one sequence on each of `tensor` GPUs; more GPUs than heads hold copies."""
        return (self.kv_bytes * tokens + self.window_bytes * min(tokens, self.window)) / min(tensor, self.kv_heads)


def weights_bytes(parameters: float, bits: float) -> float:
    return parameters * bits / 8


def footprint(config: EngineConfig) -> Footprint | None:
    """None for an engine that holds no model here. Raises `ConfigError` where the model cannot be looked at."""
    if not holds_model(config):
        return None
    found = _of_gguf(config) if _is_gguf(config) else _of_checkpoint(config)
    if found.context < 1:
        raise ConfigError("engine.model: its config tells no context length; engine.kwargs.max_model_len does")
    return found


@dataclass(frozen=True, slots=True)
class Prompts:
    """Conversations as a model gets them. Both raise `EngineError` where the chat template refuses one."""

    template: ChatTemplate
    tokenize: Callable[[str], list[int]]

    def text(self, messages: list[Message], params: GenerationParams) -> str:
        tools = params.tools if params.tool_choice != "none" else None
        return self.template.render(messages, tools, params.reasoning_effort)

    def render_request(self, request: Request) -> str:
        """The request as text, for people: the prompt that the model gets, and its parameters."""
        return render_messages(request, self.text(request.messages, request.generation))

    def count(self, messages: list[Message], params: GenerationParams) -> int:
        return len(self.tokenize(self.text(messages, params)))


def prompts(config: EngineConfig) -> Prompts | None:
    """As the engine will make them; None where the tokenizer or the template is not at hand."""
    if not holds_model(config):
        return None
    if _is_gguf(config):
        words = _gguf_metadata(config).vocabulary
        tokenize, own, bos, eos = words.tokenize, words.template(), words.special("bos"), words.special("eos")
    else:
        path = _file(config, "tokenizer.json", needed=False)
        own, bos, eos = _template(config)
        if path is None or not (own or config.kwargs.get("chat_template")):
            return None
        try:
            from tokenizers import Tokenizer
        except ImportError:
            return None
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()

        def tokenize(text: str) -> list[int]:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
            return ids

    return Prompts(ChatTemplate(config.kwargs, own, bos, eos), tokenize)


def holds_model(config: EngineConfig) -> bool:
    return kind_of(config).holds_model


def _is_gguf(config: EngineConfig) -> bool:
    return kind_of(config).gguf_only or str(config.model).endswith(".gguf")


def _gguf_metadata(config: EngineConfig) -> Any:
    from engines.local.gguf import GGUFMetadata, resolve_model

    return GGUFMetadata(resolve_model(config, config.kwargs.get("filename")))


def _of_gguf(config: EngineConfig) -> Footprint:
    from engines.local.gguf import check_gguf_kwargs, context_of, requantize_to

    metadata, kwargs = _gguf_metadata(config), config.kwargs

    def number(name: str, default: float = 0) -> float:
        value = json.loads(metadata.get(f"*.{name}") or str(default))
        return sum(value) / len(value) if isinstance(value, list) else value  # a list has one for each layer

    heads = int(number("attention.head_count", 1))
    kv_heads, width = number("attention.head_count_kv", heads), number("embedding_length") / max(heads, 1)
    # Layers with a sliding window are taken for full ones: the header does not say which they are.
    kv_bits = sum(
        number(f"attention.{name}_length", width) * _ggml_bits(kwargs.get(f"type_{name[0]}")) for name in ("key", "value")
    )
    trained, kind = int(number("context_length")), requantize_to(config)
    own = kind_of(config).gguf_only  # vLLM takes GGUF files too
    return Footprint(
        metadata.parameters,
        heads,
        max(1, math.ceil(kv_heads)),
        context_of(check_gguf_kwargs(kwargs), trained) if own else kwargs.get("max_model_len") or trained,
        number("block_count") * kv_heads * kv_bits / 8,
        weight_bytes=weights_bytes(metadata.parameters, _ggml_bits(kind)) if kind else metadata.bytes,
        numbers=kind or f"{metadata.bytes * 8 / metadata.parameters:.1f} bits a parameter",
        counted=True,
    )


def _ggml_bits(kind: Any) -> float:
    """Bits of a number: formats like q4_k and q8_0 come with half a bit or so of scales."""
    found = re.search(r"\d+", kind) if isinstance(kind, str) else None
    return int(found[0]) + (0.5 if "q" in kind.lower() else 0) if found else 16


def _of_checkpoint(config: EngineConfig) -> Footprint:
    path = _file(config, "config.json")
    assert path is not None
    given, kwargs = _json(path), config.kwargs
    text = given.get("text_config")  # of a model that sees, too
    shape, embeddings = _shape({**given, **(text if isinstance(text, dict) else {})}, path)
    stored = _stored(path.parent, config)
    names = (kwargs.get("dtype"), kwargs.get("torch_dtype"), given.get("dtype"), given.get("torch_dtype"))
    dtype = next((name for name in names if isinstance(name, str) and name != "auto"), None)
    if kind_of(config).no_float32 and kwargs.get("dtype") in (None, "auto") and dtype in ("float32", "float"):
        dtype = "bfloat16"  # what vLLM makes of it
    dtype = dtype or (stored.most_common(1)[0][0] if stored else "16-bit numbers, it is assumed")
    packed = _quantised(given.get("quantization_config"))
    bits = packed or _quantised(kwargs) or _quantised(kwargs.get("quantization_config"))
    counted = stored is not None and not packed  # packed weights share a stored number
    parameters = stored.total() if stored and counted else shape.parameters
    weights = weights_bytes(parameters, _bits(dtype))
    if packed and stored:
        weights = sum(weights_bytes(count, _bits(kind)) for kind, count in stored.items())
    elif bits:  # embeddings stay as they are
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
        numbers=f"{bits} bits" if bits else dtype,
        counted=counted,
    )


def _bits(dtype: str) -> int:
    """Bits of a number: `bfloat16`, `BF16`, `fp8_e4m3`, `half`, …"""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else {"float": 32, "BOOL": 8}.get(dtype, 16)


def _quantised(about: Any) -> int | None:
    """Bits of a weight, from a `quantization_config` or an engine's keywords; None where they are plain."""
    if not isinstance(about, Mapping):
        return None
    groups = about.get("config_groups") or {}  # compressed-tensors' way
    widths = [about.get("bits"), *(group["weights"].get("num_bits") for group in groups.values() if group.get("weights"))]
    widths += [bits for bits in (4, 8) if about.get(f"load_in_{bits}bit")]
    method = about.get("quant_method") or about.get("quantization")
    if isinstance(method, str):  # fp8, mxfp4, …; awq, gptq and bitsandbytes mostly have 4
        widths.append(8 if "8" in method else 4)
    return next((bits for bits in widths if isinstance(bits, int)), None)


def _shape(about: Mapping[str, Any], path: Path) -> tuple[Footprint, int]:
    """A transformer's size by its dimensions, with its KV cache in numbers, not bytes; and how much are embeddings."""

    def get(*names: str) -> int:
        return next((about[name] for name in names if isinstance(about.get(name), int)), 0)

    layers = get("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    hidden, heads = get("hidden_size", "n_embd", "d_model"), get("num_attention_heads", "n_head", "n_heads")
    if not (layers and hidden and heads):
        raise ConfigError(f"engine.model: {path} does not tell num_hidden_layers, hidden_size and num_attention_heads")
    kv_heads, width = get("num_key_value_heads", "num_kv_heads") or heads, get("head_dim") or hidden // heads
    attention, kv_numbers = 2 * hidden * width * (heads + kv_heads), 2 * kv_heads * width
    if latent := get("kv_lora_rank"):  # DeepSeek's: one compressed vector for all heads
        rope, key, value = get("qk_rope_head_dim"), get("qk_nope_head_dim"), get("v_head_dim")
        into = get("q_lora_rank")
        query = (hidden + heads * (key + rope)) * into if into else hidden * heads * (key + rope)
        attention = query + hidden * (latent + rope) + heads * (latent * (key + value) + value * hidden)
        kv_heads, kv_numbers = 1, latent + rope

    matrices = 2 if about.get("model_type") in _UNGATED else 3
    inner = get("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    dense, sparse, experts = layers, 0, get("num_local_experts", "num_experts", "n_routed_experts")
    if experts:
        each = get("moe_intermediate_size") or inner
        shared = get("n_shared_experts") * each or get("shared_expert_intermediate_size")
        sparse = matrices * hidden * (experts * each + shared) + experts * hidden
        dense = get("first_k_dense_replace") or len(about.get("mlp_only_layers") or ())
    embeddings = get("vocab_size") * hidden * (1 if about.get("tie_word_embeddings", True) else 2)
    norms = hidden * (2 * layers + 1)
    body = layers * attention + dense * matrices * hidden * inner + (layers - dense) * sparse + norms

    window, kinds, full, sliding = get("sliding_window"), about.get("layer_types"), layers, 0
    if isinstance(kinds, list):  # others, such as linear attention, have a state of a fixed, small size
        full, sliding = kinds.count("full_attention"), kinds.count("sliding_attention")
    elif window and about.get("use_sliding_window", True):
        every = get("sliding_window_pattern") or _FULL_EVERY.get(str(about.get("model_type")), 0)
        full = layers // every if every else 0
        sliding = layers - full
    context = get("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    size = Footprint(body + embeddings, heads, kv_heads, context, full * kv_numbers, sliding * kv_numbers, window)
    return size, embeddings


# --- a checkpoint's files --------------------------------------------------------------------------------------------


def _file(config: EngineConfig, name: str, needed: bool = True) -> Path | None:
    """A file of the checkpoint, fetched where it is on the hub. Raises `ConfigError` where it is needed and not there."""
    if not config.model:
        raise ConfigError("engine.model is needed: a checkpoint directory or a hub id")
    path = Path(config.model).expanduser() / name
    if path.is_file():
        return path
    try:
        if path.parent.is_dir():
            raise ConfigError(f"engine.model: {path.parent} has no {name}")
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", config.model):
            raise ConfigError(f"engine.model: there is no directory {path.parent}")
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(config.model, name, revision=config.revision))
    except ImportError:
        raise ConfigError(f"engine.model: {config.model} is on the hub: run pip install huggingface_hub") from None
    except Exception as error:  # whatever the hub's client raises: no network, no such repository, gated, …
        if not needed:
            return None
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"engine.model: {config.model} cannot be had from the hub: {one_line(error)}") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"engine.model: {path} cannot be read: {one_line(error)}") from None


def _template(config: EngineConfig) -> tuple[str | None, str, str]:
    """The chat template, and what it calls the first and the last token."""
    path = _file(config, "tokenizer_config.json", needed=False)
    about = _json(path) if path else {}
    own = about.get("chat_template")
    if isinstance(own, list):  # several by name
        own = {each["name"]: each["template"] for each in own}.get("default")
    if path := _file(config, "chat_template.jinja", needed=False):
        own = path.read_text(encoding="utf-8")
    ends = (about.get("bos_token") or "", about.get("eos_token") or "")
    bos, eos = (end["content"] if isinstance(end, dict) else end for end in ends)
    return own, bos, eos


def _stored(folder: Path, config: EngineConfig) -> Counter[str] | None:
    """How many numbers of each format the weights' files hold, by their headers; None where these are not to be had."""
    index = folder / "model.safetensors.index.json"
    named = set(_json(index).get("weight_map", {}).values()) if index.is_file() else ()
    files = [folder / name for name in named] or sorted(folder.glob("model*.safetensors"))
    counts: Counter[str] = Counter()
    try:
        if (not files or not all(file.is_file() for file in files)) and folder != Path(str(config.model)).expanduser():
            from huggingface_hub import get_safetensors_metadata

            # Reads the files' first bytes only.
            return Counter(get_safetensors_metadata(str(config.model), revision=config.revision).parameter_count)
        for file in files:
            with file.open("rb") as stream:
                metadata = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            metadata.pop("__metadata__", None)
            for tensor in metadata.values():
                counts[tensor["dtype"]] += math.prod(tensor["shape"])
    except Exception:  # no network, no such file, a pointer of Git LFS, …: the dimensions tell as well, nearly
        return None
    return counts or None
