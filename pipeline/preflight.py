"""What can be known before a run: of its rows, its engine and its output directory. Nothing is asked, nothing written.

`run.dry_run=true` reads everything and shows the first requests as they would be sent. A real run looks at its
configuration and the first rows only, and ends at once where no row could be answered.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import sys
import time
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engines.base import Engine, EngineConfig, engine_class, fallbacks, missing_package
from engines.batch.connect import no_batch_api
from engines.footprint import Prompts, footprint, holds_model, prompts
from engines.remote.auth import Auth
from engines.remote.engine import RemoteEngine
from engines.remote.provider import Provider, endpoints
from engines.text import for_template, visible
from engines.types import (
    BYTES_PER_TOKEN,
    DEFAULT_MAX_TOKENS,
    FIRST_OUTPUT,
    ConfigError,
    EngineError,
    Message,
    Request,
    answer,
)
from pipeline.budget import batch_share
from pipeline.config import Config, without_secrets
from pipeline.feed import Interpreter, Item, Piece
from pipeline.fs import exists, listing
from pipeline.ledger import Index, read_index
from pipeline.lock import held
from pipeline.lossless import dumps
from pipeline.manifest import unchanged
from pipeline.recognise import MANIFEST, SEGMENTS

# A real run's look at its input: at most so many rows, and so long for listing it and for reading them.
FIRST_ROWS, FIRST_S = 1000, 1.0
SHOWN = 3  # requests, and examples of what is wrong
# Longer texts in a request that is shown are cut.
SHOWN_TEXT = 2000

Line = tuple[str, str, bool]  # title, text, whether it tells a problem
Check = Callable[[Request], None]  # raises `EngineError` where a request cannot be asked


# -- rows -------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Rows:
    """What the dataset holds. Tokens are those of distinct requests: equal deterministic ones are asked once."""

    config: Config
    context: int | None = None  # of the model, in tokens, where it is known
    count: Prompts | None = None  # counts as the model does; without it bytes are taken for tokens
    check: Check | None = None
    whole: bool = True  # all rows were read
    files: int = 0
    rows: int = 0
    size: int = 0  # bytes of their columns as JSON, where not all were read
    answered: int = 0  # the ledger has them
    keys: set[bytes] = field(default_factory=set)  # 8 bytes of each distinct request's
    prompts: array[int] = field(default_factory=lambda: array("q"))
    output: float = 0.0  # tokens all answers may have
    bounded: bool = True  # by max_tokens
    invalid: int = 0
    reasons: list[str] = field(default_factory=list)
    refused: int = 0  # requests that the engine does not take
    refusals: list[str] = field(default_factory=list)
    too_long: int = 0  # prompts that do not fit the context
    cut: int = 0  # answers that max_tokens allows and the context does not
    long: list[str] = field(default_factory=list)  # examples of both
    first: list[tuple[str, Request]] = field(default_factory=list)  # the first that would be asked, by id
    models: set[str] = field(default_factory=set)  # that rows name themselves

    @property
    def duplicates(self) -> int:
        return self.rows - self.invalid - self.answered - len(self.keys)

    @property
    def bad(self) -> int:
        return self.invalid + self.refused + self.too_long

    def read(
        self, pieces: list[Piece], interpreter: Interpreter, known: Index | None = None, most: int = sys.maxsize,
        seconds: float = math.inf,
    ) -> Rows:  # fmt: skip
        """Reads all rows, or those that come first."""
        self.files = len({piece.chunk.file for piece in pieces})
        until = time.monotonic() + seconds
        for items in (items for piece in pieces for items in interpreter.read(piece)):
            keys = {id(item): item.key for item in items if item.key}
            answered = set(compress(keys, known.find(list(keys.values())) >= 0)) if known is not None else set()
            for item in items:
                if self.rows >= most or (self.rows % 32 == 0 and time.monotonic() > until):
                    self.whole = False
                    return self
                self.rows += 1
                if most < sys.maxsize:
                    self.size += len(dumps(item.row.columns)) + 1 if item.row.columns is not None else 0
                if id(item) in answered:
                    self.answered += 1
                else:
                    self._add(item)
        return self

    def _add(self, item: Item) -> None:
        interpreted = self.config.params()
        failure, tokens, turns, request = item.failure.message if item.failure else "", 0, 0, None
        try:
            if parsed := item.parsed:
                interpreted, key = interpreted.override(parsed.generation), (item.key or b"").hex()
                request = Request(parsed.messages, interpreted, parsed.model, parsed.adapter, key, turns=parsed.turns)
                turns = len(request.turns)
                # Of a script: its last request, without what the model says before.
                last: list[Message] = [*request.messages]
                for turn in request.turns:
                    last += [answer(""), Message(role="user", content=turn)]
                if self.count:
                    tokens = self.count.count(last, interpreted)
                else:  # as a remote engine reserves, before the provider has told better; images are left out
                    shown = [*map(for_template, last), *(interpreted.tools or ())]
                    tokens = round(len(dumps(shown)) / BYTES_PER_TOKEN)
        except EngineError as error:
            failure = f"{item.id}: {error}"
        if failure or not item.key or request is None:
            self.invalid += 1
            self.reasons += [failure] if len(self.reasons) < SHOWN else []
            return
        limit = interpreted.max_tokens
        context = self.context or math.inf
        if tokens + (limit or 1) > context:  # without max_tokens an answer gets what is left
            self.too_long += tokens >= context
            self.cut += tokens < context
            room = f" and {limit:,} for the answer" if limit else ""
            self.long += [f"{item.id}: {tokens:,} tokens{room}"] if len(self.long) < SHOWN else []
        if item.key[:8] in self.keys:
            return
        self.keys.add(item.key[:8])
        if request.model is not None and len(self.models) < SHOWN:
            self.models.add(request.model)
        self.prompts.append(tokens)
        remote = bool(self.config.engine.provider)
        most = limit or (FIRST_OUTPUT if remote else DEFAULT_MAX_TOKENS)
        self.output += (turns + (interpreted.n or 1)) * max(0, min(most, context - tokens))
        self.bounded &= bool(limit or not remote)
        if len(self.first) < SHOWN:
            self.first.append((item.id, request))
        try:
            if self.check is not None:
                self.check(request)
        except EngineError as error:
            self.refused += 1
            self.refusals += [f"{item.id}: {error}"] if len(self.refusals) < SHOWN else []

    # -- in words -----------------------------------------------------------------------------------------------------

    @property
    def way(self) -> str:
        return "by the model's tokenizer and template" if self.count else "estimated: 4 bytes of JSON each"

    @property
    def answers(self) -> str:
        words = "at most" if self.bounded else "about (nothing bounds all of them; see generation.max_tokens)"
        return f"{words} {self.output:,.0f}"

    def lengths(self, bad: bool) -> Iterator[Line]:
        """What does not fit the context."""
        if self.too_long + self.cut:
            fit = f"{self.too_long:,} prompts do not fit {self.context:,} tokens"
            yield "too long", f"{fit}; {self.cut:,} answers may be cut short by it", bad
            yield from (("", example, bad) for example in self.long)

    def cost(self, factor: float = 1.0) -> str:
        """What the requests of these rows cost, in words."""
        engine, batch = self.config.engine, self.config.run.mode == "batch"
        price, share = engine.price, batch_share(engine) if batch else 1.0
        if not engine.provider and not price.known:
            return "none: the engine runs here"
        if not price.known:
            return "not known: engine.price.input and engine.price.output tell it"
        dollars = price.of(sum(self.prompts), 0, self.output) * factor * share
        words = "at most" if self.bounded and factor == 1 else "about"
        by = (f"the list price of {price.as_of}" if price.as_of else "engine.price") + " for batches" * batch
        others = f"; rows name other models ({', '.join(sorted(self.models))})" if self.models - {engine.model} else ""
        return f"{words} ${_dollars(dollars)} by {by}{others}"


def _dollars(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 1 or amount == 0 else f"{amount:.2g}" if amount >= 0.0001 else f"{amount:.1e}"


# -- the engine -------------------------------------------------------------------------------------------------------


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
    here = found.doubtful if _joins_a_cluster() else found.wrong
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


def _joins_a_cluster() -> bool:
    """Whether replicas may run on other machines, with packages and variables of their own."""
    ray = sys.modules.get("ray")
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())


def _unloaded(config: Config, engine: EngineConfig) -> Engine | None:
    """The engine, where making it loads no model, with every secret replaced. Raises `ConfigError`."""
    if engine.kind == "echo":
        return engine_class("echo")(engine)
    if not engine.provider:
        if engine.kind == "llamacpp":
            from engines.gguf import check_gguf_kwargs

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


# -- the output directory ---------------------------------------------------------------------------------------------


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


# -- a real run -------------------------------------------------------------------------------------------------------


def look_at_configuration(config: Config, fs: pafs.FileSystem, root: str, console: Console) -> Check | None:
    """Raises `ConfigError` where no row could be answered; what is doubtful is printed."""
    found = examine(config, thorough=False)
    if found.engine is not None:
        found.engine.close()
    # A complete output needs no engine; one that is to be made anew does.
    if found.wrong and not (config.run.resume and exists(fs, f"{root}/{MANIFEST}")):
        raise ConfigError(found.wrong[0])
    for text in found.doubtful:
        console.print(Text(f"On this machine: {text}", "yellow"))
    return found.check


def look_at_rows(
    config: Config, pieces: list[Piece], interpreter: Interpreter, check: Check | None, console: Console
) -> None:
    """Prints what the first rows tell of all."""
    try:
        found = Rows(config, check=check).read(pieces, interpreter, most=FIRST_ROWS, seconds=FIRST_S)
    except Exception:  # whoever reads it all says it, row by row; a look ahead ends no run
        return
    total = _total(pieces, found)
    factor = total / found.rows if total and found.rows else 1.0
    rows = f"{found.rows:,} rows in {found.files:,} files"
    if not found.whole:
        rows = f"About {total:,} rows, by the first {found.rows:,}" if total else f"The first {found.rows:,} rows"
    tokens = sum(found.prompts) * factor
    words = "at most" if found.bounded and found.whole else "about"
    cost = f"; cost: {found.cost(factor)}" if config.engine.provider or config.engine.price.known else ""
    console.print(
        f"{rows}: about {tokens:,.0f} tokens in, {words} {found.output * factor:,.0f} out{cost}.",
        highlight=False, markup=False,
    )  # fmt: skip
    for number, what, examples in (
        (found.invalid, "cannot be read", found.reasons),
        (found.refused, "are not for this engine", found.refusals),
    ):
        if number:
            of = "them" if found.whole else f"the first {found.rows:,} rows"
            text = f"{number:,} of {of} {what} and become error rows, such as {examples[0]}"
            console.print(Text(text[:400], "yellow"))


def _total(pieces: list[Piece], found: Rows) -> int | None:
    """How many rows there are in all; None where only reading them would tell."""
    if found.whole:
        return found.rows
    if pieces and all(piece.limit is not None for piece in pieces):
        return sum(piece.limit or 0 for piece in pieces)
    if found.size and all(piece.chunk.kind == "jsonl" and piece.chunk.stop >= 0 for piece in pieces):
        size = sum(piece.chunk.stop - piece.chunk.start for piece in pieces)
        return max(found.rows, round(size / (found.size / found.rows)))
    return None


# -- a dry run --------------------------------------------------------------------------------------------------------


def dry_run(
    config: Config, fs: pafs.FileSystem, root: str, interpreter: Interpreter, pieces: list[Piece], console: Console
) -> tuple[Rows, list[str]]:
    """Reads everything and tells what a run would do. Returns the rows, and why it could not run at all."""
    index = read_index(fs, root)
    seen = examine(config, thorough=True)
    context, shape = _model_at_hand(config.engine)
    known = index.only(failed_too=not config.run.retry_failed)
    found = Rows(config, context, shape, seen.check).read(pieces, interpreter, known)
    if found.invalid and config.dataset.on_bad_input == "fail":
        seen.wrong.append(f"{found.reasons[0]} (dataset.on_bad_input=quarantine would go on)")
    complete = unchanged(config, fs, root, pieces, index) is not None
    state, unusable = output_state(fs, root, len(index), found.answered, complete)
    if unusable:
        seen.wrong.append(state)
    show(_about(config, found, seen, state, unusable), console)
    if found.first:
        console.print(Text(f"The first {len(found.first)} requests, as they would be sent:", "bold"))
    for id, request in found.first:
        console.print(Text(f"\n{visible(id)}", "bold cyan"))
        console.print(Text(shown_request(config, seen.engine, shape, request)), soft_wrap=True)
    if seen.engine is not None:
        seen.engine.close()
    return found, seen.wrong


def _model_at_hand(engine: EngineConfig) -> tuple[int | None, Prompts | None]:
    """The context and the prompts of a model that lies here; nothing is fetched from a hub."""
    if not holds_model(engine) or not engine.model:
        return None, None
    if engine.model != "smollm2" and not Path(engine.model).expanduser().exists():
        return None, None
    try:
        shape = footprint(engine)
        return (shape.context if shape else None), prompts(engine)
    except (ConfigError, ImportError):
        return None, None


def _about(config: Config, found: Rows, seen: Findings, state: str, unusable: bool) -> Iterable[Line]:
    yield (
        "dataset",
        f"{found.rows:,} rows in {found.files:,} files: {len(found.keys):,} requests to ask, "
        f"{found.duplicates:,} duplicates, {found.answered:,} already answered, {found.invalid:,} cannot be read.",
        False,
    )
    yield from (("", reason, True) for reason in found.reasons)
    yield "tokens in", f"{sum(found.prompts):,} ({found.way})", False
    yield "tokens out", found.answers, False
    yield "cost", found.cost(), False
    if config.run.budget_usd is not None:
        yield "budget", f"${config.run.budget_usd:g} for all runs into this output", False
    engine = config.engine
    yield "engine", " ".join(filter(None, (engine.kind, engine.model, engine.adapter))), False
    if found.refused:
        yield "refused", f"{found.refused:,} requests are not for this engine", True
        yield from (("", example, True) for example in found.refusals)
    yield from found.lengths(bool(found.too_long))
    yield "output", state, unusable
    for text in seen.doubtful:
        yield "here", f"{text} (the replicas' machines may have it)", True
    for text in seen.wrong:
        yield "cannot run", text, True


def show(lines: Iterable[Line], console: Console) -> None:
    """A table of titles and texts, problems in red."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    for title, text, bad in lines:
        # As Text: a row's own words may be in it and must not be obeyed as markup.
        table.add_row(title, Text(text, "red" if bad else ""))
    console.print(table, "", highlight=False)


