"""Log likelihoods: the tokens of an answer after a prompt, and the values of task=loglikelihood.

All local engines have the same rule. Prompt and completion are tokenised together, because a model reads them as one text.
The completion begins at the first token that differs from the tokens of the prompt alone. So a token that spans the end of
the prompt belongs to the completion. Of a conversation, the prompt is all that the chat template shows before the text of
the last answer; the completion is this text, without the template's end of the message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from engines.errors import invalid


def pair_tokens(
    encode: Callable[[str], Sequence[int]], prompt: str, completion: str, first: int | None
) -> tuple[list[int], int]:
    """The tokens of prompt and completion, and the place at which the completion's tokens begin (at least 1).

    `first` is the token before an empty prompt: the model's BOS token, or EOS if it has none. Raises
    `EngineError("invalid_input")` for a completion without tokens.
    """
    whole = list(encode(prompt + completion))
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(encode(prompt), whole, strict=False)))
    if start == len(whole):
        raise invalid("the completion is empty: it has no token of its own")
    if start == 0:
        if first is None:
            raise invalid("the prompt is empty, and the model has no BOS token that could stand before the completion")
        return [first, *whole], 1
    return whole, start


def split_at_answer(text: str, answer: str) -> tuple[str, str]:
    """A rendered conversation that ends with `answer`, as prompt and completion.

    Raises `EngineError("invalid_input")` if the chat template does not show the answer.
    """
    at = text.rfind(answer.strip())
    if at < 0:
        raise invalid("the chat template does not show the last message as it is, so its likelihood is not known")
    return text[:at], text[at:]


def likelihood_values(logprobs: Sequence[float], *, each: bool) -> dict[str, Any]:
    """The `values` of task=loglikelihood; `each` adds the log probability of every token."""
    total = math.fsum(logprobs)
    try:
        perplexity = math.exp(-total / len(logprobs))
    except OverflowError:
        perplexity = math.inf
    values: dict[str, Any] = {"loglikelihood": total, "tokens": len(logprobs), "perplexity": perplexity}
    return values | {"token_logprobs": list(logprobs)} if each else values
