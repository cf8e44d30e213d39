"""The limits of a key, shared by the whole cluster: one small Ray actor holds the budgets, workers ask in portions.

A worker asks for all that wait in it at once (`engines.remote.rate_limits.Limits`), one question at a time, so the actor
sees few calls however many rows there are. If it dies, a new one takes its place with empty pockets: what the old one
granted is over within a second, and the new one starts without a burst.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

from engines.config import EngineConfig
from engines.remote.rate_limits import RateLimiters, Reservation, Reserve, ReserveRequest, per_minute
from pipeline.storage.exact_json import canonical

NAMESPACE = "eagleray"


class RateLimitActor:
    """The actor."""

    def __init__(self, limits: dict[str, float | None]) -> None:
        self.limiters = RateLimiters(limits)

    async def reserve(self, model: str, request: ReserveRequest) -> Reservation:
        return self.limiters.reserve(model, request)


def rate_limit_actor(config: EngineConfig) -> Any:
    """The actor that keeps the limits of this engine's key; runs that use one key on one cluster share it."""
    import ray

    # By the name of the key's variable, never by the key.
    who = hashlib.sha256(canonical([config.kind, config.base_url, config.api_key_env])).hexdigest()[:16]
    options = {"name": f"eagleray-limiter-{who}", "namespace": NAMESPACE, "get_if_exists": True}
    return ray.remote(RateLimitActor).options(num_cpus=0, max_restarts=-1, **options).remote(per_minute(config))


def reserve_through_ray(config: EngineConfig) -> Reserve:
    """Where an engine in this worker asks."""
    from ray.exceptions import RayActorError

    actor: Any = None
    # Another run may have made the actor, with higher limits than ours: the lower ones count.
    configured: dict[str, float] = {name: limit for name, limit in per_minute(config).items() if limit is not None}

    async def reserve(model: str, request: ReserveRequest) -> Reservation:
        nonlocal actor
        while True:
            try:
                if actor is None:
                    actor = await asyncio.to_thread(rate_limit_actor, config)
                request.learned = {**configured, **request.learned}
                reservation: Reservation = await actor.reserve.remote(model, request)
                return reservation
            except RayActorError:  # it is being started anew, or died with the run that had made it
                actor = None
                await asyncio.sleep(0.2)

    return reserve
