"""`engine.fallback`: a request that one engine fails for good, or refuses to answer, goes to the next engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from engines.base import Engine
from engines.config import Capabilities
from engines.errors import REFUSALS, Failure
from engines.params import GenerationParams
from engines.remote.controls import CombinedControls, RemoteControls
from engines.types import Completion, Request
from engines.usage import Usage


class FallbackEngine(Engine):
    """Asks engines that are already built, in order. A completion's `engine` and `model` name the one that answered.

    Each engine answers a whole conversation (all turns, validated) before the next one is asked. An engine that has never
    answered, and refuses a request because of a wrong key, model, URL or parameter, is configured wrongly: its error is the
    result, and no further engine is asked.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = list(engines)
        self.first = self.engines[0]
        self.config = self.first.config
        self.kind = self.first.kind  # type: ignore[misc]
        controls = CombinedControls([engine.remote for engine in self.engines])
        self.controls = controls if controls.all else None
        self.works = [False] * len(self.engines)  # for each engine: it has answered a request

    @property
    def remote(self) -> RemoteControls | None:
        return self.controls

    @property
    def lowered_to(self) -> int | None:
        return self.first.lowered_to

    def at(self, place: int) -> Engine:
        return self.engines[place]

    @property
    def concurrency(self) -> int:
        return self.first.concurrency

    def concurrency_for(self, task: str) -> int:
        return self.first.concurrency_for(task)

    def check(self, generation: GenerationParams) -> None:
        for engine in self.engines:
            engine.check(generation)

    def capabilities_for(self, request: Request) -> Capabilities:
        return self.first.capabilities_for(request)

    def prepared(self, request: Request) -> Request:
        return self.first.prepared(request)

    def check_request(self, request: Request) -> None:
        self.first.check_request(request)

    def render_request(self, request: Request) -> str:
        return self.first.render_request(request)

    def cost(self, usage: Usage, asked: str | None, answered: str | None = None, *, batch: bool = False) -> float | None:
        """As the first engine's. A usage that is not known may be that of any of the engines."""
        if not usage.known and any(engine.cost(usage, None) is None for engine in self.engines[1:]):
            return None
        return self.first.cost(usage, asked, answered, batch=batch)

    async def generate(self, request: Request) -> Completion:
        before = Completion(attempts=0)
        for place, engine in enumerate(self.engines):
            completion = await engine.generate(request)
            completion.place = place
            completion.accumulate(before)
            completion.passed_on = before.passed_on or before.error
            before = completion
            if self._is_final(completion, request):
                break
            if self.controls is not None:
                self.controls.note_room()
            # A row's model and adapter are names of the first engine.
            request = dataclasses.replace(request, model=None, adapter=None)
        return completion

    def _is_final(self, completion: Completion, request: Request) -> bool:
        """True if no further engine is asked after this completion."""
        error, place = completion.error, completion.place
        # The engine read a request and its model said something, or was not allowed to.
        self.works[place] |= error is None or bool(completion.usage.output) or error.type == "content_filter"
        if error is None and completion.finish_reason != "content_filter":
            return True
        # A reader has seen the first words: another engine's words must not follow them.
        if request.stream is not None and request.stream.begun:
            return True
        if error is None:
            return False
        # A crashed engine must be replaced; a fallback that costs money must not hide the crash.
        # A request for which memory was too small at the moment is sent to the same engine again.
        if error.type in ("cancelled", "engine_crash") or error.needs_room:
            return True
        # A wrong configuration must not send all rows to an engine that costs more.
        return not self.works[place] and self._refuses_all(error, request, self.engines[place].config.model)

    def _refuses_all(self, error: Failure, request: Request, model: str | None) -> bool:
        """True if a server refuses this request for a reason that hits every request of its configuration."""
        if error.scope == "row" or error.type not in REFUSALS:
            return False
        if error.scope == "model":
            return request.model in (None, model)
        return error.type != "bad_request" or not request.own_generation

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
