"""Preflight checks of engines that load a model: paths, packages and keywords.

No model is loaded, nothing is downloaded, and no library of an engine is imported except llama.cpp's.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from engines.config import EngineConfig
from engines.errors import ConfigError, ErrorCode, Finding
from engines.local.memory_estimate import footprint
from engines.local.prompt_renderer import PromptRenderer, prompt_renderer
from engines.registry import kind_of


def check_paths(config: EngineConfig, thorough: bool) -> list[Finding]:
    """A finding for `model` and `adapter` each, if it is a path and nothing is there."""
    findings = []
    for name in ("model", "adapter"):
        path = str(getattr(config, name) or "")
        # Any other text may be a hub id.
        is_path = path.startswith(("/", "./", "../", "~")) or path.endswith(".gguf")
        if is_path and not Path(path).expanduser().exists():
            text = f"engine.{name}={path}: there is no such file or directory"
            findings.append(Finding(text, ErrorCode.MODEL_NOT_FOUND, f"engine.{name}", local=True))
    return findings


def check_llamacpp(config: EngineConfig, thorough: bool) -> list[Finding]:
    """Paths and keywords of engine=llamacpp."""
    findings = check_paths(config, thorough)
    try:
        from engines.local.gguf import check_gguf_kwargs

        check_gguf_kwargs(config.kwargs)
    except ConfigError as error:
        findings.append(Finding.of(error))
    return findings


def check_transformers(config: EngineConfig, thorough: bool) -> list[Finding]:
    """Paths of engine=transformers, and the package that quantisation needs."""
    findings = check_paths(config, thorough)
    bits = next((name for name in ("load_in_4bit", "load_in_8bit") if config.kwargs.get(name)), None)
    if bits and importlib.util.find_spec("bitsandbytes") is None:
        text = f"engine.kwargs.{bits} needs the package 'bitsandbytes': run pip install 'bitsandbytes>=0.46'"
        findings.append(Finding(text, ErrorCode.PACKAGE_MISSING, "engine=transformers", local=True))
    return findings


def model_on_this_machine(config: EngineConfig) -> tuple[int | None, PromptRenderer | None]:
    """The context length in tokens and the prompt renderer of a model whose files are here. Nothing is downloaded.

    None for each that cannot be read, and for an engine that loads no model.
    """
    if not kind_of(config).holds_model or not config.model:
        return None, None
    if config.model != "smollm2" and not Path(config.model).expanduser().exists():
        return None, None
    try:
        size = footprint(config)
        return (size.context if size else None), prompt_renderer(config)
    except (ConfigError, ImportError):
        return None, None
