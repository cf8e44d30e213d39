"""Log likelihoods by `engine=transformers`: of a completion after a prompt, or of the last answer of a conversation.

Only the logits that predict the completion are computed. Completions of one prompt in one batch share its evaluation.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from engines.errors import EngineError, invalid
from engines.local.likelihood import likelihood_values, pair_tokens, split_at_answer
from engines.local.text_batches import TextRow
from engines.local.transformers_model import TransformersModel
from engines.local.vision import has_images
from engines.text import counted
from engines.types import Message, Request, text_of

# Prompts of fewer tokens are evaluated again for each completion: a second pass of the model takes longer.
_SHARED_TOKENS = 16
# The layers of a KV cache that can be continued with several tokens at once. A recurrent state cannot always.
_CONTINUABLE = {"DynamicLayer", "DynamicSlidingWindowLayer"}


class Likelihood:
    """Makes and evaluates the rows of task=loglikelihood."""

    def __init__(self, loaded: TransformersModel) -> None:
        self.loaded, self.tokenizer, self.model = loaded, loaded.tokenizer, loaded.model
        self.forward_takes = inspect.signature(loaded.model.forward).parameters.keys()
        self.device: torch.device = loaded.model.device
        self.shares = True  # False once the model's cache has shown that it cannot be continued

    def row(self, request: Request, truncate: bool, render: Callable[[list[Message], bool], str]) -> TextRow:
        """The row of a request. Raises `EngineError` if it has no completion or is too long."""
        if has_images(request.messages):
            raise invalid("task=loglikelihood takes text only")
        if request.messages:
            answer = text_of(request.messages[-1]) or ""
            prompt, completion = split_at_answer(render(request.messages, True), answer)
        else:
            prompt, completion = request.inputs["prompt"], request.inputs["completion"]
        special = not request.messages  # a chat template writes the special tokens itself

        def encode(text: str) -> list[int]:
            tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=special)
            return tokens

        ends = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        first = next((token for token in ends if token is not None), None)
        tokens, start = pair_tokens(encode, prompt, completion, first)
        limit = self.loaded.text_limit
        if limit is not None and len(tokens) - 1 > limit:  # the last token is predicted, not read
            over = len(tokens) - 1 - limit
            if not truncate or over >= start:
                raise EngineError(
                    "context_length",
                    f"prompt and completion have {counted(len(tokens), 'token')}, the model takes {limit + 1}"
                    " (engine.kwargs.truncate=true cuts the beginning of the prompt)",
                )
            tokens, start = tokens[over:], start - over
        return TextRow(tokens, self.alone, start=start)

    def values(self, logprobs: list[float], request: Request) -> dict[str, Any]:
        return likelihood_values(logprobs, each=request.generation.logprobs is not None)

    # --- the thread of the batches

    def arrange(self, rows: list[TextRow]) -> None:
        """Chooses the evaluation of each row: with others of the same prompt, or alone."""
        if not self.shares:
            return
        own = [row for row in rows if row.evaluate == self.alone and row.start >= _SHARED_TOKENS]
        counts = Counter(tuple(row.tokens[: row.start]) for row in own)
        for row in own:
            if counts[tuple(row.tokens[: row.start])] > 1:
                row.evaluate = self.shared

    def order(self, row: TextRow) -> tuple[int, ...]:
        """The key that puts rows with one prompt beside each other, and long prompts first."""
        return (-row.start, *row.tokens[: row.start]) if row.evaluate == self.shared else ()

    def logits(self, row: TextRow) -> int:
        """The number of logits that the row needs."""
        if row.evaluate not in (self.alone, self.shared):
            return 0
        return (len(row.tokens) - row.start) * int(self.loaded.vocab)

    def alone(self, rows: Sequence[TextRow]) -> Sequence[list[float]]:
        """The log probabilities of each row's completion. Padding is at the end, where causal attention needs no mask."""
        ids = pad_sequence([torch.tensor(row.tokens[:-1]) for row in rows], batch_first=True).to(self.device)
        places = [(i, at) for i, row in enumerate(rows) for at in range(row.start - 1, len(row.tokens) - 1)]
        logits = self._logits_at(ids, torch.tensor(places, device=self.device).T)
        wanted = [row.tokens[row.start :] for row in rows]
        each = torch.split(logits, [len(tokens) for tokens in wanted])
        return [self._logprobs(scores, tokens) for scores, tokens in zip(each, wanted, strict=True)]

    def _logits_at(self, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The logits (places, vocabulary) of the model; `places` has the shape (2, places): rows and positions.

        The output layer gets only the states of these places: it is a large part of the work of a small model.
        """

        chosen = False

        def choose(module: torch.nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            nonlocal chosen
            chosen = True
            states, *others = given
            rows, positions = places.to(states.device)
            return (states[rows, positions][None], *others)  # with three dimensions: some models change their logits

        head = self.model.get_output_embeddings()
        with contextlib.ExitStack() as stack:
            if head is not None:
                stack.callback(head.register_forward_pre_hook(choose).remove)
            logits: torch.Tensor = self._forward(ids, None, None, None, 0).logits
        if chosen:
            return logits[0]
        rows, positions = places.to(logits.device)  # the model computes them without a module for its output layer
        return logits[rows, positions]

    def shared(self, rows: Sequence[TextRow]) -> Sequence[list[float]]:
        """As `alone`; each prompt is evaluated once for all its completions."""
        prompts: dict[tuple[int, ...], int] = {}
        places = [prompts.setdefault(tuple(row.tokens[: row.start]), len(prompts)) for row in rows]
        ids, mask, positions = self._padded_left([list(prompt) for prompt in prompts])
        output = self._forward(ids, mask, positions, None, 1, use_cache=True)
        cache = output.past_key_values
        if not {type(layer).__name__ for layer in getattr(cache, "layers", [None])} <= _CONTINUABLE:
            self.shares = False
            return self.alone(rows)
        first = output.logits[:, -1]
        found = [
            self._logprobs(first[place, None], [row.tokens[row.start]]) for row, place in zip(rows, places, strict=True)
        ]
        further = [i for i, row in enumerate(rows) if len(row.tokens) - row.start > 1]
        if further:
            index = torch.tensor([places[i] for i in further], device=self.device)
            self._continue(rows, found, further, (mask[index], positions[..., index, :], cache, index))
        seen = set()
        for row, place in zip(rows, places, strict=True):
            row.cached = row.start if place in seen else 0
            seen.add(place)
        return found

    def _continue(self, rows: Sequence[TextRow], found: list[list[float]], further: list[int], state: Any) -> None:
        """Adds the log probabilities of the completions' second and later tokens. `state`: of each row's prompt."""
        mask, positions, cache, index = state
        cache.reorder_cache(index)
        texts = [torch.tensor(rows[i].tokens[rows[i].start : -1], device=self.device) for i in further]
        ids = pad_sequence(texts, batch_first=True)
        own = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        places = positions[..., -1:] + 1 + torch.arange(ids.shape[1], device=self.device)
        logits = self._forward(ids, torch.cat([mask, own], dim=1), places, cache, ids.shape[1], use_cache=True).logits
        for scores, i in zip(logits, further, strict=True):
            wanted = rows[i].tokens[rows[i].start + 1 :]
            found[i] += self._logprobs(scores[: len(wanted)], wanted)

    def _padded_left(self, texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, mask and positions of texts with padding at the start."""
        tensors = [torch.tensor(text) for text in texts]
        ids = pad_sequence(tensors, batch_first=True, padding_side="left").to(self.device)
        ones = [torch.ones_like(each) for each in tensors]
        mask = pad_sequence(ones, batch_first=True, padding_side="left").to(self.device)
        return ids, mask, self.model._prepare_position_ids_for_generation(ids, {"attention_mask": mask})

    def _forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        cache: Any,
        keep: int,
        use_cache: bool = False,
    ) -> Any:
        """The model's output, with the logits of the last `keep` positions (0: of all)."""
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": use_cache,
            "logits_to_keep": keep,
        }
        return self.model(**{name: value for name, value in inputs.items() if name in self.forward_takes})

    def _logprobs(self, logits: torch.Tensor, wanted: list[int]) -> list[float]:
        """The log probability of each wanted token; `logits` has the shape (tokens, vocabulary)."""
        scores = logits.float()
        chosen = scores.gather(1, torch.tensor(wanted, device=scores.device)[:, None]).squeeze(1)
        found: list[float] = (chosen - scores.logsumexp(1)).tolist()
        return found
