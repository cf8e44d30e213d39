"""`engine.fallback`: a request that one engine fails for good, or refuses to answer, goes to the next engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from engines.base import Engine
from engines.config import Capabilities
from engines.params import GenerationParams
from engines.remote.controls import CombinedControls, RemoteControls
from engines.types import Completion, Request
from engines.usage import Usage


class FallbackEngine(Engine):
    """Asks engines that are already built, in order. A completion's `engine` and `model` name the one that answered.

    Each engine answers a whole conversation (all turns, validated) before the next one is asked.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = list(engines)
        self.first = self.engines[0]
        self.config = self.first.config
        self.kind = self.first.kind  # type: ignore[misc]
        controls = CombinedControls([engine.remote for engine in self.engines])
        self.controls = controls if controls.all else None

    @property
    def remote(self) -> RemoteControls | None:
        return self.controls

    @property
    def concurrency(self) -> int:
        return self.first.concurrency

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
        for engine in self.engines:
            completion = await engine.generate(request)
            completion.accumulate(before)
            before = completion
            refused = completion.finish_reason == "content_filter"
            # A crashed engine must be replaced; a fallback that costs money must not hide the crash.
            ends = completion.error is not None and completion.error.type in ("cancelled", "engine_crash")
            # A reader has seen the first words: another engine's words must not follow them.
            seen = request.stream is not None and request.stream.begun
            if ends or seen or (completion.error is None and not refused):
                break
            # A row's model and adapter are names of the first engine.
            request = dataclasses.replace(request, model=None, adapter=None)
        return completion

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
