"""One answer of `engine=transformers` while it is generated."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import torch

from engines.local.grammar import Matcher
from engines.params import GenerationParams
from engines.types import FinishReason


@dataclass(slots=True, eq=False)
class GenerationRow:
    """One answer; a request has `n` of them."""

    prompt: list[int]
    params: GenerationParams
    limit: int  # tokens it may generate
    stop_ids: frozenset[int]
    generator: torch.Generator
    matcher: Matcher | None = None  # enforces response_format
    images: dict[str, torch.Tensor] = field(default_factory=dict)  # the processor's output, with a batch size of 1
    tokens: list[int] = field(default_factory=list)  # generated so far
    logprobs: list[dict[str, Any]] = field(default_factory=list)  # OpenAI's `logprobs.content`
    started: float = 0.0  # `time.perf_counter()` when a batch took it first
    finish: FinishReason = "stop"
    failed: bool = False  # transformers' continuous batching failed at this row
    future: Future[GenerationRow] = field(default_factory=Future)  # also done if the caller has cancelled

    def settle(self, error: BaseException | None = None) -> None:
        """Hands the answer or the error to the caller, unless the caller has cancelled."""
        with contextlib.suppress(InvalidStateError):
            if error is None:
                self.future.set_result(self)
            else:
                self.future.set_exception(error)
