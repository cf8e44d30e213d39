"""The configuration of a run as plain dataclasses: what Hydra composes is checked against these, and actors get them."""

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
from engines.prices import RATES
from engines.registry import REGISTRY, fallbacks
from engines.structured import check_schema

# The values of `run.mode`: `pipeline.executors.registry.register` adds to them.
RUN_MODES = ["live", "batch"]
# Ray sets it for what `ray job submit` starts.
_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@dataclass(slots=True)
class DatasetConfig:
    path: Any = key(None, "a file, directory, glob or list of these; local, s3://, gs://, az:// or any fsspec URL")
    format: str = key("auto", "auto, messages, oumi, openai_batch, sharegpt, prompt or turns")
    limit: int | None = key(None, "maximum number of rows to read")
    columns: dict[str, Any] = key({}, "maps a role to a column, for example {prompt: question, id: qid}")
    template: Any = key(None, "a Jinja template that builds a conversation from a row: a text, or {system: …, user: …}")
    on_bad_input: str = key("quarantine", "for an unreadable row: quarantine makes it an error row, fail stops the run")
    max_row_bytes: int = key(32 << 20, "maximum bytes of a line; a longer line becomes an error row")
    chunk_bytes: int = key(32 << 20, "bytes of input for one read task")


@dataclass(slots=True)
class OutputConfig:
    path: str | None = key(None, "the output directory; local or any filesystem URL")
    format: str = key("parquet", "parquet or jsonl")
    style: str = key("eagleray", "the format of JSONL lines: eagleray, openai_batch or oumi")
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
    max_error_rate: float | None = key(None, "stop early if this share of at least 100 rows failed")
    max_errors: int | None = key(None, "stop early after this number of failed rows")
    budget_usd: float | None = key(
        None, "stop before all runs into output.path together cost more than this, in US$; the run can be resumed"
    )
    flush_s: float = key(2.0, "maximum seconds until an answer is durable")
    drain_s: float = key(30.0, "seconds for rows in flight to finish after Ctrl-C or SIGTERM")
    max_outage_s: float = key(900.0, "stop if no server answers for this number of seconds; the run can be resumed")
    max_engine_deaths: int = key(5, "stop after this number of engine deaths in succession without a finished row")
    mode: str = key(
        "live", "live: send each row as a request; batch: use the provider's batch API, mostly for half the price"
    )
    batch_fallback: str = key("batch", "where rows without an answer from a batch go: batch (another batch) or live")
    batch_poll_s: float = key(60.0, "maximum seconds between two status requests for a batch")
    dry_run: bool = key(False, "read, check and count the input; send no request and write nothing")
    traces: str | None = key(None, "the OTLP/HTTP address for OpenTelemetry traces, for example http://localhost:4318")
    progress_s: float = key(10.0, "seconds between progress lines if the output is not a terminal")


@dataclass(slots=True)
class HardwareConfig:
    replicas: Any = key(1, "number of replicas: a number, {min: 1, max: 8}, or auto: as many as fit on the profile's GPUs")
    cpus: float = key(
        0.0, "logical CPUs that each replica reserves; 0 reserves none, and the replica may use the whole node"
    )
    gpus: float | None = key(0.0, "GPUs that each replica reserves; null: tensor × pipeline parallel size (1 if not set)")
    memory: float = key(0.0, "GiB of memory that each replica reserves")
    label_selector: dict[str, Any] = key({}, "labels that a Ray node must have to run a replica")
    nodes: int = key(1, "number of nodes with GPUs, for replicas=auto")
    gpus_per_node: int = key(0, "GPUs of each of these nodes; 0: unknown")
    gpu_memory: float = key(0.0, "GiB of each GPU, for eagleray plan; 0: unknown")

    def bounds(self) -> tuple[int, int] | None:
        """The least and the most replicas; None where the GPUs tell."""
        given = self.replicas
        if given == "auto":
            return None
        if isinstance(given, Mapping):
            for name in given:
                if name not in ("min", "max"):
                    raise ConfigError(f"there is no key 'hardware.replicas.{name}'{nearest(str(name), ('min', 'max'))}")
            low, high = given.get("min", 1), given.get("max", given.get("min", 1))
        else:
            low = high = given
        for value in (low, high):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"hardware.replicas must be auto, a number of at least 1, or {{min: 1, max: 8}}, not {given!r}"
                )
        if low > high:
            raise ConfigError(f"hardware.replicas has a min of {low} above its max of {high}")
        return low, high


