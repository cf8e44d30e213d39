"""The part of an engine's configuration that shapes answers. It is part of the key of every request.

A local file counts with the digest of its content, not with its path. The address of the user's own server does not count.
Secrets, concurrency, retries and keywords that only change the speed do not count either.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from engines.config import EngineConfig
from engines.file_digest import FileDigest, model_digest
from engines.registry import EngineKind, kind_of


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The keywords that shape answers, as version 1 of the keys had them. Do not change: keys of existing ledgers depend on it.
_VERSION_1 = _words("""
    chat_template chat_template_kwargs default_chat_template_kwargs filename requantize lora_scale rope_freq_base
    rope_freq_scale rope_scaling_type bnb_4bit_quant_type bnb_4bit_compute_dtype seed dtype torch_dtype load_in_4bit
    load_in_8bit quantization quantization_config kv_cache_dtype hf_overrides tokenizer generation_config
    override_generation_config reasoning_parser tool_call_parser gguf_file subfolder variant code_revision
    tokenizer_revision tokenizer_mode rope_scaling rope_theta rope_parameters mm_processor_kwargs
    json_model_override_args bnb_4bit_use_double_quant llm_int8_threshold llm_int8_skip_modules lora_paths
""")
# The keywords of llama.cpp, vLLM and SGLang that shape answers. Limits of the context do not count: they decide only where
# a long answer is cut, and its finish reason shows that. transformers takes every attribute of a model's config: see
# `EngineKind.speed_kwargs`.
ANSWER_KWARGS = _VERSION_1 | _words("""
    type_k type_v yarn_orig_ctx yarn_ext_factor yarn_attn_factor yarn_beta_fast yarn_beta_slow pooling normalize truncate

    hf_config_path config_format load_format ignore_patterns model_impl model_weights model_class_overrides runner convert
    pooler_config
    kv_cache_dtype_skip_layers mamba_cache_dtype mamba_ssm_cache_dtype lora_dtype lora_modules lora_target_modules
    default_mm_loras enable_tower_connector_lora disable_sliding_window logits_processors logprobs_mode
    structured_outputs_config reasoning_config reasoning_parser_plugin tool_parser_plugin tool_strict_level
    exclude_tools_when_tool_choice_none enable_auto_tool_choice chat_template_content_format response_role
    return_tokens_as_token_ids cohere_is_reasoning_model cohere_format interleave_mm_strings media_io_kwargs
    language_model_only limit_mm_per_prompt video_pruning_rate video_pruning_method mm_encoder_attn_dtype
    reasoning_effort_map io_processor_plugin diffusion_config watermark_config hf_config_path additional_config
    enable_mamba_cache_stochastic_rounding mamba_cache_philox_rounds

    tokenizer_path random_seed quantization_param_path torchao_config modelopt_quant completion_template
    hf_chat_template_name sampling_defaults preferred_sampling_params grammar_backend enable_fp32_lm_head
    constrained_json_whitespace_pattern constrained_json_disable_any_whitespace mm_process_config enable_multimodal
    enable_custom_logit_processor custom_weight_loader
""")
# Keywords whose value may be a path, or a list of paths or of NAME=PATH.
FILE_KWARGS = _words("""
    chat_template completion_template tokenizer tokenizer_path hf_config_path generation_config lora_paths lora_modules
    tool_parser_plugin reasoning_parser_plugin quantization_param_path
""")
_OWN_NAMES = re.compile(r"(^[^.]+|(^|\.)localhost|\.(local|lan|internal|intranet|home|svc|test))$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Identity:
    """The parts of an engine's configuration that shape its answers."""

    values: dict[str, Any]
    version_1: dict[str, Any]  # as earlier versions of Eagleray had it in their keys
    modified_ms: int = 0  # the last change of a local file in it, in ms since the epoch; 0: it has none


def shapes_answers(kind: EngineKind, kwarg: str) -> bool:
    """True if this keyword of the engine is part of the keys of requests."""
    return kwarg in ANSWER_KWARGS if kind.speed_kwargs is None else kwarg not in kind.speed_kwargs


