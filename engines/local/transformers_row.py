"""One answer while `engines/local/transformers.py` generates it."""

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
    """One answer in the making; a request has `n` of them."""

    prompt: list[int]
    params: GenerationParams
    limit: int  # tokens it may have
    stop_ids: frozenset[int]
    generator: torch.Generator
    matcher: Matcher | None = None  # enforces response_format
    images: dict[str, torch.Tensor] = field(default_factory=dict)  # what the processor made of them, a batch of one
    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish: FinishReason = "stop"
    failed: bool = False  # transformers' continuous batching, at this row
    future: Future[GenerationRow] = field(default_factory=Future)  # done, too, when whoever asked gave up

    def settle(self, error: BaseException | None = None) -> None:
        """Hands the outcome to whoever waits for it, if anybody still does."""
        with contextlib.suppress(InvalidStateError):
            if error is None:
                self.future.set_result(self)
            else:
                self.future.set_exception(error)