@dataclass(slots=True)
class ServeConfig:
    host: str = key("127.0.0.1", "the address that eagleray serve listens on; 0.0.0.0: all addresses of the machine")
    port: int = key(8000, "the port that eagleray serve listens on; 0: any free port of this machine")
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
        """The generation parameters, checked."""
        try:
            return GenerationParams.parse(self.generation)
        except EngineError as error:
            if error.code == ErrorCode.UNKNOWN_PARAMETER:
                raise ConfigError(error, code=error.code, key=error.key) from None
            raise ConfigError(f"generation.{error}", key=error.key) from None

    def check(self, *, runs: bool = True) -> None:
        """Raises `ConfigError` for what no type can say. What never `runs` needs neither dataset nor output."""
        if self.dataset.path in (None, "", []) and runs:
            raise ConfigError("dataset.path is missing: name a file, directory or glob of conversations")
        paths = self.dataset.path if isinstance(self.dataset.path, list) else [self.dataset.path]
        if not all(isinstance(path, str) for path in paths) and self.dataset.path is not None:
            raise ConfigError(f"dataset.path must be a text or a list of them, not {self.dataset.path!r}")
        if not self.output.path and runs:
            raise ConfigError("output.path is missing: name a directory for the results")
        if runs and _SUBMITTED in os.environ and not _absolute(self.output.path or ""):
            raise ConfigError(
                f"output.path={self.output.path} would go with the job's copy of the working directory: "
                "name an absolute path that all nodes share, or s3://…"
            )
        if not self.engine.kind:
            raise ConfigError(f"engine.kind is missing{nearest('', REGISTRY)}")
        if not self.engine.provider:  # with one, any name will do
            _one_of("engine.kind", self.engine.kind, tuple(REGISTRY))
        fallbacks(self.engine)
        _one_of("engine.unsupported", self.engine.unsupported, ("error", "drop"))
        _one_of("dataset.on_bad_input", self.dataset.on_bad_input, ("quarantine", "fail"))
        _one_of("output.format", self.output.format, ("parquet", "jsonl"))
        _one_of("output.style", self.output.style, ("eagleray", "openai_batch", "oumi"))
        if self.output.style != "eagleray" and self.output.format != "jsonl":
            raise ConfigError(f"output.style={self.output.style} needs output.format=jsonl")
        _one_of("run.mode", self.run.mode, tuple(RUN_MODES))
        _one_of("run.batch_fallback", self.run.batch_fallback, ("batch", "live"))
        _above_zero("run.batch_poll_s", self.run.batch_poll_s)
        _at_least("dataset.limit", self.dataset.limit, 1)
        _at_least("dataset.max_row_bytes", self.dataset.max_row_bytes, 1)
        _at_least("dataset.chunk_bytes", self.dataset.chunk_bytes, 1)
        _at_least("engine.max_concurrency", self.engine.max_concurrency, 1)
        for name in (
            "requests_per_minute",
            "input_tokens_per_minute",
            "output_tokens_per_minute",
            "timeout_s",
            "connect_timeout_s",
            "read_timeout_s",
        ):
            _above_zero(f"engine.{name}", getattr(self.engine, name))
        _at_least("engine.max_retries", self.engine.max_retries, 0)
        for name in RATES:
            _at_least(f"engine.price.{name}", getattr(self.engine.price, name), 0)
        for name in ("cpus", "gpus", "memory"):
            value = getattr(self.hardware, name)
            _at_least(f"hardware.{name}", value, 0)
            if name != "memory" and value is not None and value > 1 and value != int(value):
                raise ConfigError(f"hardware.{name} above 1 must be a whole number, not {value}")
        _at_least("hardware.nodes", self.hardware.nodes, 1)
        _at_least("hardware.gpus_per_node", self.hardware.gpus_per_node, 0)
        _at_least("hardware.gpu_memory", self.hardware.gpu_memory, 0)
        _at_least("run.flush_s", self.run.flush_s, 0.05)
        _above_zero("run.max_outage_s", self.run.max_outage_s)
        _at_least("run.drain_s", self.run.drain_s, 0)
        _at_least("run.max_errors", self.run.max_errors, 1)
        _at_least("run.max_engine_deaths", self.run.max_engine_deaths, 0)
        _above_zero("run.progress_s", self.run.progress_s)
        if self.run.traces is not None and not self.run.traces.startswith(("http://", "https://")):
            raise ConfigError(f"run.traces must be an http:// or https:// address, not {self.run.traces!r}")
        _above_zero("run.budget_usd", self.run.budget_usd)
        if self.run.budget_usd is not None:
            most_expensive(self.engine)
        rate = self.run.max_error_rate
        if rate is not None and not 0 <= rate <= 1:
            raise ConfigError(f"run.max_error_rate must be between 0 and 1, not {rate}")
        if not 0 <= self.serve.port <= 65535:
            raise ConfigError(f"serve.port must be between 0 and 65535, not {self.serve.port}")
        self.hardware.bounds()
        response_format = self.params().response_format
        if response_format is not None and response_format["type"] == "json_schema":
            try:
                check_schema(json_schema_of(response_format))
            except EngineError as error:
                raise ConfigError(f"generation.response_format: {error}") from None


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value} is not known{nearest(str(value), known)}")