def identity(config: EngineConfig) -> Identity:
    """The identity of an engine. Reads the local files that the configuration names, as this machine sees them."""
    contents = _Contents(config)
    base_url = first_url(config)
    shared = {
        "engine": config.kind,
        "model": config.model,
        "adapter": config.adapter,
        "revision": config.revision,
        "wire": config.provider.get("wire"),
        "extra_body": config.extra_body or None,
    }
    version_1 = shared | {
        "base_url": base_url,
        "kwargs": {name: value for name, value in config.kwargs.items() if name in _VERSION_1} or None,
    }
    values = shared | {
        "adapter": contents.adapter(config.adapter),
        "base_url": None if _is_own_server(config, base_url) else base_url,
        "kwargs": contents.kwargs() or None,
        "weights": contents.weights(),
    }
    return Identity(_given(values), _given(version_1), contents.modified_ms)


def adapter_identity(config: EngineConfig, base: str, adapter: str | None) -> tuple[str | None, int]:
    """The identity of an adapter that a row names, and the last change of its files in ms since the epoch (or 0).

    A relative path is one below `base`.
    """
    contents = _Contents(config, base)
    return contents.adapter(adapter), contents.modified_ms


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


class _Contents:
    """Puts digests in the place of paths."""

    def __init__(self, config: EngineConfig, base: str = "") -> None:
        self.config, self.kind, self.base = config, kind_of(config), base
        self.modified_ms = 0

    def _name(self, digest: FileDigest | None, otherwise: str | None) -> str | None:
        if digest is None:
            return otherwise
        self.modified_ms = max(self.modified_ms, digest.modified_ms)
        return f"sha256:{digest.sha256}"

    def adapter(self, adapter: str | None) -> str | None:
        """The digest of an adapter's files. Its name, if it is on the hub or on a server."""
        if adapter is None or not self.kind.holds_model:
            return adapter
        return self._name(model_digest(adapter, base=self.base), adapter)

    def weights(self) -> str | None:
        """The digest of a local model's files. None for a model on the hub or on a server."""
        config = self.config
        if not config.model or not self.kind.holds_model:
            return None
        kwargs = config.kwargs
        path = f"{config.model}/{kwargs['subfolder']}" if isinstance(kwargs.get("subfolder"), str) else config.model
        filename = kwargs.get("filename")
        return self._name(model_digest(path, (filename,) if isinstance(filename, str) else ()), None)

    def kwargs(self) -> dict[str, Any]:
        """The keywords that shape answers."""
        shaping = (name for name in self.config.kwargs if shapes_answers(self.kind, name))
        return {name: self._value(name, self.config.kwargs[name]) for name in shaping}

    def _value(self, name: str, value: Any) -> Any:
        if name not in FILE_KWARGS:
            return value
        if isinstance(value, list):
            return [self._value(name, each) for each in value]
        if isinstance(value, Mapping):
            return {key: self._value(name, each) for key, each in value.items()}
        if not isinstance(value, str) or "{" in value or "\n" in value:  # a template's text, JSON
            return value
        label, equals, path = value.rpartition("=")
        return f"{label}{equals}{self._name(model_digest(path) if path else None, path)}"


def first_url(config: EngineConfig) -> Any:
    """The first URL. It is enough for an identity, because all endpoints of one service give the same answers."""
    return config.base_url[0] if isinstance(config.base_url, list) and config.base_url else config.base_url


def _is_own_server(config: EngineConfig, base_url: Any) -> bool:
    """True for a server that the user runs: the engine says so, or the address is an IP address or a private name."""
    if config.provider.get("self_hosted"):
        return True
    if not isinstance(base_url, str):
        return False
    try:
        host = urlsplit(base_url if "://" in base_url else f"http://{base_url}").hostname or ""
    except ValueError:
        return False
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return bool(_OWN_NAMES.search(host))
