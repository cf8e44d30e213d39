"""`engine.fallback`: what one engine failed for good, or refused to answer, goes to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from engines.base import Engine
from engines.config import EngineConfig, SourceOf
from engines.params import GenerationParams
from engines.types import Completion, Request


class FallbackEngine(Engine):
    """Engines in a row. A completion's `engine` and `model` tell which one answered."""

    def __init__(self, config: EngineConfig, engines: Sequence[Engine]) -> None:
        self.engines = list(engines)
        super().__init__(config)
        self.kind = config.kind  # type: ignore[misc]
        self.counts = self.engines[0].counts

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "afford":
            for engine in self.engines:
                engine.check_budget = self.check_budget

    @property
    def admitted(self) -> float | None:
        return self.engines[0].admitted

    @property
    def stall_reason(self) -> str:
        return self.engines[0].stall_reason

    @property
    def concurrency(self) -> int:
        return self.engines[0].concurrency

    def check(self, generation: GenerationParams) -> None:
        for engine in self.engines:
            engine.check(generation)

    def attach(self, source_of: SourceOf, max_outage_s: float) -> None:
        for engine in self.engines:
            engine.attach(source_of, max_outage_s)

    def drain(self) -> None:
        for engine in self.engines:
            engine.drain()

    async def _generate(self, request: Request) -> Completion:
        raise AssertionError("generate() never comes here")

    async def generate(self, request: Request) -> Completion:
        before = Completion(attempts=0)
        for engine in self.engines:
            completion = await engine.generate(request)
            completion.accumulate(before)
            before = completion
            refused = completion.finish_reason == "content_filter"
            # An engine that is broken must be replaced, and not hidden behind what may cost money.
            ends = completion.error is not None and completion.error.type in ("cancelled", "engine_crash")
            seen = request.stream is not None and request.stream.begun  # another's words would follow the first one's
            if ends or seen or (completion.error is None and not refused):
                break
            # The row's own model and adapter are names of the first engine.
            request = dataclasses.replace(request, model=None, adapter=None)
        self.outage = self.engines[-1].outage
        return completion

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
