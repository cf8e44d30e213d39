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

from engines.config import GENERATION_HELP, EngineConfig, key
from engines.errors import ConfigError, EngineError, ErrorCode, nearest
from engines.fallback_prices import most_expensive
from engines.params import GENERATION_FIELDS, GenerationParams, json_schema_of
from engines.registry import REGISTRY, check_task, fallbacks
from engines.structured import check_schema
from engines.tasks import CHAT, TASKS, refused_parameter
from engines.tuning import TuneConfig
from engines.url_secrets import without_url_secrets
from engines.validation import Refused, above, at_least, between, check_fields, check_value, one_of
from pipeline.hardware import HardwareConfig, hardware_entries

# The values of `run.mode`. `pipeline/executors/registry.py` adds the name of each executor when it is imported.
RUN_MODES: list[str] = []
# The value of `output.path` that means standard output.
STDOUT = "-"
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


# -- the sections -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class DatasetConfig:
    path: Any = key(
        None,
        "a file, directory, glob or list of these (JSON lines, JSON, CSV, TSV, Parquet, Arrow); local, s3://, gs://, "
        "az://, hf:// or any fsspec URL; delta://TABLE or a .lance directory; -: standard input",
        _path_or_paths,
    )
    format: str = key("auto", "auto, messages, oumi, openai_batch, sharegpt, prompt or turns")
    limit: int | None = key(None, "maximum number of rows to read", at_least(1))
    sample: int | None = key(
        None, "number of rows to take at random, from the first dataset.limit rows if that is set", at_least(1)
    )
    sample_seed: int = key(0, "seed of dataset.sample: the same seed takes the same rows")
    columns: dict[str, Any] = key(
        {}, "maps a role to a column, for example {prompt: question, id: qid}; null makes a column data: {model: null}"
    )
    template: Any = key(
        None, "a Jinja template that builds a conversation from a row: a text, @FILE, or {system: …, user: …}"
    )
    last_answer: str = key(
        "drop",
        "for a conversation that ends with an answer: drop moves it into the column reference, keep sends it, "
        "continue asks for the rest of it",
        one_of(("drop", "keep", "continue")),
    )
    on_bad_input: str = key(
        "quarantine",
        "for an unreadable row: quarantine makes it an error row, fail stops the run",
        one_of(("quarantine", "fail")),
    )
    max_row_bytes: int = key(32 << 20, "maximum bytes of a row; a longer row becomes an error row", at_least(1))
    chunk_bytes: int = key(32 << 20, "bytes of input for one read task", at_least(1))


@dataclass(slots=True)
class OutputConfig:
    path: str | None = key(None, "the output directory; local or any filesystem URL; -: JSON lines to standard output")
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
    table: str | None = key(
        None, "a Delta or Lance table to which each answered row is appended once: delta://TABLE or NAME.lance"
    )
    overwrite: bool = key(
        False, "true: another dataset may replace the output in output.path; all answers stay in the ledger"
    )
    embedding: str = key(
        "float32", "the numbers in the column embedding: float32 or float16", one_of(("float32", "float16"))
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
        "batch",
        "for rows without an answer from a batch: batch (send another batch) or live (send requests)",
        one_of(("batch", "live")),
    )
    batch_poll_s: float = key(60.0, "maximum seconds between two status requests for a batch", above(0))
    dry_run: bool = key(False, "read, check and count the input; send no request and write nothing")
    traces: str | None = key(
        None, "the OTLP/HTTP address for OpenTelemetry traces, for example http://localhost:4318", _http_address
    )
    progress_s: float = key(10.0, "seconds between progress lines if the output is not a terminal", above(0))


@dataclass(slots=True)
class ServeConfig:
    host: str = key("127.0.0.1", "the address that eagleray serve listens on; 0.0.0.0: all addresses of the machine")
    port: int = key(8000, "the port that eagleray serve listens on; 0: any free port of this machine", between(0, 65535))
    api_key_env: str | None = key(
        None, "the environment variable with the API key that clients must send; unset: no key is required"
    )
    max_body_bytes: int = key(32 << 20, "maximum bytes of the body of a request", at_least(1))
    body_timeout_s: float = key(60.0, "maximum seconds until the body of a request has arrived", above(0))
    max_queued: int = key(1000, "maximum requests that wait for a replica; more of them get status 503", at_least(1))
    max_tokens: int | None = key(
        None,
        "maximum max_tokens of a request, and its value if neither the request nor generation.max_tokens sets it; "
        "unset: the model's own limit",
        at_least(1),
    )
    max_n: int = key(16, "maximum n of a request", at_least(1))
    max_logprobs: int = key(20, "maximum top_logprobs of a request", at_least(0))
    max_schema_retries: int = key(2, "maximum schema_retries of a request", at_least(0))
    max_images: int = key(16, "maximum images, audio and video in a request", at_least(0))
    max_texts: int = key(2048, "maximum texts or documents in a request of a task other than a chat", at_least(1))


