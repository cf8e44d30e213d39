"""`engine=echo`: answers with the last user message. For dry runs, tests, and measurements of the pipeline itself.

An answer depends only on the request, so two runs give the same rows. The values of other tasks come from a hash of their
inputs. `kwargs`:
    latency_s      mean time of an answer, in seconds
    jitter_s       the time varies evenly by this much around the mean, in seconds
    failure_rate   share of requests that fail with a `server` error
    crash_rate     share of requests that kill the process, as a segmentation fault in an engine does
    crash_text     a request with this text in its last user message kills the process, after `latency_s`
    memory_rows    with more requests than this inside at once, each of them fails for lack of memory, after `latency_s`
    memory_text    a request with this text in its last user message needs more memory than there is
    memory_dies    true: the engine must be loaded again after a lack of memory
    memory_at_load true: there is no memory to load the engine
    slow_every     one request in this many is slow (a straggler)
    slow_s         time of a slow answer, in seconds
    embedding_length  the numbers of an embedding [8]
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from engines.base import ModelEngine
from engines.config import Capabilities, EngineConfig
from engines.errors import EngineError, ErrorType, OutOfMemory, invalid, unknown_kwarg
from engines.tasks import TASKS
from engines.types import Choice, Completion, Request, answer, text_of
from engines.usage import Usage
from engines.validation import check_value, number
from engines.validation import text as text_check

_LENGTH = {"embedding_length": 8.0}
_DEFAULTS = {"latency_s": 0.0, "jitter_s": 0.0, "failure_rate": 0.0, "crash_rate": 0.0, "slow_every": 0.0, "slow_s": 0.0}
_DEFAULTS |= {"memory_rows": 0.0}


class EchoEngine(ModelEngine):
    """Answers with the last user message. Loading raises `ConfigError` for an unknown or negative keyword."""

    kind = "echo"
    capabilities = Capabilities(
        images=True, row_model=True, row_adapter=True, extra_body=None, prefill=True, custom_tools=True,
        tasks=frozenset(TASKS),
    )  # fmt: skip

    def _load(self) -> None:
        settings = _DEFAULTS | _LENGTH
        kwargs = dict(self.config.kwargs)
        self.crash_text, self.memory_text = (
            str(check_value(f"engine.kwargs.{name}", kwargs.pop(name, ""), text_check))
            for name in ("crash_text", "memory_text")
        )
        self.memory_dies = bool(kwargs.pop("memory_dies", False))
        if kwargs.pop("memory_at_load", False):
            raise OutOfMemory("engine=echo was told to have no memory", alone=True, type="engine_crash")
        for name, value in kwargs.items():
            if name not in settings:
                raise unknown_kwarg(name, "echo", settings)
            settings[name] = check_value(f"engine.kwargs.{name}", value, number(0))
        self.settings = settings
        # No setting needs a random number, so requests are not hashed.
        self.plain = not any(settings[name] for name in _DEFAULTS) and not self.crash_text + self.memory_text
        self.inside = 0  # requests, unless `plain`

    @classmethod
    def unloaded(cls, config: EngineConfig) -> EchoEngine:
        return cls(
            replace(config, kwargs={name: config.kwargs[name] for name in config.kwargs if name != "memory_at_load"})
        )

    @property
    def concurrency(self) -> int:
        return self.config.max_concurrency or 256

    async def load_media(self, request: Request) -> Request:
        return request  # images are ignored

    async def _generate(self, request: Request) -> Completion:
        texts = [text_of(message) or "" for message in request.messages]
        asked = [text for message, text in zip(request.messages, texts, strict=True) if message["role"] == "user"]
        text = asked[-1] if asked else ""
        latency = 0.0 if self.plain else await self._misbehave(request, text)
        words = text.split()
        limit = request.generation.max_tokens
        cut = limit is not None and len(words) > limit
        if cut:
            words = words[:limit]
            text = " ".join(words)
        count = request.generation.n or 1
        usage = Usage(input=sum([len(each.split()) for each in texts]), output=len(words) * count)
        choices = [Choice(answer(text), "length" if cut else "stop") for _ in range(count)]
        return Completion(choices, usage, latency_s=latency)

    async def _evaluate(self, request: Request) -> Completion:
        said = request.inputs or {"messages": [text_of(m) or "" for m in request.messages]}
        text = json.dumps(said, ensure_ascii=False)
        latency = 0.0 if self.plain else await self._misbehave(request, text)
        words = sum(len(part.split()) for value in said.values() for part in ([value] if isinstance(value, str) else value))
        return Completion(values=_VALUES[request.task](self, request, said), usage=Usage(input=words), latency_s=latency)

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
        self.inside += 1
        try:
            if latency > 0:
                await asyncio.sleep(latency)
            await self._check_memory(text)
        finally:
            self.inside -= 1
        if self.crash_text and self.crash_text in text:
            os.kill(os.getpid(), signal.SIGKILL)
        if fail < s["failure_rate"]:
            raise EngineError("server", "engine=echo was told to fail on this request", status=500, retryable=True)
        return latency

    async def _check_memory(self, text: str) -> None:
        most = self.settings["memory_rows"]
        if (most and self.inside > most) or (self.memory_text and self.memory_text in text):
            alone = self.inside == 1
            await asyncio.sleep(0)  # all that are inside see the same number
            kind: ErrorType = "engine_crash" if self.memory_dies else "server"
            raise OutOfMemory("engine=echo was told to run out of memory", alone=alone, type=kind)


# -- the values of tasks --------------------------------------------------------------------------------------------------

_LABELS = ("negative", "neutral", "positive")


def _embed(engine: EchoEngine, request: Request, said: Mapping[str, Any]) -> dict[str, Any]:
    length, whole = request.generation.dimensions, int(engine.settings["embedding_length"])
    if length is not None and length > whole:
        raise invalid(f"generation.dimensions={length}: embeddings of this model have {whole} numbers")
    digest = hashlib.blake2b(json.dumps(said).encode(), digest_size=8).digest()
    found = np.random.default_rng(int.from_bytes(digest, "big")).standard_normal(whole, np.float32)[:length]
    return {"embedding": found / np.linalg.norm(found)}


def _share(*parts: Any) -> float:
    """A number from 0 to 1, by a hash."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _classify(engine: EchoEngine, request: Request, said: Mapping[str, Any]) -> dict[str, Any]:
    odds = {label: math.exp(3 * _share(said, label)) for label in _LABELS}
    total = sum(odds.values())
    ranked = sorted(odds, key=lambda label: -odds[label])
    return {"label": ranked[0], "scores": [{"label": label, "score": odds[label] / total} for label in ranked]}


def _score(engine: EchoEngine, request: Request, said: Mapping[str, Any]) -> dict[str, Any]:
    return {"score": _share(said)}


def _rerank(engine: EchoEngine, request: Request, said: Mapping[str, Any]) -> dict[str, Any]:
    ranking = [{"index": at, "score": _share(said["query"], text)} for at, text in enumerate(said["documents"])]
    return {"ranking": sorted(ranking, key=lambda each: -each["score"])}


def _loglikelihood(engine: EchoEngine, request: Request, said: Mapping[str, Any]) -> dict[str, Any]:
    answer = said["completion"] if "completion" in said else said["messages"][-1]
    each = [math.log(0.01 + 0.99 * _share(said, at)) for at in range(len(answer.split()))]
    found = {"loglikelihood": sum(each), "tokens": len(each), "perplexity": math.exp(-sum(each) / max(1, len(each)))}
    return found if request.generation.logprobs is None else {**found, "token_logprobs": each}


_VALUES = {"embed": _embed, "classify": _classify, "score": _score, "rerank": _rerank, "loglikelihood": _loglikelihood}
