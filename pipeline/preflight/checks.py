"""Checks of the configuration, the engine and the output directory. No request is sent."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.fs as pafs

from engines.base import Engine
from engines.config import EngineConfig
from engines.errors import ConfigError
from engines.registry import engine_class, fallbacks, missing_package
from engines.remote.auth import Auth
from engines.remote.batch.factory import no_batch_api
from engines.remote.engine import RemoteEngine
from engines.remote.provider import Provider, endpoints
from engines.types import Request
from pipeline.config import Config, without_secrets
from pipeline.preflight.dataset_estimate import Check
from pipeline.storage.filesystem import exists, listing
from pipeline.storage.lock import held
from pipeline.storage.output_files import MANIFEST, SEGMENTS


@dataclass(slots=True)
class Findings:
    """What the configuration tells by itself."""

    wrong: list[str] = field(default_factory=list)  # no row could be answered
    doubtful: list[str] = field(default_factory=list)  # nor here, but perhaps where the replicas run
    engine: Engine | None = None  # without its key; None where it would have to be loaded
    check: Check | None = None


def examine(config: Config, thorough: bool) -> Findings:
    """Looks at packages, keys, URLs and parameters; loads no model. `thorough` also imports an engine's libraries."""
    found = Findings()
    here = found.doubtful if joins_a_cluster() else found.wrong
    for engine in (config.engine, *fallbacks(config.engine)):
        missing = missing_package(engine.kind, engine.provider)
        if missing is not None:
            here.append(str(missing))
            continue
        here.extend(_absent(engine))
        try:
            if engine.provider and (provider := Provider.of(engine)).auth != "aws":
                endpoints(engine, provider)
                try:
                    Auth.of(engine, provider)
                except ConfigError as error:
                    here.append(str(error))
                    if provider.auth == "google":
                        continue
            made = _unloaded(config, engine)
            if made is not None:
                made.check(config.params())
            if engine is config.engine:
                found.engine = made
        except ConfigError as error:
            found.wrong.append(str(error))
    if config.run.mode == "batch" and not config.engine.provider.get("batch"):
        found.wrong.append(str(no_batch_api(config.engine.kind)))
    found.check = _checker(config, found.engine, thorough)
    return found


def _absent(engine: EngineConfig) -> Iterator[str]:
    """What a local engine would look for in vain: a path with nothing there, a library for fewer bits."""
    if engine.provider or engine.kind == "echo":
        return
    for name in ("model", "adapter"):
        path = str(getattr(engine, name) or "")
        # Anything else may be the id of a repository of the hub.
        if (path.startswith(("/", "./", "../", "~")) or path.endswith(".gguf")) and not Path(path).expanduser().exists():
            yield f"engine.{name}={path}: there is no such file or directory"
    bits = next((name for name in ("load_in_4bit", "load_in_8bit") if engine.kwargs.get(name)), None)
    if bits and engine.kind == "transformers" and importlib.util.find_spec("bitsandbytes") is None:
        yield f"engine.kwargs.{bits} needs the package 'bitsandbytes': run pip install 'bitsandbytes>=0.46'"


def joins_a_cluster() -> bool:
    """Whether replicas may run on other machines, with packages and variables of their own."""
    ray = sys.modules.get("ray")
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())


def _unloaded(config: Config, engine: EngineConfig) -> Engine | None:
    """The engine, where making it loads no model, with every secret replaced. Raises `ConfigError`."""
    if engine.kind == "echo":
        return engine_class("echo")(engine)
    if not engine.provider:
        if engine.kind == "llamacpp":
            from engines.local.gguf import check_gguf_kwargs

            check_gguf_kwargs(engine.kwargs)
        return None
    clean = without_secrets(dataclasses.replace(config, engine=engine))["engine"]
    headers, auth = dict(clean["headers"]), Provider.of(engine).auth
    keyed = auth != "optional" or os.environ.get(engine.api_key_env or "")
    if keyed and not any(name.lower() in ("authorization", "x-api-key") for name in headers):
        headers |= {"x-api-key": "***"} if auth == "x-api-key" else {"authorization": "Bearer ***"}
    shown = dataclasses.replace(
        engine, headers=headers, extra_body=clean["extra_body"], base_url=clean["base_url"], api_key_env=None, fallback=[]
    )
    return engine_class(engine.kind, engine.provider)(shown)


def _checker(config: Config, engine: Engine | None, thorough: bool) -> Check | None:
    if engine is not None:

        def ask(request: Request) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                prepared = engine.prepared(request)
            if thorough and isinstance(engine, RemoteEngine):
                engine.body(prepared)

        return ask
    if not thorough or config.engine.unsupported == "drop":
        return None
    try:
        capabilities = engine_class(config.engine.kind, config.engine.provider).capabilities
    except Exception:  # its library is broken, or not here: said elsewhere
        return None
    # Whether a model sees is known once it is loaded.
    seeing = dataclasses.replace(capabilities, images=capabilities.images or config.engine.kind == "transformers")

    def refuse(request: Request) -> None:
        if refused := seeing.refuse(request, config.engine):
            raise refused

    return refuse


def output_state(fs: pafs.FileSystem, root: str, known: int, answered: int, complete: bool) -> tuple[str, bool]:
    """How the output directory stands, and whether a run could not use it. It has `known` answers; `answered` are rows of
    this dataset."""
    if wrong := unwritable(fs, root):
        return wrong, True
    if held(fs, root):
        return f"{root} is being written by another run", True
    if complete:
        return f"{root} is complete: it holds just this", False
    if not known:
        return f"{root} is {'there, without answers' if listing(fs, root) else 'new'}", False
    if answered:
        return f"{root} goes on: {answered:,} rows are answered already", False
    was = "of another configuration or dataset" if exists(fs, f"{root}/{MANIFEST}") else "of none of these requests"
    return f"{root} holds {known:,} answers {was}: they are kept, and all rows are asked", False


def unwritable(fs: pafs.FileSystem, root: str) -> str:
    """Why nothing can be written there; empty where it can, or where only trying would tell."""
    if not isinstance(fs, pafs.LocalFileSystem):
        return ""
    place = next(path for path in (Path(root) / SEGMENTS, *(Path(root) / SEGMENTS).parents) if path.exists())
    if not place.is_dir():
        return f"output.path: cannot write into {root}: {place} is not a directory"
    return "" if os.access(place, os.W_OK | os.X_OK) else f"output.path: cannot write into {root}: no permission in {place}"
