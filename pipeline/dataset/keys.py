"""The identity of a request: what must be equal for an answer to be the answer.

A key is sha256 over the canonical effective request: engine wire, model, revision, adapter, base URL, generation
parameters, messages. Secrets, concurrency, retries and anything else that only changes how fast an answer comes are
left out, so changing them re-asks nothing. A request whose answer is sampled (a temperature above 0 and no seed) wants
a fresh answer for each row; its key also covers the row's own id or, where it has none, its file and row number.
"""

from __future__ import annotations

import hashlib
from typing import Any

from engines.config import EngineConfig
from engines.params import GenerationParams
from pipeline.dataset.formats import Parsed
from pipeline.storage.exact_json import canonical, dumps

KEY_BYTES = 32


class RequestHasher:
    """Keys for the rows of one run: the part that all rows share is hashed once."""

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
        if "response_format" in given:  # a model writes in the order of the schema's properties: it shapes the answer
            given["response_format"] = dumps(given["response_format"]).decode()
        digest.update(canonical(given))
        return digest


def is_sampled(generation: GenerationParams) -> bool:
    """Whether two equal requests may rightly get different answers."""
    return bool(generation.temperature) and generation.seed is None
