"""`engine=echo`: answers with the last user message. For dry runs, tests, and measurements of the pipeline itself.

An answer depends only on the request, so two runs give the same rows. `kwargs`:
    latency_s      mean time of an answer, in seconds
    jitter_s       the time varies evenly by this much around the mean, in seconds
    failure_rate   share of requests that fail with a `server` error
    crash_rate     share of requests that kill the process, as a segmentation fault in an engine does
    crash_text     a request with this text in its last user message kills the process, after `latency_s`
    slow_every     one request in this many is slow (a straggler)
    slow_s         time of a slow answer, in seconds
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal

from engines.base import ModelEngine
from engines.config import Capabilities, EngineConfig
from engines.errors import EngineError, unknown_kwarg
from engines.types import Choice, Completion, Request, answer, text_of
from engines.usage import Usage
from engines.validation import check_value, number
from engines.validation import text as text_check

_DEFAULTS = {"latency_s": 0.0, "jitter_s": 0.0, "failure_rate": 0.0, "crash_rate": 0.0, "slow_every": 0.0, "slow_s": 0.0}


class EchoEngine(ModelEngine):
    """Answers with the last user message. Loading raises `ConfigError` for an unknown or negative keyword."""

    kind = "echo"
    capabilities = Capabilities(images=True, row_model=True, row_adapter=True)

    def _load(self) -> None:
        settings = dict(_DEFAULTS)
        kwargs = dict(self.config.kwargs)
        self.crash_text: str = check_value("engine.kwargs.crash_text", kwargs.pop("crash_text", ""), text_check)
        for name, value in kwargs.items():
            if name not in settings:
                raise unknown_kwarg(name, "echo", settings)
            settings[name] = check_value(f"engine.kwargs.{name}", value, number(0))
        self.settings = settings
        # No setting needs a random number, so requests are not hashed.
        self.plain = not any(settings.values()) and not self.crash_text

    @classmethod
    def unloaded(cls, config: EngineConfig) -> EchoEngine:
        return cls(config)

    @property
    def concurrency(self) -> int:
        return self.config.max_concurrency or 256

    async def _generate(self, request: Request) -> Completion:
        text = next((text_of(m) for m in reversed(request.messages) if m["role"] == "user"), None) or ""
        latency = 0.0 if self.plain else await self._misbehave(request, text)
        words = text.split()
        limit = request.generation.max_tokens
        cut = limit is not None and len(words) > limit
        if cut:
            words = words[:limit]
            text = " ".join(words)
        count = request.generation.n or 1
        usage = Usage(input=sum(len((text_of(m) or "").split()) for m in request.messages), output=len(words) * count)
        choices = [Choice(answer(text), "length" if cut else "stop") for _ in range(count)]
        return Completion(choices, usage, latency_s=latency)

    async def _misbehave(self, request: Request, text: str) -> float:
        """Waits, fails or crashes as the settings say, by a hash of the request. Returns the latency in seconds."""
        s = self.settings
        digest = hashlib.blake2b((request.key or text).encode(), digest_size=32).digest()
        fail, crash, jitter, slow = (int.from_bytes(digest[i : i + 8], "big") / 2**64 for i in range(0, 32, 8))
        if crash < s["crash_rate"]:
            os.kill(os.getpid(), signal.SIGKILL)
        latency = s["latency_s"] + (2 * jitter - 1) * s["jitter_s"]
        if s["slow_every"] and slow < 1 / s["slow_every"]:
            latency = s["slow_s"]
        if latency > 0:
            await asyncio.sleep(latency)
        if self.crash_text and self.crash_text in text:
            os.kill(os.getpid(), signal.SIGKILL)
        if fail < s["failure_rate"]:
            raise EngineError("server", "engine=echo was told to fail on this request", status=500, retryable=True)
        return latency
