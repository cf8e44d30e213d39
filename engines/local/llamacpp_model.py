"""A GGUF model in memory: llama.cpp's model, its context with the KV cache, and the LoRA adapter."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import Any

from engines.config import EngineConfig
from engines.errors import ConfigError
from engines.local.cores import physical_cores
from engines.local.gguf import CONTEXT_KWARGS, MODEL_KWARGS, Tokenizer, context_length, metadata_value, requantize_to
from engines.local.gguf_files import requantized, resolve_model
from engines.local.gguf_tasks import GGUFHead, check_pooling, gguf_head
from engines.local.grammar import Grammars
from engines.local.llama_library import L, lltokenizer_from_vocab, log
from engines.tasks import CHAT
from engines.text import counted

# The default of `n_seq_max`. Each sequence takes `n_ctx` tokens of cache, and a CPU gains little from more sequences.
DEFAULT_SEQUENCES = 16
# The default of `n_seq_max` shrinks until the KV cache fits into this. A number that the user sets is not changed.
CACHE_BUDGET_BYTES = 4 << 30


class LlamaModel:
    """A loaded model. `kwargs` are checked engine keywords. Raises `ConfigError` if the configuration cannot work.

    Only one thread may use `context` and `memory`; the tokenizer may be used from any thread.
    """

    # llama.cpp's objects are pointers without a type.
    handle: Any = None
    context: Any = None
    adapter: Any = None
    vocab: Any
    memory: Any  # the KV cache of all sequences

    head: GGUFHead
    lora_scale: float = 1.0
    tokenizer: Tokenizer
    n_vocab: int
    n_ctx: int  # tokens of one conversation
    n_seq: int  # conversations that are decoded at once
    n_batch: int  # tokens of one llama_decode
    n_ubatch: int  # tokens that llama.cpp computes at once
    end_tokens: frozenset[int]  # the tokens that end an answer
    grammars: Grammars  # matchers of `response_format`
    padding_token: int  # for padding rows; see Scheduler
    cache_type: int  # of ggml: the default number format of KV caches
    unified: bool  # all sequences share one KV cache
    reuses_prefixes: bool  # a sequence's cache can be cut back and copied

    def __init__(self, config: EngineConfig, kwargs: dict[str, Any]) -> None:
        log.install(kwargs.get("verbose", False))
        L.llama_backend_init()
        path = resolve_model(config, kwargs.get("filename"))
        number_format = requantize_to(config)
        if number_format is not None:
            path = requantized(path, number_format)
        try:
            self._load_model(path, kwargs)
            self.head = gguf_head(self.metadata, kwargs, L.llama_model_n_cls_out(self.handle))
            check_pooling(self.head, config.model)
            self.n_ctx = context_length(kwargs, L.llama_model_n_ctx_train(self.handle))
            if config.adapter:
                self._load_adapter(Path(config.adapter).expanduser(), kwargs.get("lora_scale", 1.0))
            if CHAT in self.head.tasks:
                self._load_context(path, kwargs, config.max_concurrency)
                self.apply_adapter(self.context)
        except BaseException:
            self.free()
            raise

    def free(self) -> None:
        """Frees the memory. Can be called twice."""
        if self.context:
            L.llama_free(self.context)
        if self.adapter:
            L.llama_adapter_lora_free(self.adapter)
        if self.handle:
            L.llama_model_free(self.handle)
        self.context = self.adapter = self.handle = None

    def _load_model(self, path: Path, kwargs: dict[str, Any]) -> None:
        params = L.llama_model_default_params()
        params.n_gpu_layers = 0  # the default of llama-cpp-python
        # A build with GGML_NATIVE crashes in its first llama_decode on virtual machines with AMX. ggml reaches its AMX
        # kernels through the extra buffer types.
        if re.search(rb"AMX_INT8 = 1", L.llama_print_system_info()):
            params.use_extra_bufts = False
        for name in MODEL_KWARGS.keys() & kwargs.keys() - {"tensor_split", "use_mmap", "use_mlock"}:
            setattr(params, name, kwargs[name])
        mmap, mlock = kwargs.get("use_mmap", True), kwargs.get("use_mlock", False)
        modes = {(True, True): "MMAP_MLOCK", (True, False): "MMAP", (False, True): "MLOCK", (False, False): "NONE"}
        params.load_mode = getattr(L, f"LLAMA_LOAD_MODE_{modes[mmap, mlock]}")
        if "tensor_split" in kwargs:
            try:
                split = (ctypes.c_float * L.llama_max_devices())(*kwargs["tensor_split"])
            except (TypeError, IndexError):
                raise ConfigError(
                    "engine.kwargs.tensor_split must list one number per device", key="engine.kwargs"
                ) from None
            params.tensor_split = split
        self.handle = L.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            raise ConfigError(f"engine.model: {path} cannot be loaded{log.reason()}", key="engine.model")
        # Weights in float32 are wanted exact, so nothing is rounded to half precision on the way.
        exact = L.llama_model_ftype(self.handle) & ~L.LLAMA_FTYPE_GUESSED == L.LLAMA_FTYPE_ALL_F32
        self.cache_type = L.GGML_TYPE_F32 if exact else L.GGML_TYPE_F16
        self.tokenizer = Tokenizer(self.handle)
        self.vocab = self.tokenizer.vocab
        self.n_vocab = L.llama_vocab_n_tokens(self.vocab)
        self.padding_token = max(0, L.llama_vocab_bos(self.vocab))
        self.end_tokens = frozenset(t for t in range(self.n_vocab) if L.llama_vocab_is_eog(self.vocab, t))
        self.grammars = Grammars(lambda: lltokenizer_from_vocab(self.vocab, eos_token=sorted(self.end_tokens)))

    def _load_context(self, path: Path, kwargs: dict[str, Any], max_concurrency: int | None) -> None:
        params = self.context_params(kwargs)
        wanted = kwargs.get("n_seq_max") or max_concurrency or self._default_sequences()
        self.n_seq = min(wanted, L.llama_max_parallel_sequences())
        params.n_seq_max = self.n_seq
        params.n_ctx = self.n_ctx * self.n_seq
        params.n_batch = self.n_batch = max(kwargs.get("n_batch", 512), self.n_seq)  # the next token of every sequence fits
        params.n_ubatch = self.n_ubatch = min(kwargs.get("n_ubatch", 512), self.n_batch)
        self.unified = bool(params.kv_unified)
        self.context = L.llama_init_from_model(self.handle, params)
        if not self.context:
            size = f"{counted(self.n_seq, 'sequence')} of {self.n_ctx} tokens"
            raise ConfigError(
                f"engine.kwargs: no memory for {size} of {path}; lower n_ctx or n_seq_max{log.reason()}",
                key="engine.kwargs",
            )
        self.memory = L.llama_get_memory(self.context)
        # A recurrent state covers all tokens at once, and a sliding window has dropped the old tokens: neither can be
        # cut back to a prefix.
        windowed = L.llama_model_n_swa(self.handle) > 0 and not params.swa_full
        recurrent = L.llama_model_is_recurrent(self.handle) or L.llama_model_is_hybrid(self.handle)
        self.reuses_prefixes = not (windowed or recurrent)

    def context_params(self, kwargs: dict[str, Any]) -> Any:
        """llama.cpp's context parameters, except for the sizes."""
        params = L.llama_context_default_params()
        params.n_threads = params.n_threads_batch = physical_cores()
        params.no_perf = True
        # One cache per sequence: with a unified cache, attention of each token runs over the tokens of all sequences.
        params.kv_unified = False
        params.type_k, params.type_v = (kwargs.get(name, self.cache_type) for name in ("type_k", "type_v"))
        # Flash attention rounds float32 to half precision. On a CPU it computes 64 tokens and more differently from fewer,
        # so an answer would depend on the prefixes that a cache has. A quantised V needs it.
        on_cpu = kwargs.get("n_gpu_layers", 0) == 0
        if params.type_v == L.GGML_TYPE_F32 or (on_cpu and params.type_v == L.GGML_TYPE_F16):
            params.flash_attn_type = L.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if "flash_attn" in kwargs:
            params.flash_attn_type = int(kwargs["flash_attn"])
        if kwargs.get("low_vram"):
            params.offload_kqv = False  # the effect of `low_vram` before llama.cpp removed it
        for name in CONTEXT_KWARGS.keys() & kwargs.keys() - {"flash_attn", "n_ctx", "n_seq_max", "n_batch", "n_ubatch"}:
            setattr(params, name, kwargs[name])
        return params

    def _default_sequences(self) -> int:
        """As many sequences as `CACHE_BUDGET_BYTES` holds, at least 1, at most `DEFAULT_SEQUENCES`."""
        heads, width = L.llama_model_n_head(self.handle), L.llama_model_n_embd(self.handle)
        kv_heads, layers = L.llama_model_n_head_kv(self.handle), L.llama_model_n_layer(self.handle)
        number_bytes = 4 if self.cache_type == L.GGML_TYPE_F32 else 2
        token_bytes = 2 * number_bytes * layers * width * kv_heads // max(heads, 1)  # K and V
        affordable = CACHE_BUDGET_BYTES // max(1, token_bytes * self.n_ctx)
        return min(DEFAULT_SEQUENCES, max(1, affordable))

    def _load_adapter(self, path: Path, scale: float) -> None:
        if not path.is_file():
            raise ConfigError(f"engine.adapter: there is no file {path}", key="engine.adapter")
        self.adapter = L.llama_adapter_lora_init(self.handle, os.fsencode(path))
        if not self.adapter:
            raise ConfigError(
                f"engine.adapter: {path} is not a LoRA adapter (GGUF) for this model{log.reason()}", key="engine.adapter"
            )
        self.lora_scale = scale

    def apply_adapter(self, context: Any) -> None:
        """Makes a context use the adapter, if there is one. Raises `ConfigError`."""
        if not self.adapter:
            return
        adapters = (L.llama_adapter_lora_p_ctypes * 1)(self.adapter)
        if L.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(self.lora_scale)) != 0:
            raise ConfigError(f"engine.adapter cannot be applied to this model{log.reason()}", key="engine.adapter")

    def metadata(self, name: str) -> str | None:
        """A value of the file's metadata; see `GGUFMetadata.get`."""
        return metadata_value(self.handle, name)
