"""Batches for programs: `engine.infer_batch(conversations)`, `get_batch_status`, `get_batch_results` and more."""

from __future__ import annotations

import hashlib
import io
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from engines.errors import ConfigError, EngineError, Failure
from engines.params import GenerationParams
from engines.types import Completion, Conversation, Request
from engines.usage import Usage

if TYPE_CHECKING:
    from engines.remote.batch.client import BatchEngine, BatchStatus, BatchWire


class Batches:
    """The batch methods of an engine. They raise `ConfigError` where the engine's provider has no batch API.

    An answer belongs to a conversation by a hash of its request, so the order and number of conversations may change.
    """

    def infer_batch(
        self: Any,
        conversations: Iterable[Conversation | Mapping[str, Any]],
        generation: GenerationParams | Mapping[str, Any] | None = None,
    ) -> str:
        """Submits one batch and returns its id. Raises `EngineError` for an invalid conversation or a provider's error."""
        from engines.remote.batch.client import Requests
        from engines.remote.batch.factory import encoded

        engine, wire = self._batches()
        lines = {id: engine.body(request) for id, request in self._named(conversations, generation)}
        data = b"".join(encoded(wire, id, body, engine) for id, body in lines.items())
        if not lines:
            raise ConfigError("infer_batch needs a conversation")
        if len(lines) > wire.max_rows or len(data) > wire.max_bytes:
            raise ConfigError(
                f"a batch of engine={engine.kind} holds at most {wire.max_rows:,} requests and {wire.max_bytes:,} bytes, "
                f"not {len(lines):,} and {len(data):,}; eagleray batch splits datasets"
            )
        models = {str(body.get("model")) for body in lines.values()}
        if len(models) > 1:
            raise ConfigError(f"infer_batch takes one model at a time, not {', '.join(sorted(models))}")
        model = models.pop()
        requests = Requests(f"eagleray-{secrets.token_hex(8)}", model, len(lines), len(data), lambda: io.BytesIO(data))
        try:
            return wire.submit(requests, wire.upload(requests))
        finally:
            wire.client.close()

    def get_batch_status(self: Any, batch_id: str) -> BatchStatus:
        """The state of a batch: `.status` is a `BatchState`."""
        _, wire = self._batches()
        return wire.status(batch_id)

    def get_batch_results(
        self: Any,
        batch_id: str,
        conversations: Sequence[Conversation | Mapping[str, Any]],
        generation: GenerationParams | Mapping[str, Any] | None = None,
    ) -> list[Completion]:
        """The completions of `conversations`, in their order. One that the batch has no answer for has an error.

        `generation` must be the one that `infer_batch` was called with.
        """
        from engines.remote.batch.client import BatchState
        from engines.structured import in_shape

        engine, wire = self._batches()
        status = wire.status(batch_id)
        if status.status is BatchState.IN_PROGRESS:
            raise EngineError("not_found", f"batch {batch_id} is still in progress", retryable=True)
        asked, found = dict(self._named(conversations, generation)), {}
        for custom_id, outcome in wire.results(status):
            if custom_id not in asked:
                continue
            try:
                completion = engine.read(outcome, asked[custom_id].generation.n)
            except EngineError as error:
                completion = Completion(error=Failure.of(error), usage=error.usage or Usage())
            completion.cost_usd = engine.cost(completion.usage, asked[custom_id].model, completion.model, batch=True)
            found[custom_id] = completion
        absent = Completion(error=Failure("not_found", status.error or f"batch {batch_id} has no answer to this"))
        completions = [in_shape(found.get(id, absent), request.generation) for id, request in asked.items()]
        for completion in completions:
            completion.engine, completion.model = engine.kind, completion.model or engine.config.model
        return completions

    def list_batches(self: Any) -> list[BatchStatus]:
        """All batches of the account, the newest first."""
        return list(self._batches()[1].list())

    def cancel_batch(self: Any, batch_id: str) -> None:
        """Asks the provider to end a batch. Its answers so far can still be fetched."""
        self._batches()[1].cancel(batch_id)

    def _batches(self: Any) -> tuple[BatchEngine, BatchWire]:
        from engines.remote.batch.factory import wire_of  # loads modules that an engine without batches does not need

        return wire_of(self)

    def _named(
        self: Any,
        conversations: Iterable[Conversation | Mapping[str, Any]],
        generation: GenerationParams | Mapping[str, Any] | None,
    ) -> Iterator[tuple[str, Request]]:
        """Requests with a name each: a hash of the request, and a number that tells equal requests apart."""
        from engines.types import to_request

        base = generation if isinstance(generation, GenerationParams) else GenerationParams.parse(generation or {})
        seen: Counter[str] = Counter()
        for conversation in conversations:
            request = self.prepared(to_request(conversation, base))
            body = orjson.dumps(self.body(request), option=orjson.OPT_SORT_KEYS)
            digest = hashlib.sha256(body).hexdigest()[:48]
            seen[digest] += 1
            yield f"{digest}-{seen[digest]}", request