def _at_least(name: str, value: float | None, low: float) -> None:
    if value is not None and value < low:
        raise ConfigError(f"{name} must be at least {low}, not {value}")


def _above_zero(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ConfigError(f"{name} must be above 0, not {value}")


# Keys whose own keys are the user's.
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
# Names under these whose values are secrets.
_SECRET_NAME = re.compile(r"(^|[_-])(api[_-]?key|key|token|secret|password|authorization|cookie)$", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(\w+://[^/\s:@]*:)[^/\s@]+@")
_SECRET_VARIABLE = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


def without_secrets(config: Config) -> dict[str, Any]:
    """The configuration as plain values, to be written down or printed: what was interpolated from a secret variable of
    the environment, or stands under the name of a secret (`authorization`, `token`, …), is `***`."""
    secrets = [value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= 8]
    secrets.sort(key=len, reverse=True)

    def clean(value: Any, path: tuple[str, ...] = ()) -> Any:
        if isinstance(value, Mapping):
            return {str(name): clean(item, (*path, str(name))) for name, item in value.items()}
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            return str(value)  # JSON readers know no larger ones
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
    """`engine.headers.authorization=…` of a command line with its value hidden, and everything else as it is; a whole
    mapping that names a secret is hidden, too."""
    name, equals, value = override.lstrip("+").partition("=")
    path = name.split(".")
    inside = re.search(r"(key|token|secret|password|authorization|cookie)\W*:", value, re.IGNORECASE)
    secret = _SECRET_NAME.search(path[-1]) if len(path) > 2 else inside
    return f"{name}=***" if ".".join(path[:2]) in _MAY_HOLD_SECRETS and secret and equals else override


def known_keys() -> dict[str, Any]:
    """Every key, dotted, with its dataclass field; the generation parameters, which are checked by name, have no type."""
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


def _absolute(path: str) -> bool:
    """Whether it means the same from every directory."""
    return "://" in path or Path(path).expanduser().is_absolute()
