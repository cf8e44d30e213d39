"""Checks of the configuration, the engines and the output directory before a run. No request is sent."""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.fs as pafs

from engines.base import Engine
from engines.config import EngineConfig
from engines.errors import ConfigError, Finding
from engines.registry import fallbacks, preflight, request_check, unloaded_engine
from engines.remote.batch.factory import no_batch_api
from engines.types import Request
from pipeline.config import Config, without_secrets
from pipeline.preflight.dataset_estimate import Check
from pipeline.storage.filesystem import exists, listing
from pipeline.storage.lock import held
from pipeline.storage.output_files import MANIFEST, SEGMENTS


@dataclass(slots=True)
class Findings:
    """The problems of the configuration, independent of the rows."""

    wrong: list[Finding] = field(default_factory=list)  # problems with which no row could be answered
    doubtful: list[Finding] = field(default_factory=list)  # missing on this machine, but maybe present where replicas run
    engine: Engine | None = None  # checks and renders requests; None if it would have to be loaded
    check: Check | None = None


def examine(config: Config, thorough: bool) -> Findings:
    """Checks packages, keys, URLs and parameters. Loads no model. `thorough` also imports the library of an engine."""
    found = Findings()
    here = found.doubtful if joins_a_cluster() else found.wrong
    for engine in (config.engine, *fallbacks(config.engine)):
        try:
            problems = preflight(engine, thorough)
        except ConfigError as error:
            problems = [Finding.of(error)]
        for problem in problems:
            (here if problem.local else found.wrong).append(problem)
        if any(not problem.local for problem in problems):
            continue
        try:
            built = unloaded_engine(_without_secrets(config, engine))
            if built is not None:
                built.check(config.params())
            if engine is config.engine:
                found.engine = built
        except ConfigError as error:
            if error.code not in {problem.code for problem in problems}:  # else already reported, such as a missing package
                found.wrong.append(Finding.of(error))
    if config.run.mode == "batch" and not config.engine.provider.get("batch"):
        found.wrong.append(Finding.of(no_batch_api(config.engine.kind)))
    found.check = _request_check(config, found.engine, thorough)
    return found


def joins_a_cluster() -> bool:
    """True if replicas may run on other machines, which have their own packages and variables."""
    ray = sys.modules.get("ray")
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())


def _without_secrets(config: Config, engine: EngineConfig) -> EngineConfig:
    """The engine's configuration with `***` for values that came from secret environment variables."""
    clean = without_secrets(dataclasses.replace(config, engine=engine))["engine"]
    return dataclasses.replace(engine, **{name: clean[name] for name in ("headers", "extra_body", "base_url")})


def _request_check(config: Config, engine: Engine | None, thorough: bool) -> Check | None:
    if engine is None:
        return request_check(config.engine) if thorough else None

    def check(request: Request) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if thorough:
                engine.check_request(request)
            else:
                engine.prepared(request)

    return check


def output_state(fs: pafs.FileSystem, root: str, known: int, answered: int, complete: bool) -> tuple[str, bool]:
    """The state of the output directory in words, and True if it makes a run impossible. The directory has `known` answers,
    and `answered` of this dataset's rows are among them."""
    if wrong := unwritable(fs, root):
        return wrong, True
    if held(fs, root):
        return f"{root} is being written by another run", True
    if complete:
        return f"{root} is complete: it has the answers of exactly this input and configuration", False
    if not known:
        return f"{root} is {'there, without answers' if listing(fs, root) else 'new'}", False
    if answered:
        return f"{root} can be continued: {answered:,} rows are already answered", False
    other = "another configuration or dataset" if exists(fs, f"{root}/{MANIFEST}") else "other requests"
    return f"{root} has {known:,} answers of {other}: they are kept, and all rows are sent", False


def unwritable(fs: pafs.FileSystem, root: str) -> str:
    """The reason why the directory cannot be written. Empty if it can, or if only a write would show it."""
    if not isinstance(fs, pafs.LocalFileSystem):
        return ""
    place = next(path for path in (Path(root) / SEGMENTS, *(Path(root) / SEGMENTS).parents) if path.exists())
    if not place.is_dir():
        return f"output.path: cannot write into {root}: {place} is not a directory"
    return "" if os.access(place, os.W_OK | os.X_OK) else f"output.path: cannot write into {root}: no permission in {place}"
