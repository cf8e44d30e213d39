"""The rate limits of a key, shared by the whole cluster: one Ray actor holds them, and workers reserve in portions.

A worker reserves for all its waiting requests in one call, one call at a time. So the actor gets few calls, even for many
rows. If it dies, a new actor starts with nothing available, so there is no burst. The reservations of the old actor end
within a second.
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
    """Holds the limits of one key."""

    def __init__(self, limits: dict[str, float | None]) -> None:
        self.limiters = RateLimiters(limits)

    async def reserve(self, model: str, request: ReserveRequest) -> Reservation:
        return self.limiters.reserve(model, request)


def rate_limit_actor(config: EngineConfig) -> Any:
    """The actor with the limits of this engine's key. All runs with the key on one cluster share it."""
    import ray

    # The name depends on the key's environment variable, never on the key.
    digest = hashlib.sha256(canonical([config.kind, config.base_url, config.api_key_env])).hexdigest()[:16]
    options = {"name": f"eagleray-limiter-{digest}", "namespace": NAMESPACE, "get_if_exists": True}
    return ray.remote(RateLimitActor).options(num_cpus=0, max_restarts=-1, **options).remote(per_minute(config))


def reserve_through_ray(config: EngineConfig) -> Reserve:
    """The function by which an engine in this worker reserves."""
    from ray.exceptions import RayActorError

    actor: Any = None
    # Another run may have made the actor with higher limits than ours. The lower limits count.
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
            except RayActorError:  # it is restarting, or it died with the run that made it
                actor = None
                await asyncio.sleep(0.2)

    return reserve