@dataclass(slots=True)
class Config:
    task: str = key(
        CHAT,
        "what each row asks: chat (an answer), embed (an embedding of a text), classify (a label), score (a reward, or the "
        "relevance of a text to a query), rerank (an order of documents), loglikelihood (of an answer)",
        one_of(TASKS),
    )
    engine: EngineConfig = field(default_factory=EngineConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    generation: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(GENERATION_FIELDS))
    output: OutputConfig = field(default_factory=OutputConfig)
    run: RunConfig = field(default_factory=RunConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)

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
        check_fields("", self)
        for section in fields(self):
            if is_dataclass(values := getattr(self, section.name)):
                check_fields(section.name, values)
        for rule in _RULES:
            rule(self)


# -- rules over several keys ------------------------------------------------------------------------------------------


def _check_paths_given(config: Config) -> None:
    """A run needs a dataset and an output. A submitted job needs an output that does not go away with its files."""
    if config.dataset.path in (None, "", []):
        raise ConfigError("dataset.path is missing: name a file, directory or glob of conversations", key="dataset.path")
    if not config.output.path:
        raise ConfigError("output.path is missing: name a directory for the results", key="output.path")
    if _SUBMITTED in os.environ and not _is_absolute(config.output.path) and config.output.path != STDOUT:
        raise ConfigError(
            f"output.path={config.output.path} would be deleted with the job's copy of the working directory: "
            "name an absolute path that all nodes share, or s3://…",
            key="output.path",
        )


def _check_engine(config: Config) -> None:
    """The engine must be known, unless `engine.provider` describes it. Fallback engines are checked as well."""
    engine = config.engine
    if not engine.kind:
        raise ConfigError(f"engine.kind is missing{nearest('', REGISTRY)}", key="engine.kind")
    if not engine.provider:
        check_value("engine.kind", engine.kind, one_of(REGISTRY))
    check_fields("engine.price", engine.price)
    fallbacks(engine)


def _check_hardware(config: Config) -> None:
    """The entries of a mixed fleet must be complete, and answer alike."""
    hardware_entries(config.hardware, config.engine)


def _check_budget_has_price(config: Config) -> None:
    if config.run.budget_usd is not None:
        most_expensive(config.engine)


def _check_output_format(config: Config) -> None:
    if config.output.style != "eagleray" and config.output.format != "jsonl" and config.output.path != STDOUT:
        raise ConfigError(f"output.style={config.output.style} needs output.format=jsonl", key="output.style")
    if config.output.table is not None and (config.output.format != "parquet" or config.output.path == STDOUT):
        raise ConfigError("output.table needs output.format=parquet, which keeps the types of columns", key="output.table")


def _check_generation(config: Config) -> None:
    """The generation parameters, the JSON schema of answers, and the columns that come from it."""
    response_format = config.params().response_format
    if response_format is not None and response_format["type"] == "json_schema":
        try:
            check_schema(json_schema_of(response_format))
        except EngineError as error:
            raise ConfigError(f"generation.response_format: {error}", key="generation.response_format") from None


def _check_task(config: Config) -> None:
    """The engines must have the task, and the keys must have a meaning for it."""
    task = config.task
    if name := refused_parameter(task, config.params().values):
        raise ConfigError(f"generation.{name} has no meaning for task={task}", key=f"generation.{name}")
    if task == CHAT:
        return
    if config.output.columns is not None:
        raise ConfigError(f"output.columns has no meaning for task={task}, which has no text to read", key="output.columns")
    if config.dataset.last_answer == "continue":
        raise ConfigError(f"dataset.last_answer=continue has no meaning for task={task}", key="dataset.last_answer")
    for engine in (config.engine, *fallbacks(config.engine)):
        check_task(engine, task)


_RULES = (_check_engine, _check_hardware, _check_output_format, _check_budget_has_price, _check_generation, _check_task)


# Sections that accept any key.
OPEN_KEYS = (
    "engine.kwargs",
    "engine.headers",
    "engine.extra_body",
    "engine.provider",
    "engine.price.above",
    "engine.price.batch",
    "dataset.columns",
    "hardware.label_selector",
)


