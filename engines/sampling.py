"""Tells whether equal requests may get different answers."""

from __future__ import annotations

import functools
from typing import Any

from engines.config import EngineConfig
from engines.params import GenerationParams
from engines.remote.provider import Provider


class SamplingRule:
    """The sampling of one engine, by the parameters that reach its model."""

    def __init__(self, engine: EngineConfig) -> None:
        self.engine = engine
        self.provider = Provider.of(engine) if engine.provider else None
        self._for_model = functools.lru_cache(maxsize=1024)(self.provider.for_model) if self.provider else None

    def is_sampled(self, generation: GenerationParams, model: str | None = None) -> bool:
        """True if the temperature is above 0 and there is no seed. `model`: the row's own.

        Without a temperature, local engines decode greedily and providers sample. A parameter that a provider does not
        take, such as the temperature of a reasoning model, does not count. It may take one beside certain values of another
        parameter only (`Provider.conditions`).
        """
        temperature = self._effective("temperature", generation, model)
        if temperature is None:
            temperature = 0.0 if self.provider is None else 1.0
        return temperature != 0 and self._effective("seed", generation, model) is None

    def _effective(self, name: str, generation: GenerationParams, model: str | None) -> Any:
        if (value := self.engine.extra_body.get(name)) is not None:
            return value
        value = getattr(generation, name)
        if self._for_model is None:
            return value
        provider = self._for_model(model or self.engine.model)
        if name in provider.unsupported or name in provider.ignored or not provider.meets_conditions(name, generation):
            return None
        return value if value is not None else provider.defaults.get(name)
