"""Provider batches for programs: `engine.infer_batch(conversations)` and the methods beside it."""

from __future__ import annotations

import hashlib
import io
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import orjson

from engines.errors import ConfigError, EngineError, Failure
from engines.params import GenerationParams
from engines.types import Completion, Conversation, Request, to_request
from engines.usage import Usage

if TYPE_CHECKING:
    from engines.remote.batch.client import BatchEngine, BatchStatus

# The batch modules are imported in the methods: an engine that is never asked for a batch need not load them.


class Batches:
    """The batch methods of remote engines. They raise `ConfigError` if the provider has no batch API.

    Answers are matched to conversations by the content of the requests, so neither their order nor their number matters.
    """

    def infer_batch(
        self: BatchEngine,
        conversations: Iterable[Conversation | Mapping[str, object]],
        generation: GenerationParams | Mapping[str, object] | None = None,
    ) -> str:
        """Submits one batch and returns its id. Raises `EngineError` for an invalid conversation or a refused batch."""
        from engines.remote.batch.client import Requests
        from engines.remote.batch.factory import batch_limits, encoded, wire_of

        named = dict(_named(self, conversations, generation))
        tasks = {request.task for request in named.values()}
        if len(tasks) > 1:
            raise ConfigError(f"infer_batch takes one task at a time, not {', '.join(sorted(tasks))}")
        engine, wire = wire_of(self, *tasks)
        lines = {id: engine.body(engine.load_media_sync(request)) for id, request in named.items()}
        data = b"".join(encoded(wire, id, body, engine) for id, body in lines.items())
        if not lines:
            raise ConfigError("infer_batch needs a conversation")
        max_rows, max_bytes = batch_limits(engine.provider.batch)
        if len(lines) > max_rows or len(data) > max_bytes:
            raise ConfigError(
                f"a batch of engine={engine.kind} holds at most {max_rows:,} requests and {max_bytes:,} bytes, "
                f"not {len(lines):,} and {len(data):,}; eagleray batch splits datasets",
                key=f"engine={engine.kind}",
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

    def get_batch_status(self: BatchEngine, batch_id: str) -> BatchStatus:
        """The state of a batch: its `.status` is one of `BatchState`."""
        from engines.remote.batch.factory import wire_of

        return wire_of(self)[1].status(batch_id)

    def get_batch_results(
        self: BatchEngine,
        batch_id: str,
        conversations: Sequence[Conversation | Mapping[str, object]],
        generation: GenerationParams | Mapping[str, object] | None = None,
    ) -> list[Completion]:
        """The completions of `conversations`, in their order. A conversation without an answer gets an error.

        `generation` must be the one that `infer_batch` was called with.
        """
        from engines.remote.batch.client import BatchState
        from engines.remote.batch.factory import wire_of
        from engines.structured import checked_once

        engine, wire = wire_of(self)
        status = wire.status(batch_id)
        if status.status is BatchState.IN_PROGRESS:
            raise EngineError("not_found", f"batch {batch_id} is still in progress", retryable=True)
        asked, found = dict(_named(engine, conversations, generation)), {}
        for custom_id, outcome in wire.results(status):
            if custom_id not in asked:
                continue
            try:
                completion = engine.read_batched(outcome, asked[custom_id])
            except EngineError as error:
                completion = Completion(error=Failure.of(error), usage=error.usage or Usage())
            completion.cost_usd = engine.cost(completion.usage, asked[custom_id].model, completion.model, batch=True)
            found[custom_id] = completion
        absent = Completion(error=Failure("not_found", status.error or f"batch {batch_id} has no answer to this"))
        completions = [
            checked_once(found.get(id, absent), request.generation, engine.null_for_absent(request.model))
            for id, request in asked.items()
        ]
        for completion in completions:
            completion.engine, completion.model = engine.kind, completion.model or engine.config.model
        return completions

    def list_batches(self: BatchEngine) -> list[BatchStatus]:
        """All batches of the account, the newest first."""
        from engines.remote.batch.factory import wire_of

        return list(wire_of(self)[1].list())

    def cancel_batch(self: BatchEngine, batch_id: str) -> None:
        """Asks the provider to end a batch. Answers that exist by then can still be fetched."""
        from engines.remote.batch.factory import wire_of

        wire_of(self)[1].cancel(batch_id)


def _named(
    engine: BatchEngine,
    conversations: Iterable[Conversation | Mapping[str, object]],
    generation: GenerationParams | Mapping[str, object] | None,
) -> Iterator[tuple[str, Request]]:
    """Requests with names that are hashes of their content; equal requests get numbers."""
    base = generation if isinstance(generation, GenerationParams) else GenerationParams.parse(generation or {})
    seen: Counter[str] = Counter()
    for conversation in conversations:
        request = engine.prepared(to_request(conversation, base))
        body = orjson.dumps(engine.body(request), option=orjson.OPT_SORT_KEYS)
        digest = hashlib.sha256(body).hexdigest()[:48]
        seen[digest] += 1
        yield f"{digest}-{seen[digest]}", request
