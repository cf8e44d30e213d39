"""Loads a Hugging Face checkpoint: keywords, model, tokenizer, image processor, adapter."""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from llguidance.hf import from_tokenizer

from engines.config import EngineConfig
from engines.errors import ConfigError, no_such
from engines.local import transformers_attention
from engines.local.checkpoint_tasks import no_pooling, tasks_of, with_pooling
from engines.local.continuous_batching import default_settings, parse_settings
from engines.local.grammar import Grammars
from engines.local.transformers_pooling import FindFile, Pooling, declared_pooling, given_pooling
from engines.local.vision import Vision, takes_images
from engines.tasks import CHAT
from engines.text import load_chat_template, one_line
from engines.validation import check_kwargs

_OWN_KWARGS = {"max_batch_size": int, "max_model_len": int, "chat_template": str, "chat_template_kwargs": dict}
_OWN_KWARGS |= {"continuous_batching": object, "pooling": str, "normalize": bool, "prompt_name": str, "truncate": bool}
_QUANTIZE_KWARGS = inspect.signature(transformers.BitsAndBytesConfig).parameters.keys() - {"kwargs"}
# Keywords that the config and the tokenizer need as well as the model.
_HUB_KWARGS = {"trust_remote_code", "code_revision", "cache_dir", "local_files_only", "token", "subfolder", "gguf_file"}
# The documented keywords of `from_pretrained`, which itself takes any name and fails late.
_MODEL_KWARGS = {"torch_dtype", "dtype", "device_map", "max_memory", "offload_folder", "offload_buffers", "variant"}
_MODEL_KWARGS |= {"attn_implementation", "quantization_config", "use_safetensors", "weights_only", "use_kernels"}
# Model types whose first positions stand for padding.
_OFFSET_POSITIONS = {"camembert", "data2vec-text", "esm", "longformer", "mpnet", "roberta", "xlm-roberta", "xmod"}
_NO_LIMIT = 10**9  # a tokenizer without a limit has a larger number


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
    text_limit: int | None  # tokens of a text that a task evaluates
    eos: frozenset[int]  # the tokens that end an answer
    grammars: Grammars  # matchers of `response_format`
    special: dict[str, int]  # added tokens by their text
    tasks: frozenset[str]  # that the checkpoint has
    pooling: Pooling | None  # of a checkpoint that gives embeddings
    find: FindFile  # finds a file of the checkpoint

    def __init__(self, config: EngineConfig) -> None:
        if not config.model:
            raise ConfigError("engine.model is needed: a checkpoint directory or a hub id", key="engine.model")
        transformers.utils.logging.disable_progress_bar()
        _obey_thread_limit()
        source = _resolve("engine.model", config.model)
        hub = {name: value for name, value in config.kwargs.items() if name in _HUB_KWARGS}
        if config.revision:
            hub["revision"] = config.revision
        self.find = _finder(source, hub)
        with _loading("engine.model", source):
            declared = declared_pooling(self.find)
            if declared and declared.folder:
                hub.setdefault("subfolder", declared.folder)
            settings = transformers.AutoConfig.from_pretrained(source, **hub)
        self.kwargs = self._check(config, settings)
        self.tasks = with_pooling(tasks_of(settings.to_dict(), declared is not None), config.kwargs)
        self.pooling = self._choose_pooling(config, declared)
        self.takes_images = CHAT in self.tasks and takes_images(settings)
        batching = parse_settings(self.kwargs.get("continuous_batching", False))
        self._load(source, hub, config.media_max_pixels)
        if config.adapter:
            self._merge_adapter(_resolve("engine.adapter", config.adapter))
        self.model.eval()
        if self.pooling:
            self.pooling.to(self.model.device)
        if "continuous_batching" not in self.kwargs and CHAT in self.tasks and not self.takes_images:
            batching = default_settings(self.model)
        if batching is not None and self.takes_images:
            raise ConfigError("engine.kwargs.continuous_batching is for models of text only", key="engine.kwargs")
        self.continuous_batching = batching
        self._read_vocabulary()
        self._choose_template()

    @staticmethod
    def _check(config: EngineConfig, settings: Any) -> dict[str, Any]:
        passed = {*_HUB_KWARGS, *_MODEL_KWARGS, *_QUANTIZE_KWARGS, *settings.to_dict(), *settings.attribute_map}
        types = {**dict.fromkeys(passed, object), **_OWN_KWARGS}
        return check_kwargs("transformers", config.kwargs, types, positive=("max_batch_size", "max_model_len"))

    def _load(self, source: str, hub: dict[str, Any], max_pixels: int) -> None:
        """Loads weights, tokenizer and processor."""
        own = {*_OWN_KWARGS, *_QUANTIZE_KWARGS}
        options = hub | {name: value for name, value in self.kwargs.items() if name not in own}
        transformers_attention.register()
        options.setdefault("dtype", options.pop("torch_dtype", "auto"))
        options.setdefault("device_map", "auto" if torch.cuda.is_available() else "cpu")
        quantize = {name: value for name, value in self.kwargs.items() if name in _QUANTIZE_KWARGS}
        quantized = quantize.get("load_in_4bit") or quantize.get("load_in_8bit")
        if not quantized and (detail := quantize.keys() - {"load_in_4bit", "load_in_8bit"}):
            raise ConfigError(
                f"engine.kwargs.{min(detail)} needs load_in_4bit or load_in_8bit beside it", key="engine.kwargs"
            )
        with _loading("engine.model", source):
            if quantized:
                options["quantization_config"] = transformers.BitsAndBytesConfig(**quantize)
            self.model = self._auto_class(source, hub).from_pretrained(source, **options)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(source, **hub)
        self.vision = _load_vision(source, hub, max_pixels) if self.takes_images else None

    def _auto_class(self, source: str, hub: dict[str, Any]) -> Any:
        """The class of transformers that loads the checkpoint with the head that its tasks need."""
        if self.takes_images:
            return transformers.AutoModelForImageTextToText
        if CHAT in self.tasks:
            return transformers.AutoModelForCausalLM
        if "classify" in self.tasks:
            return transformers.AutoModelForSequenceClassification
        if transformers.AutoConfig.from_pretrained(source, **hub).is_encoder_decoder:
            return transformers.AutoModelForTextEncoding
        return transformers.AutoModel

    def _choose_pooling(self, config: EngineConfig, declared: Pooling | None) -> Pooling | None:
        """The pooling of the keywords, else the one that the checkpoint declares; None if it gives no embeddings."""
        if "embed" not in self.tasks:
            return None
        if "pooling" in self.kwargs:
            chosen = given_pooling(self.kwargs["pooling"], self.kwargs.get("normalize", True))
            if declared:
                names = ("declared", "folder", "max_length", "lower_case", "prompts", "prompt_name", "include_prompt")
                chosen = replace(chosen, **{name: getattr(declared, name) for name in names})
        elif declared:
            chosen = declared
        else:
            raise ConfigError(no_pooling(config.model), key="engine.kwargs")
        if (name := self.kwargs.get("prompt_name")) is not None:
            if name not in chosen.prompts:
                raise ConfigError(
                    f"engine.kwargs.prompt_name: {no_such('prompt', name, chosen.prompts)}", key="engine.kwargs"
                )
            chosen.prompt_name = name
        return chosen

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
        self.text_limit = self.context if CHAT in self.tasks else self._text_limit(settings)
        ends = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
        self.eos = frozenset(t for t in [*ends, self.tokenizer.eos_token_id] if t is not None)
        size = max(self.vocab, len(self.tokenizer))
        self.grammars = Grammars(lambda: from_tokenizer(self.tokenizer, n_vocab=size, eos_token=sorted(self.eos)))
        # Decoded text leaves out special tokens, so a stop text that is such a token is compared by its id.
        self.special = self.tokenizer.get_added_vocab()

    def _text_limit(self, settings: Any) -> int | None:
        """The longest text of an encoder or a classifier, in tokens."""
        positions = self.context
        if positions and settings.model_type in _OFFSET_POSITIONS and "max_model_len" not in self.kwargs:
            positions -= (settings.pad_token_id or 0) + 1
        limits = (positions, self.tokenizer.model_max_length, self.pooling and self.pooling.max_length)
        known = [limit for limit in limits if limit and limit < _NO_LIMIT]
        return min(known, default=None)

    def _choose_template(self) -> None:
        own = self.vision.processor.chat_template if self.vision else self.tokenizer.chat_template
        self.tokenizer.chat_template = load_chat_template(self.kwargs.get("chat_template")) or own


