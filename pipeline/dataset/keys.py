"""The key of a request. Requests with equal keys share one answer.

A key is the sha256 of the canonical effective request: engine wire, model, revision, adapter, base URL, generation
parameters, messages. Secrets, concurrency, retries and other settings that only change the speed are left out, so a change
of them does not repeat requests. A sampled request (temperature above 0 and no seed) needs its own answer for each row.
Its key also covers the row's id or, without an id, its file and row number.
"""

from __future__ import annotations

import hashlib
from typing import Any

from engines.config import EngineConfig
from engines.params import GenerationParams
from pipeline.dataset.formats import Parsed
from pipeline.storage.exact_json import canonical, dumps


class RequestHasher:
    """Computes the keys of one run's rows. The part that all rows share is hashed once."""

    def __init__(self, engine: EngineConfig, generation: GenerationParams) -> None:
        self.engine = engine
        self.generation = generation
        self._shared = hashlib.sha256(canonical(engine.identity()))
        self._plain = self._with_generation(generation)
        self._plain_sampled = is_sampled(generation)

    def __reduce__(self) -> tuple[Any, ...]:  # hash objects do not pickle
        return RequestHasher, (self.engine, self.generation)

    def key(self, parsed: Parsed, place: str) -> bytes:
        """The key of one row; `place` is its file and row number. Raises `EngineError` for a bad override."""
        if parsed.generation:
            generation = self.generation.override(parsed.generation)
            digest, sampled = self._with_generation(generation), is_sampled(generation)
        else:
            digest, sampled = self._plain.copy(), self._plain_sampled
        if parsed.model or parsed.adapter:
            digest.update(canonical([parsed.model, parsed.adapter]))
        digest.update(canonical(parsed.messages))
        if parsed.turns:
            digest.update(b"\0turns" + canonical(parsed.turns))
        if sampled:
            digest.update(b"\0" + (f"id:{parsed.id}" if parsed.id is not None else f"at:{place}").encode())
        return digest.digest()

    def _with_generation(self, generation: GenerationParams) -> hashlib._Hash:
        digest = self._shared.copy()
        given = generation.given()
        if "response_format" in given:  # keeps the order of properties: a model writes them in the order of the schema
            given["response_format"] = dumps(given["response_format"]).decode()
        digest.update(canonical(given))
        return digest


def is_sampled(generation: GenerationParams) -> bool:
    """True if equal requests may get different answers: the temperature is above 0 and there is no seed."""
    return bool(generation.temperature) and generation.seed is None
