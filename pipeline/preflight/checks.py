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
from engines.config import CANNOT_CONTINUE, EngineConfig
from engines.errors import ConfigError, Finding
from engines.registry import fallbacks, preflight, request_check, unloaded_engine
from engines.text import counted
from engines.types import Request
from pipeline.config import Config, without_secrets
from pipeline.executors.registry import executor_of
from pipeline.hardware import hardware_entries
from pipeline.preflight.dataset_estimate import Check
from pipeline.storage.filesystem import exists, listing
from pipeline.storage.lock import held
from pipeline.storage.output_files import MANIFEST, SEGMENTS


@dataclass(slots=True)
class Findings:
    """The problems of the configuration, independent of the rows."""

    wrong: list[Finding] = field(default_factory=list)  # problems with which no row could be answered
    doubtful: list[Finding] = field(default_factory=list)  # warnings, and what only this machine may lack
    engine: Engine | None = None  # checks and renders requests; None if it would have to be loaded
    check: Check | None = None


def examine(config: Config, thorough: bool) -> Findings:
    """Checks packages, keys, URLs and parameters. Loads no model. `thorough` also imports the library of an engine."""
    found = Findings()
    here = found.doubtful if joins_a_cluster() else found.wrong
    entries = hardware_entries(config.hardware, config.engine)
    engines = [(entry.name, entry.engine) for entry in entries] if len(entries) > 1 else [("", entries[0].engine)]
    for where, engine in (*engines, *(("", fallback) for fallback in fallbacks(config.engine))):
        try:
            problems = preflight(engine, thorough)
        except ConfigError as error:
            problems = [Finding.of(error)]
        problems = [_of_entry(where, problem) for problem in problems]
        for problem in problems:
            place = found.doubtful if problem.is_warning else here if problem.local else found.wrong
            place.append(problem)
        if any(not problem.local and not problem.is_warning for problem in problems):
            continue
        try:
            built = unloaded_engine(_without_secrets(config, engine))
            if built is not None:
                built.check(config.params())
                _check_continues(config, built)
            if engine is engines[0][1]:
                found.engine = built
        except ConfigError as error:
            known = {problem.code for problem in problems if not problem.is_warning}
            if error.code not in known:  # otherwise it is reported above
                found.wrong.append(_of_entry(where, Finding.of(error)))
    found.wrong += executor_of(config).findings(config)
    found.check = _request_check(config, found.engine, thorough)
    return found


def _of_entry(where: str, finding: Finding) -> Finding:
    """The finding with the name of a hardware entry, if there are several."""
    return dataclasses.replace(finding, text=f"{where}: {finding.text}") if where else finding


def _check_continues(config: Config, engine: Engine) -> None:
    """Raises `ConfigError` if the engine cannot continue the answers of `dataset.last_answer=continue`."""
    able = engine.capabilities_for(Request([], config.params())).prefill
    if config.dataset.last_answer == "continue" and not able:
        text = f"engine={engine.config.kind} model={engine.config.model} {CANNOT_CONTINUE}"
        raise ConfigError(text, key="dataset.last_answer")


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
    """The state of the output directory in words, and True if it makes a run impossible.

    `known`: the number of requests in the ledger. `answered`: the rows of this dataset that are done.
    `complete`: the output is for exactly this input and configuration.
    """
    if wrong := unwritable(fs, root):
        return wrong, True
    if held(fs, root):
        return f"another run is writing into {root}", True
    if complete:
        return f"{root} is complete for exactly this input and configuration", False
    if not known:
        return f"{root} {'exists and has no results' if listing(fs, root) else 'is new'}", False
    if answered:
        return f"{root} can be continued: {counted(answered, 'row is', 'rows are')} done", False
    other = "another configuration or dataset" if exists(fs, f"{root}/{MANIFEST}") else "other requests"
    return f"{root} has {counted(known, 'result')} of {other}: all results are kept, and all rows are sent", False


def unwritable(fs: pafs.FileSystem, root: str) -> str:
    """The reason why the directory cannot be written. Empty if it can be written, or if only a write would show that."""
    if not isinstance(fs, pafs.LocalFileSystem):
        return ""
    place = next(path for path in (Path(root) / SEGMENTS, *(Path(root) / SEGMENTS).parents) if path.exists())
    if not place.is_dir():
        return f"output.path: cannot write into {root}: {place} is not a directory"
    return "" if os.access(place, os.W_OK | os.X_OK) else f"output.path: cannot write into {root}: no permission in {place}"
