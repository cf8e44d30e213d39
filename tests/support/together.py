"""A dispatcher for runs of two replicas that gives no rows before both have come."""

from __future__ import annotations

import asyncio
from typing import Any

from pipeline.executors.live.dispatcher import Dispatcher
from pipeline.executors.live.protocol import Lease


class Together(Dispatcher):
    """Without it, the first replica could answer all rows before the second one has started."""

    async def pull(self, *args: Any) -> Lease | None:
        while len(self.groups) < 2:
            await asyncio.sleep(0.05)
        return await super().pull(*args)
