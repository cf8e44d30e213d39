"""The configuration of a run as plain dataclasses. Each key has its default, its help and its check in one place.

Hydra composes the configuration against these dataclasses. Actors receive them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from engines.config import EngineConfig, key
from engines.errors import ConfigError, EngineError, ErrorCode, nearest
from engines.fallback_prices import most_expensive
from engines.params import GENERATION_FIELDS, GenerationParams, json_schema_of
from engines.registry import REGISTRY, fallbacks
from engines.structured import check_schema
from engines.validation import (
    Refused,
    above,
    at_least,
    between,
    check_fields,
    check_keys,
    check_value,
    is_whole,
    one_of,
)

# The values of `run.mode`. `pipeline/executors/registry.py` adds the name of each executor when it is imported.
RUN_MODES: list[str] = []
# Ray sets this environment variable for processes that `ray job submit` starts.
_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"


# -- checks of single keys --------------------------------------------------------------------------------------------


def _path_or_paths(name: str, value: Any) -> Any:
    if not all(isinstance(path, str) for path in (value if isinstance(value, list) else [value])):
        raise Refused.value(name, "a text or a list of them", value)
    return value


def _http_address(name: str, value: Any) -> Any:
    if not str(value).startswith(("http://", "https://")):
        raise Refused.value(name, "an http:// or https:// address", value)
    return value


def _share_or_whole(name: str, value: Any) -> Any:
    """Ray reserves a share of one CPU or GPU, or whole ones."""
    at_least(0)(name, value)
    if value > 1 and value != int(value):
        raise Refused(f"{name} above 1 must be a whole number, not {value}")
    return value


def replica_bounds(name: str, value: Any) -> tuple[int, int] | None:
    """The minimum and maximum number of replicas; None for `auto`."""
    if value == "auto":
        return None
    if isinstance(value, Mapping):
        check_keys(value, ("min", "max"), name)
        low, high = value.get("min", 1), value.get("max", value.get("min", 1))
    else:
        low = high = value
    if not all(is_whole(bound) and bound >= 1 for bound in (low, high)):
        raise Refused.value(name, "auto, a number of at least 1, or {min: 1, max: 8}", value)
    if low > high:
        raise Refused(f"{name} has a min of {low} above its max of {high}")
    return low, high


# -- the sections -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class DatasetConfig:
    path: Any = key(
        None, "a file, directory, glob or list of these; local, s3://, gs://, az:// or any fsspec URL", _path_or_paths
    )
    format: str = key("auto", "auto, messages, oumi, openai_batch, sharegpt, prompt or turns")
    limit: int | None = key(None, "maximum number of rows to read", at_least(1))
    columns: dict[str, Any] = key({}, "maps a role to a column, for example {prompt: question, id: qid}")
    template: Any = key(None, "a Jinja template that builds a conversation from a row: a text, or {system: …, user: …}")
    on_bad_input: str = key(
        "quarantine",
        "for an unreadable row: quarantine makes it an error row, fail stops the run",
        one_of(("quarantine", "fail")),
    )
    max_row_bytes: int = key(32 << 20, "maximum bytes of a line; a longer line becomes an error row", at_least(1))
    chunk_bytes: int = key(32 << 20, "bytes of input for one read task", at_least(1))


@dataclass(slots=True)
class OutputConfig:
    path: str | None = key(None, "the output directory; local or any filesystem URL")
    format: str = key("parquet", "parquet or jsonl", one_of(("parquet", "jsonl")))
    style: str = key(
        "eagleray",
        "the format of JSONL lines: eagleray, openai_batch or oumi",
        one_of(("eagleray", "openai_batch", "oumi")),
    )
    columns: Any = key(
        None,
        "columns made from the answers, typed by the JSON schema: schema (all properties), "
        "[score, …] or {name: detail.score, …}",
    )
    overwrite: bool = key(
        False, "true: another dataset may replace the output in output.path; all answers stay in the ledger"
    )
    ordered: bool = key(True, "true: rows are in input order (without extra cost); false: no order is guaranteed")


@dataclass(slots=True)
class RunConfig:
    resume: bool = key(True, "true: use the answers of earlier runs in output.path; false: remove them and start again")
    retry_failed: bool = key(True, "send the failed rows of earlier runs again")
    max_error_rate: float | None = key(None, "stop early if this share of at least 100 rows failed", between(0, 1))
    max_errors: int | None = key(None, "stop early after this number of failed rows", at_least(1))
    budget_usd: float | None = key(
        None, "stop before all runs into output.path together cost more than this, in US$; the run can be resumed", above(0)
    )
    flush_s: float = key(2.0, "maximum seconds until an answer is durable", at_least(0.05))
    drain_s: float = key(30.0, "seconds for rows in flight to finish after Ctrl-C or SIGTERM", at_least(0))
    max_outage_s: float = key(
        900.0, "stop if no server answers for this number of seconds; the run can be resumed", above(0)
    )
    max_engine_deaths: int = key(
        5, "stop after this number of engine deaths in succession without a finished row", at_least(0)
    )
    mode: str = key(
        "live",
        "live: send each row as a request; batch: use the provider's batch API, mostly for half the price",
        one_of(RUN_MODES),
    )
    batch_fallback: str = key(
        "batch", "where rows without an answer from a batch go: batch (another batch) or live", one_of(("batch", "live"))
    )
    batch_poll_s: float = key(60.0, "maximum seconds between two status requests for a batch", above(0))
    dry_run: bool = key(False, "read, check and count the input; send no request and write nothing")
    traces: str | None = key(
        None, "the OTLP/HTTP address for OpenTelemetry traces, for example http://localhost:4318", _http_address
    )
    progress_s: float = key(10.0, "seconds between progress lines if the output is not a terminal", above(0))


@dataclass(slots=True)
class HardwareConfig:
    replicas: Any = key(
        1, "number of replicas: a number, {min: 1, max: 8}, or auto: as many as fit on the profile's GPUs", replica_bounds
    )
    cpus: float = key(
        0.0,
        "logical CPUs that each replica reserves; 0 reserves none, and the replica may use the whole node",
        _share_or_whole,
    )
    gpus: float | None = key(
        0.0, "GPUs that each replica reserves; null: tensor × pipeline parallel size (1 if not set)", _share_or_whole
    )
    memory: float = key(0.0, "GiB of memory that each replica reserves", at_least(0))
    label_selector: dict[str, Any] = key({}, "labels that a Ray node must have to run a replica")
    nodes: int = key(1, "number of nodes with GPUs, for replicas=auto", at_least(1))
    gpus_per_node: int = key(0, "GPUs of each of these nodes; 0: unknown", at_least(0))
    gpu_memory: float = key(0.0, "GiB of each GPU, for eagleray plan; 0: unknown", at_least(0))

    def bounds(self) -> tuple[int, int] | None:
        """The minimum and maximum number of replicas; None for `auto`, where the number of GPUs decides."""
        bounds: tuple[int, int] | None = check_value("hardware.replicas", self.replicas, replica_bounds)
        return bounds


@dataclass(slots=True)
class ServeConfig:
    host: str = key("127.0.0.1", "the address that eagleray serve listens on; 0.0.0.0: all addresses of the machine")
    port: int = key(8000, "the port that eagleray serve listens on; 0: any free port of this machine", between(0, 65535))
    api_key_env: str | None = key(
        None, "the environment variable with the API key that clients must send; unset: no key is required"
    )


@dataclass(slots=True)
class Config:
    engine: EngineConfig = field(default_factory=EngineConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    generation: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(GENERATION_FIELDS))
    output: OutputConfig = field(default_factory=OutputConfig)
    run: RunConfig = field(default_factory=RunConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)

    def params(self) -> GenerationParams:
        """The generation parameters, checked. Raises `ConfigError`."""
        try:
            return GenerationParams.parse(self.generation)
        except EngineError as error:
            if error.code == ErrorCode.UNKNOWN_PARAMETER:
                raise ConfigError(error, code=error.code, key=error.key) from None
            raise ConfigError(f"generation.{error}", key=error.key) from None

    def check(self, *, runs: bool = True) -> None:
        """Checks each key, then the rules over several keys. Raises `ConfigError`.

        Jobs that do not run anything (`runs` is false) need neither a dataset nor an output.
        """
        if runs:
            _check_paths_given(self)
        for section in fields(self):
            if is_dataclass(values := getattr(self, section.name)):
                check_fields(section.name, values)
        for rule in _RULES:
            rule(self)


# -- rules over several keys ------------------------------------------------------------------------------------------


def _check_paths_given(config: Config) -> None:
    """A run needs a dataset and an output. A submitted job needs an output that does not go away with its files."""
    if config.dataset.path in (None, "", []):
        raise ConfigError("dataset.path is missing: name a file, directory or glob of conversations")
    if not config.output.path:
        raise ConfigError("output.path is missing: name a directory for the results")
    if _SUBMITTED in os.environ and not _is_absolute(config.output.path):
        raise ConfigError(
            f"output.path={config.output.path} would be deleted with the job's copy of the working directory: "
            "name an absolute path that all nodes share, or s3://…"
        )


def _check_engine(config: Config) -> None:
    """The engine must be known, unless `engine.provider` describes it. Fallback engines are checked as well."""
    engine = config.engine
    if not engine.kind:
        raise ConfigError(f"engine.kind is missing{nearest('', REGISTRY)}")
    if not engine.provider:
        check_value("engine.kind", engine.kind, one_of(REGISTRY))
    check_fields("engine.price", engine.price)
    fallbacks(engine)


def _check_budget_has_price(config: Config) -> None:
    if config.run.budget_usd is not None:
        most_expensive(config.engine)


def _check_style_has_format(config: Config) -> None:
    if config.output.style != "eagleray" and config.output.format != "jsonl":
        raise ConfigError(f"output.style={config.output.style} needs output.format=jsonl")


def _check_generation(config: Config) -> None:
    """The generation parameters, the JSON schema of answers, and the columns that come from it."""
    response_format = config.params().response_format
    if response_format is not None and response_format["type"] == "json_schema":
        try:
            check_schema(json_schema_of(response_format))
        except EngineError as error:
            raise ConfigError(f"generation.response_format: {error}") from None


_RULES = (_check_engine, _check_style_has_format, _check_budget_has_price, _check_generation)


# Sections that accept any key.
OPEN_KEYS = (
    "engine.kwargs",
    "engine.headers",
    "engine.extra_body",
    "engine.provider",
    "dataset.columns",
    "hardware.label_selector",
)


GENERATION_HELP = {
    "max_tokens": "maximum tokens of an answer",
    "temperature": "sampling temperature; 0 always selects the most likely token",
    "top_p": "sample from the most likely tokens whose probabilities add up to this value, 0 to 1",
    "top_k": "sample from this number of the most likely tokens",
    "min_p": "exclude tokens whose probability is below this share of the most likely token's, 0 to 1",
    "stop": "a text, or a list of texts, that ends an answer",
    "stop_token_ids": "ids of tokens that end an answer",
    "seed": "the seed of the sampling",
    "n": "answers for each row; the column choices contains all of them",
    "frequency_penalty": "penalty for tokens by their number of occurrences, -2 to 2",
    "presence_penalty": "penalty for tokens that occurred before, -2 to 2",
    "repetition_penalty": "penalty factor for tokens that occurred before; 1 means no penalty",
    "logit_bias": "maps a token id to a value that is added to its logit, for example {50256: -100}",
    "logprobs": "log probabilities of this number of alternatives for each token; 0: only the chosen token's",
    "response_format": "the form of an answer: a file with a JSON schema, a schema ({type: object, …}), or "
    "{type: json_schema | json_object | regex | choice | grammar | text, …}",
    "tools": "tools that the model may call, in the format of OpenAI's chat API",
    "tool_choice": "auto, none, required, or one tool in the format of OpenAI's chat API",
    "reasoning_effort": "the effort of a reasoning model, for example low, medium or high",
    "schema_retries": "maximum retries of an answer that does not match response_format [2]",
}

_MAY_HOLD_SECRETS = (*OPEN_KEYS, "engine.fallback")
# Names of keys in these sections whose values are secrets.
_SECRET_NAME = re.compile(r"(^|[_-])(api[_-]?key|key|token|secret|password|authorization|cookie)$", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(\w+://[^/\s:@]*:)[^/\s@]+@")
_SECRET_VARIABLE = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


def without_secrets(config: Config) -> dict[str, Any]:
    """The configuration as plain values that are safe to store or print: secrets are replaced by `***`.

    A secret is a value from an environment variable with a secret's name, or a value whose key has the name of a secret
    (`authorization`, `token`, …).
    """
    secrets = [value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= 8]
    secrets.sort(key=len, reverse=True)

    def clean(value: Any, path: tuple[str, ...] = ()) -> Any:
        if isinstance(value, Mapping):
            return {str(name): clean(item, (*path, str(name))) for name, item in value.items()}
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            return str(value)  # JSON readers do not support larger integers
        if isinstance(value, list):
            return [clean(item, path) for item in value]
        if isinstance(value, str):
            if ".".join(path[:2]) in _MAY_HOLD_SECRETS and len(path) > 2 and _SECRET_NAME.search(path[-1]):
                return "***"
            for secret in secrets:
                value = value.replace(secret, "***")
            return _URL_PASSWORD.sub(r"\1***@", value)
        return value

    cleaned: dict[str, Any] = clean(asdict(config))
    return cleaned


def without_typed_secret(override: str) -> str:
    """An override of the command line; the value of a secret, or of a mapping that contains one, is replaced by `***`."""
    name, equals, value = override.lstrip("+").partition("=")
    path = name.split(".")
    inside = re.search(r"(key|token|secret|password|authorization|cookie)\W*:", value, re.IGNORECASE)
    secret = _SECRET_NAME.search(path[-1]) if len(path) > 2 else inside
    return f"{name}=***" if ".".join(path[:2]) in _MAY_HOLD_SECRETS and secret and equals else override


def known_keys() -> dict[str, Any]:
    """Dotted key -> its dataclass field. Generation parameters have no type: `engines/params.py` checks them by name."""
    found: dict[str, Any] = {}
    for section in fields(Config):
        if section.name == "generation":
            found.update({f"generation.{name}": key(None, GENERATION_HELP[name]) for name in GENERATION_FIELDS})
            continue
        factory = section.default_factory
        assert is_dataclass(factory)
        for item in fields(factory):
            found[f"{section.name}.{item.name}"] = item
    return found


def _is_absolute(path: str) -> bool:
    """True if the path does not depend on the working directory."""
    return "://" in path or Path(path).expanduser().is_absolute()
