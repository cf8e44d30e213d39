"""Loads a Hugging Face checkpoint: keywords, model, tokenizer, image processor, adapter."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from llguidance.hf import from_tokenizer

from engines.config import EngineConfig
from engines.errors import ConfigError
from engines.local.continuous_batching import default_settings, parse_settings
from engines.local.grammar import Grammars
from engines.local.vision import Vision, takes_images
from engines.text import check_kwargs, load_chat_template, one_line

_OWN_KWARGS = {"max_batch_size": int, "max_model_len": int, "chat_template": str, "chat_template_kwargs": dict}
_OWN_KWARGS |= {"continuous_batching": object}
_QUANTIZE_KWARGS = inspect.signature(transformers.BitsAndBytesConfig).parameters.keys() - {"kwargs"}
# Keywords that the config and the tokenizer need as well as the model.
_HUB_KWARGS = {"trust_remote_code", "code_revision", "cache_dir", "local_files_only", "token", "subfolder", "gguf_file"}
# The documented keywords of `from_pretrained`, which itself takes any name and fails late.
_MODEL_KWARGS = {"torch_dtype", "dtype", "device_map", "max_memory", "offload_folder", "offload_buffers", "variant"}
_MODEL_KWARGS |= {"attn_implementation", "quantization_config", "use_safetensors", "weights_only", "use_kernels"}


class TransformersModel:
    """A loaded checkpoint. The constructor raises `ConfigError` if the configuration cannot work."""

    # The types depend on the checkpoint.
    model: Any
    tokenizer: Any

    vision: Vision | None  # None for a model of text only, or if the processor cannot be loaded
    takes_images: bool  # by its architecture
    kwargs: dict[str, Any]  # the checked engine keywords
    continuous_batching: dict[str, Any] | None  # settings of transformers' continuous batching; None: not used
    vocab: int  # entries of the vocabulary
    context: int | None  # tokens of prompt and answer; None: not limited
    eos: frozenset[int]  # the tokens that end an answer
    grammars: Grammars  # matchers of `response_format`
    special: dict[str, int]  # added tokens by their text

    def __init__(self, config: EngineConfig) -> None:
        if not config.model:
            raise ConfigError("engine.model is needed: a checkpoint directory or a hub id")
        transformers.utils.logging.disable_progress_bar()
        source = _resolve("engine.model", config.model)
        hub = {name: value for name, value in config.kwargs.items() if name in _HUB_KWARGS}
        if config.revision:
            hub["revision"] = config.revision
        with _loading("engine.model", source):
            settings = transformers.AutoConfig.from_pretrained(source, **hub)
        self.takes_images = takes_images(settings)
        self.kwargs = self._check(config, settings)
        batching = parse_settings(self.kwargs.get("continuous_batching", False))
        self._load(source, hub)
        if config.adapter:
            self._merge_adapter(_resolve("engine.adapter", config.adapter))
        self.model.eval()
        if "continuous_batching" not in self.kwargs and not self.takes_images:
            batching = default_settings(self.model)
        if batching is not None and self.takes_images:
            raise ConfigError("engine.kwargs.continuous_batching is for models of text only")
        self.continuous_batching = batching
        self._read_vocabulary()
        self._choose_template(config.model)

    @staticmethod
    def _check(config: EngineConfig, settings: Any) -> dict[str, Any]:
        passed = {*_HUB_KWARGS, *_MODEL_KWARGS, *_QUANTIZE_KWARGS, *settings.to_dict(), *settings.attribute_map}
        types = {**dict.fromkeys(passed, object), **_OWN_KWARGS}
        return check_kwargs("transformers", config.kwargs, types, positive=("max_batch_size", "max_model_len"))

    def _load(self, source: str, hub: dict[str, Any]) -> None:
        """Loads weights, tokenizer and processor."""
        own = {*_OWN_KWARGS, *_QUANTIZE_KWARGS}
        options = hub | {name: value for name, value in self.kwargs.items() if name not in own}
        options.setdefault("dtype", options.pop("torch_dtype", "auto"))
        options.setdefault("device_map", "auto" if torch.cuda.is_available() else "cpu")
        quantize = {name: value for name, value in self.kwargs.items() if name in _QUANTIZE_KWARGS}
        quantized = quantize.get("load_in_4bit") or quantize.get("load_in_8bit")
        if not quantized and (detail := quantize.keys() - {"load_in_4bit", "load_in_8bit"}):
            raise ConfigError(f"engine.kwargs.{min(detail)} needs load_in_4bit or load_in_8bit beside it")
        with _loading("engine.model", source):
            if quantized:
                options["quantization_config"] = transformers.BitsAndBytesConfig(**quantize)
            auto = transformers.AutoModelForImageTextToText if self.takes_images else transformers.AutoModelForCausalLM
            self.model = auto.from_pretrained(source, **options)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(source, **hub)
        self.vision = _load_vision(source, hub) if self.takes_images else None

    def _merge_adapter(self, adapter: str) -> None:
        with _loading("engine.adapter", adapter):
            import peft

            adapted = peft.PeftModel.from_pretrained(self.model, adapter)
            # Merging saves two small matrix products per layer and step. Quantised weights would be rounded twice.
            self.model = adapted if getattr(self.model, "is_quantized", False) else adapted.merge_and_unload()

    def _read_vocabulary(self) -> None:
        settings = self.model.config.get_text_config()
        self.vocab = settings.vocab_size
        self.context = self.kwargs.get("max_model_len") or getattr(settings, "max_position_embeddings", None)
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
        self.eos = frozenset(t for t in [*ends, self.tokenizer.eos_token_id] if t is not None)
        size = max(self.vocab, len(self.tokenizer))
        self.grammars = Grammars(lambda: from_tokenizer(self.tokenizer, n_vocab=size, eos_token=sorted(self.eos)))
        # Decoded text leaves out special tokens, so a stop text that is such a token is compared by its id.
        self.special = self.tokenizer.get_added_vocab()

    def _choose_template(self, name: str) -> None:
        own = self.vision.processor.chat_template if self.vision else self.tokenizer.chat_template
        self.tokenizer.chat_template = load_chat_template(self.kwargs.get("chat_template")) or own
        if not self.tokenizer.chat_template:
            raise ConfigError(f"'{name}' has no chat template: give one in engine.kwargs.chat_template")


def _load_vision(source: str, hub: dict[str, Any]) -> Vision | None:
    """The image processor; None, with a warning, if it cannot be loaded. The model can answer text without it."""
    try:
        return Vision(source, hub)
    except Exception as error:  # usually a missing package
        warnings.warn(f"'{source}' answers text only, its processor cannot be loaded: {one_line(error)}", stacklevel=2)
        return None


def _resolve(key: str, name: str) -> str:
    """The path of a directory, or the hub id unchanged. Raises `ConfigError` for a path that does not exist.

    The hub would refuse such a path with an error that misleads.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ConfigError(f"{key}: there is no directory {path}")
    return name


@contextlib.contextmanager
def _loading(key: str, name: str) -> Iterator[None]:
    """Turns any exception of a library during loading into a `ConfigError` of one line."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"{key} '{name}' could not be loaded: {one_line(error)}") from error