def _obey_thread_limit() -> None:
    """Makes PyTorch use at most OMP_THREAD_LIMIT threads. With more, oneDNN leaves parts of a bfloat16 product empty."""
    limit = os.environ.get("OMP_THREAD_LIMIT", "")
    if limit.isdigit() and 0 < int(limit) < torch.get_num_threads():
        torch.set_num_threads(int(limit))


def _load_vision(source: str, hub: dict[str, Any], max_pixels: int) -> Vision | None:
    """The image processor; None, with a warning, if it cannot be loaded. The model can answer text without it."""
    try:
        return Vision(source, hub, max_pixels)
    except Exception as error:  # usually a missing package
        warnings.warn(f"'{source}' answers text only, its processor cannot be loaded: {one_line(error)}", stacklevel=2)
        return None


def _finder(source: str, hub: dict[str, Any]) -> FindFile:
    """A function that finds a file of the checkpoint, on the hub too; it returns None for a file that is not there."""
    names = ("revision", "cache_dir", "token", "local_files_only")
    options = {name: hub[name] for name in names if name in hub}

    def find(name: str) -> Path | None:
        missing_is_none = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        path = transformers.utils.cached_file(source, name, **options, **missing_is_none)
        return Path(path) if path else None

    return find


def _resolve(key: str, name: str) -> str:
    """The path of a directory, or the hub id unchanged. Raises `ConfigError` for a path that does not exist.

    The hub would refuse such a path with an error that misleads.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ConfigError(f"{key}: there is no directory {path}", key=key)
    return name


@contextlib.contextmanager
def _loading(key: str, name: str) -> Iterator[None]:
    """Turns any exception of a library during loading into a `ConfigError` of one line."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"{key} '{name}' could not be loaded: {one_line(error)}", key=key) from error
