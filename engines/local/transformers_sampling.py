"""Sampling for `engine=transformers`: each row of a batch has its own settings and its own random numbers.

The filters are the classes that `model.generate` uses, in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from engines.errors import EngineError
from engines.local.transformers_row import GenerationRow


def choose_tokens(rows: list[GenerationRow], logits: torch.Tensor) -> torch.Tensor:
    """One token per row. `logits` has the shape (rows, vocabulary), the result (rows,). `logits` is not changed.

    Rows with equal settings are filtered together. A row whose `response_format` allows no token is settled with the error.
    """
    scores = logits.clone()
    sampled: dict[tuple[Any, ...], list[int]] = {}
    for i, row in enumerate(rows):
        _penalise(row, scores[i])
        _mask(row, scores[i])
        p = row.params
        if p.temperature:
            sampled.setdefault((p.temperature, p.top_k, p.top_p, p.min_p), []).append(i)
    chosen = scores.argmax(-1)
    for settings, members in sampled.items():
        probs = _warpers(*settings)(None, scores[members]).softmax(-1)
        # The method of `torch.multinomial`, with the row's own generator.
        noise = torch.empty_like(probs)
        for place, i in enumerate(members):
            noise[place].exponential_(generator=rows[i].generator)
        chosen[members] = (probs / noise).argmax(-1)
    return chosen


def _penalise(row: GenerationRow, scores: torch.Tensor) -> None:
    """Applies a row's bias and penalties to its scores, in place. `scores` has the shape (vocabulary,).

    The repetition penalty counts the prompt, as in transformers; the other two count only the answer, as in OpenAI's API.
    """
    p = row.params
    if p.logit_bias:
        scores[[int(token) for token in p.logit_bias]] += scores.new_tensor(list(p.logit_bias.values()))
    if p.repetition_penalty:
        seen = torch.tensor([row.prompt + row.tokens], device=scores.device)
        scores[:] = transformers.RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(seen, scores[None])[0]
    if row.tokens and (p.frequency_penalty or p.presence_penalty):
        used, counts = torch.tensor(row.tokens, device=scores.device).unique(return_counts=True)  # type: ignore[no-untyped-call]
        scores[used] -= counts * (p.frequency_penalty or 0.0) + (p.presence_penalty or 0.0)


def _mask(row: GenerationRow, scores: torch.Tensor) -> None:
    """Gives -inf to each token that the row's `response_format` does not allow. `scores` has the shape (vocabulary,)."""
    if row.matcher is None:
        return
    try:
        allowed = torch.from_numpy(row.matcher.allowed(len(scores)))
    except EngineError as error:
        return row.settle(error)
    scores.masked_fill_(~allowed.to(scores.device), -torch.inf)


def _warpers(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> Any:
    warpers: list[Any] = [transformers.TemperatureLogitsWarper(temperature)]
    if top_k is not None and top_k > 0:
        warpers.append(transformers.TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(transformers.MinPLogitsWarper(min_p))
    return transformers.LogitsProcessorList(warpers)
