"""A random sample of the rows of a dataset, as requests."""

from __future__ import annotations

import random
from dataclasses import replace

from rich.console import Console

from engines.config import EngineConfig
from engines.errors import ConfigError, EngineError, ErrorCode
from engines.prices import price_of
from engines.types import BYTES_PER_TOKEN, DEFAULT_MAX_TOKENS, FIRST_OUTPUT, Request
from pipeline.config import Config
from pipeline.dataset.formats import RowParser
from pipeline.dataset.keys import RequestHasher
from pipeline.dataset.plan import list_splits
from pipeline.dataset.reader import ReadSplit, RowReader
from pipeline.executors.requests import request_json, request_of
from pipeline.storage.exact_json import dumps, loads

# Text files are read in pieces of this size. Of a large dataset, only as many pieces are read as the sample has rows.
PIECE_BYTES = 4 << 20


def sample_requests(config: Config, count: int, console: Console) -> list[Request]:
    """`count` different requests, or all if there are fewer, from all parts of the dataset, in random order.

    Raises `ConfigError` if the dataset has no row that can be asked.
    """
    config = replace(config, dataset=replace(config.dataset, chunk_bytes=PIECE_BYTES))
    chance, params = random.Random(config.tune.seed), config.params()
    reader = RowReader(RowParser.of(config), RequestHasher(config.engine, params), config.dataset.max_row_bytes)
    splits = list_splits(config, console)
    found: dict[bytes, Request] = {}
    reason = "it has no rows"
    chance.shuffle(splits)
    for at, split in enumerate(splits):
        wanted = -(-(count - len(found)) // (len(splits) - at))  # of this split, so that all give about the same number
        if wanted <= 0:
            break
        some, failure = _some(split, reader, wanted, chance)
        reason = failure or reason
        for key, request in some:
            try:
                found.setdefault(key, request_of(loads(request), params, key))
            except EngineError as error:
                reason = str(error)
    if not found:
        raise ConfigError(f"no row of dataset.path can be asked: {reason}", code=ErrorCode.NO_ROW, key="dataset.path")
    requests = list(found.values())
    chance.shuffle(requests)
    return requests[:count]


def _some(split: ReadSplit, reader: RowReader, count: int, chance: random.Random) -> tuple[list[tuple[bytes, bytes]], str]:
    """Keys and JSON of `count` rows of a split, each row with the same chance, and the reason of a row that is invalid."""
    kept: list[tuple[bytes, bytes]] = []
    seen, reason = 0, ""
    for item in (item for items in reader.parse(split) for item in items):
        if item.key is None or item.parsed is None:
            reason = item.failure.message if item.failure else reason
            continue
        seen += 1
        place = len(kept) if len(kept) < count else chance.randrange(seen)
        if place < count:
            kept[place : place + 1] = [(item.key, request_json(item.parsed))]
    return kept, reason


def expected_costs(engine: EngineConfig, requests: list[Request]) -> list[float | None]:
    """About the US$ that the answer to each request costs, by the price of the request's model. None if it is not known.

    A local engine without a price is free.
    """
    models = dict.fromkeys(request.model for request in requests)  # None: the engine's own
    prices = {model: price_of(engine, model, None) if engine.provider else engine.price for model in models}
    costs: list[float | None] = []
    for request in requests:
        tokens = len(dumps([request.messages, request.generation.tools, request.inputs])) / BYTES_PER_TOKEN
        limit = request.generation.max_tokens or (FIRST_OUTPUT if engine.provider else DEFAULT_MAX_TOKENS)
        output = limit * ((request.generation.n or 1) + len(request.turns)) if request.messages else 0
        price = prices[request.model].at(tokens)
        is_known = not engine.provider or (price.input is not None and (price.output is not None or not output))
        costs.append(price.of(tokens, 0, output) if is_known else None)
    return costs
