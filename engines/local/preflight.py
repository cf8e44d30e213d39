"""What can be checked of a local engine's configuration without importing its library."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from engines.config import EngineConfig
from engines.errors import ConfigError, ErrorCode, Finding


def check_paths(config: EngineConfig, thorough: bool) -> list[Finding]:
    """Paths in `model` and `adapter` that do not exist on this machine. Any other name may be one on the hub."""
    found = []
    for name in ("model", "adapter"):
        path = str(getattr(config, name) or "")
        is_path = path.startswith(("/", "./", "../", "~")) or path.endswith(".gguf")
        if is_path and not Path(path).expanduser().exists():
            text = f"engine.{name}={path}: there is no such file or directory"
            found.append(Finding(text, ErrorCode.MODEL_NOT_FOUND, f"engine.{name}", local=True))
    return found


def check_llamacpp(config: EngineConfig, thorough: bool) -> list[Finding]:
    """Paths, and the keywords of llama.cpp."""
    from engines.local.gguf import check_gguf_kwargs

    found = check_paths(config, thorough)
    try:
        check_gguf_kwargs(config.kwargs)
    except ConfigError as error:
        found.append(Finding.of(error))
    return found


def check_transformers(config: EngineConfig, thorough: bool) -> list[Finding]:
    """Paths, and the package that quantised loading needs."""
    found = check_paths(config, thorough)
    bits = next((name for name in ("load_in_4bit", "load_in_8bit") if config.kwargs.get(name)), None)
    if bits and importlib.util.find_spec("bitsandbytes") is None:
        text = f"engine.kwargs.{bits} needs the package 'bitsandbytes': run pip install 'bitsandbytes>=0.46'"
        found.append(Finding(text, ErrorCode.PACKAGE_MISSING, "engine=transformers", local=True))
    return found