def shown_request(config: Config, engine: Engine | None, shape: Prompts | None, request: Request) -> str:
    """A request as it would be sent: the HTTP of a remote engine, the prompt of a local one. Secrets are `***`."""
    try:
        if isinstance(engine, RemoteEngine):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                body = engine.body(engine.prepared(request))
            headers = {**engine.headers, **engine.auth.fixed}
            if engine.provider.auth == "google":
                headers["authorization"] = "Bearer ***"
            if engine.provider.idempotency_header:
                headers[engine.provider.idempotency_header] = f"{engine.run_id}-{request.key}"
            url = engine.endpoints.urls[0]
            if engine.provider.wire == "converse":  # boto3 signs it and moves the model into the URL
                url, headers = f"{url}/model/{body.pop('modelId')}/converse", {"authorization": "AWS4-HMAC-SHA256 ***"}
            lines = [f"POST {url}", *(f"{name}: {value}" for name, value in headers.items()), "", _pretty(body)]
            return visible("\n".join(lines))
        params = request.generation.given()
        aside = {name: value for name in ("model", "adapter") if (value := getattr(request, name)) is not None}
        asked = [f"{name}: {_pretty(value)}" for name, value in {**aside, **params}.items()]
        if shape is not None:
            return visible("\n".join([_cut(shape.text(request.messages, request.generation)), *asked]))
    except EngineError as error:
        return visible(f"(cannot be asked: {error})")
    return visible("\n".join([_pretty(request.messages), *asked]))


def _pretty(value: Any) -> str:
    return json.dumps(
        _shortened(value), ensure_ascii=False, indent=2 if isinstance(value, (dict, list)) else None, default=str
    )


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _shortened(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    return _cut(value) if isinstance(value, str) else value


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]}… ({len(text):,} characters)"
