"""The key of a request. Requests with equal keys share one answer.

A key is the sha256 of the canonical effective request: the engine's identity (`engines/identity.py`), generation
parameters, messages. Secrets, concurrency, retries and other settings that only change the speed are left out, so a change
of them does not repeat requests. A local file that a message names counts with its content.

If answers are sampled, each row needs its own answer. With a temperature above 0 and no seed, the key also covers the row's
id or, without an id, its file and row number. Rows whose keys are still equal are numbered (`occurrences.py`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from engines.config import EngineConfig
from engines.errors import EngineError
from engines.file_digest import FileDigest, file_digest
from engines.identity import Identity, adapter_identity, identity
from engines.media import is_text, local_path, media_in, source_of, url_of
from engines.params import GenerationParams
from engines.sampling import SamplingRule
from engines.tasks import CHAT
from engines.types import with_effect
from pipeline.dataset.formats import Parsed
from pipeline.storage.exact_json import canonical, dumps


class RowKey(NamedTuple):
    """The key of a row, before rows with equal keys are numbered."""

    key: bytes
    is_numbered: bool  # rows with this key are asked one by one
    names_files: bool  # the request names a local file or adapter
    names_place: bool  # the key covers the row's file and row number


class RequestHasher:
    """Computes the keys of one run's rows. The part that all rows share is hashed once.

    It is made on the driver. The engine's identity and the working directory travel with it, so that all nodes compute the
    same keys.
    """

    def __init__(
        self,
        engine: EngineConfig,
        generation: GenerationParams,
        engine_identity: Identity | None = None,
        base: str | None = None,
    ) -> None:
        self.engine, self.generation = engine, generation
        self.identity = engine_identity or identity(engine)
        self.base = str(Path.cwd()) if base is None else base
        self.rule = SamplingRule(engine)
        self._shared = hashlib.sha256(canonical(self.identity.values))
        self._version_1 = hashlib.sha256(canonical(self.identity.version_1))
        self._plain = self._with_generation(self._shared, generation)
        self._plain_names_row = _names_row(generation)
        self._plain_is_sampled = functools.lru_cache(maxsize=1024)(functools.partial(self.rule.is_sampled, generation))
        self._adapter = functools.lru_cache(maxsize=1024)(functools.partial(adapter_identity, engine, self.base))

    def __reduce__(self) -> tuple[Any, ...]:  # hash objects do not pickle
        return RequestHasher, (self.engine, self.generation, self.identity, self.base)

    @property
    def shared_digest(self) -> str:
        """A digest of what all rows share in their keys."""
        return self._plain.hexdigest()

    @property
    def differs(self) -> bool:
        """True if keys of earlier versions differ for all rows."""
        return self.identity.values != self.identity.version_1

    def key(self, parsed: Parsed, place: str) -> bytes:
        """The key of one row; `place` is its file and row number. Raises `EngineError` for a bad override."""
        return self.row_key(parsed, place).key

    def row_key(self, parsed: Parsed, place: str) -> RowKey:
        """As `key`, with what else is known of it."""
        generation = self._generation(parsed)
        if generation is self.generation:  # as nearly all rows
            digest, names_row = self._plain.copy(), self._plain_names_row
            sampled = parsed.task == CHAT and self._plain_is_sampled(parsed.model)
        else:
            digest, names_row = self._with_generation(self._shared, generation), _names_row(generation)
            sampled = parsed.task == CHAT and self.rule.is_sampled(generation, parsed.model)
        named = self._named_files(parsed)
        adapter = self._adapter(parsed.adapter)[0] if parsed.adapter else None
        key = _finished(digest, parsed, names_row, place, adapter, _readable(named) if named else {})
        by_place = parsed.id is None and names_row  # then no two rows have this key
        return RowKey(key, not by_place and sampled, bool(named) or adapter != parsed.adapter, by_place)

    def old_key(self, parsed: Parsed, place: str, until_ms: int) -> bytes | None:
        """The key that earlier versions gave this row; None if it is the same.

        None too if a local file of the request changed after `until_ms`, the time of the last answer of an earlier version,
        because the answer may be to the file before the change. In ms since the epoch.
        """
        files = _readable(self._named_files(parsed))
        adapter, changed = self._adapter(parsed.adapter) if parsed.adapter else (None, 0)
        if not self.differs and not files and adapter == parsed.adapter:
            return None
        changes = (self.identity.modified_ms, changed, *(digest.modified_ms for digest in files.values()))
        if max(changes) > until_ms:
            return None
        generation = self._generation(parsed)
        digest = self._with_generation(self._version_1, generation)
        return _finished(digest, parsed, _names_row(generation), place, parsed.adapter, {})

    def _named_files(self, parsed: Parsed) -> dict[str, FileDigest | None]:
        """The digests of the local files (images, audio, video) that a conversation names, by their URLs as they are
        written. None for files that cannot be read."""
        found: dict[str, FileDigest | None] = {}
        if parsed.only_text or is_text(parsed.messages, parsed.turns):
            return found
        for part, name in media_in([*(message.get("content") for message in parsed.messages), *parsed.turns]):
            with contextlib.suppress(EngineError, ValueError, RuntimeError):  # no URL, or one that is invalid
                url = url_of(part, name)
                if source_of(url) == "file":
                    found[url] = file_digest(local_path(url), self.base)
        return found

    def _generation(self, parsed: Parsed) -> GenerationParams:
        base = self.generation if parsed.task == CHAT else self.generation.for_task(parsed.task)
        return base.override(parsed.generation) if parsed.generation else base

    @staticmethod
    def _with_generation(shared: hashlib._Hash, generation: GenerationParams) -> hashlib._Hash:
        digest = shared.copy()
        given = generation.given()
        if "response_format" in given:  # keeps the order of properties: a model writes them in the order of the schema
            given["response_format"] = dumps(given["response_format"]).decode()
        digest.update(canonical(given))
        return digest


def _readable(named: dict[str, FileDigest | None]) -> dict[str, FileDigest]:
    return {url: digest for url, digest in named.items() if digest}


def numbered(key: bytes, number: int) -> bytes:
    """The key of the row with this number, from 0, among the rows with one key."""
    return hashlib.sha256(key + b"\0" + str(number).encode()).digest() if number else key


def _finished(
    digest: hashlib._Hash,
    parsed: Parsed,
    names_row: bool,
    place: str,
    adapter: str | None,
    files: dict[str, FileDigest],
) -> bytes:
    if parsed.model or adapter:
        digest.update(canonical([parsed.model, adapter]))
    digest.update(canonical(_with_digests(parsed.messages, files)))
    if parsed.turns:
        digest.update(b"\0turns" + canonical(_with_digests(parsed.turns, files)))
    if parsed.extra_body and (extra := with_effect(parsed.extra_body)):
        digest.update(b"\0body" + canonical(extra))
    if parsed.continue_answer:
        digest.update(b"\0continue")
    if parsed.task != CHAT:
        digest.update(b"\0task" + canonical([parsed.task, parsed.inputs]))
    if names_row:
        digest.update(b"\0" + (f"id:{parsed.id}" if parsed.id is not None else f"at:{place}").encode())
    return digest.digest()


def _names_row(generation: GenerationParams) -> bool:
    """True if keys also cover the row's id or place. Do not change: keys of existing ledgers depend on it."""
    return bool(generation.temperature) and generation.seed is None


def _with_digests(value: Any, files: dict[str, FileDigest]) -> Any:
    """The value with digests in the place of the URLs in `files`."""
    if not files:
        return value
    if isinstance(value, str):
        return f"sha256:{files[value].sha256}" if value in files else value
    if isinstance(value, list):
        return [_with_digests(each, files) for each in value]
    if isinstance(value, dict):
        return {name: _with_digests(each, files) for name, each in value.items()}
    return value