_MAY_HOLD_SECRETS = (*OPEN_KEYS, "engine.fallback", "hardware.profiles")
# Names of keys in these sections whose values are secrets.
# `eos_token` and its like are tokens of a vocabulary.
_SECRET_NAME = re.compile(
    r"(^|[_-])(api[_-]?key|key|(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)(?<!mask_)(?<!stop_)(?<!image_)token|secret|password|"
    r"authorization|cookie)$",
    re.IGNORECASE,
)
_URL_PASSWORD = re.compile(r"(\w+://[^/\s:@]*:)[^/\s@]+@")
_SECRET_VARIABLE = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


def without_secrets(config: Config) -> dict[str, Any]:
    """The configuration as plain values that are safe to store or print: secrets are replaced by `***`.

    A secret is a value from an environment variable with a secret's name, or a value whose key has the name of a secret
    (`authorization`, `token`, …).
    """
    return cleaned(asdict(config))


def cleaned(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same for the sections of a configuration as plain values."""
    secrets = [value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= 8]
    secrets.sort(key=len, reverse=True)

    def clean(value: Any, path: tuple[str, ...] = ()) -> Any:
        if isinstance(value, Mapping):
            return {str(name): clean(item, (*path, str(name))) for name, item in value.items()}
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            return str(value)  # JSON readers do not support larger integers
        if isinstance(value, list):
            return [clean(item, path) for item in value]
        if isinstance(value, str) and not is_reference(value):
            if ".".join(path[:2]) in _MAY_HOLD_SECRETS and len(path) > 2 and _SECRET_NAME.search(path[-1]):
                return "***"
            for secret in secrets:
                value = value.replace(secret, "***")
            return without_url_secrets(_URL_PASSWORD.sub(r"\1***@", value))
        return value

    found: dict[str, Any] = clean(values)
    return found


# A reference to an environment variable, and what may stand before it in a header, such as `Bearer `.
_REFERENCE = re.compile(r"\$\{oc\.env:\w+\}")
_SCHEME = re.compile(r"[\w-]{0,8}\s?")


def is_reference(value: Any) -> bool:
    """True for a text that names the environment variable of a secret and has no secret itself: `Bearer ${oc.env:NAME}`."""
    return isinstance(value, str) and len(rest := _REFERENCE.split(value)) > 1 and all(map(_SCHEME.fullmatch, rest))


def literal_secrets(values: Mapping[str, Any]) -> list[str]:
    """The dotted keys of the secrets in values that are not resolved yet. References to variables are not secrets."""

    def without_references(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: found for name, item in value.items() if (found := without_references(item)) is not None}
        if isinstance(value, list):
            return [found for item in value if (found := without_references(item)) is not None]
        return None if is_reference(value) else _REFERENCE.sub("", value) if isinstance(value, str) else value

    rest = without_references(values)
    return _changed(rest, cleaned(rest))


def hidden_keys(config: Config) -> list[str]:
    """The dotted keys in whose values `without_secrets` replaces a secret."""
    return _changed(asdict(config), without_secrets(config))


def _changed(value: Any, clean: Any, path: str = "") -> list[str]:
    """The dotted keys of the texts in `value` that differ in `clean`."""
    if isinstance(value, Mapping):
        return [key for name in value for key in _changed(value[name], clean[str(name)], f"{path}.{name}".lstrip("."))]
    if isinstance(value, list):
        return [path] if any(_changed(*pair, path) for pair in zip(value, clean, strict=True)) else []
    return [path] if isinstance(value, str) and value != clean else []


def without_typed_secret(override: str) -> str:
    """An override of the command line without secrets; a mapping that contains one is replaced by `***`."""
    name, equals, value = override.lstrip("+").partition("=")
    path = name.split(".")
    inside = re.search(r"(key|token|secret|password|authorization|cookie)\W*:", value, re.IGNORECASE)
    secret = not is_reference(value) and (_SECRET_NAME.search(path[-1]) if len(path) > 2 else inside)
    hides = ".".join(path[:2]) in _MAY_HOLD_SECRETS and secret and equals
    return f"{name}=***" if hides else str(cleaned({"": override})[""])


def known_keys() -> dict[str, Any]:
    """Dotted key -> its dataclass field. Generation parameters have no type: `engines/params.py` checks them by name."""
    found: dict[str, Any] = {}
    for section in fields(Config):
        if section.name == "generation":
            found.update({f"generation.{name}": key(None, GENERATION_HELP[name]) for name in GENERATION_FIELDS})
            continue
        factory = section.default_factory
        if not is_dataclass(factory):  # a key without a section
            found[section.name] = section
            continue
        for item in fields(factory):
            found[f"{section.name}.{item.name}"] = item
    return found


def _is_absolute(path: str) -> bool:
    """True if the path does not depend on the working directory."""
    return "://" in path or Path(path).expanduser().is_absolute()
