"""The decode loop of `engine=transformers`.

It replaces `model.generate`, which has one random generator and one set of sampling settings for a whole batch.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from engines.local.transformers_cache import make_room
from engines.local.transformers_model import TransformersModel
from engines.local.transformers_row import GenerationRow
from engines.local.transformers_sampling import choose_tokens
from engines.local.vision import batch_images


class Decoder:
    """Decodes batches of rows with left padding and one KV cache. Used from one thread."""

    def __init__(self, loaded: TransformersModel, stopped: threading.Event) -> None:
        self.model, self.tokenizer, self.vocab = loaded.model, loaded.tokenizer, loaded.vocab
        self.device: torch.device = loaded.model.device
        self.forward_takes = inspect.signature(loaded.model.forward).parameters.keys()
        self.stopped = stopped  # ends `decode` before its rows are complete

    def decode(self, rows: list[GenerationRow]) -> None:
        """Generates until all rows are settled. Rows that already have tokens continue after them."""
        texts = [torch.tensor(row.prompt + row.tokens, device=self.device) for row in rows]
        ids = pad_sequence(texts, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True, padding_side="left")
        images = batch_images(rows, self.device, self.model.dtype)
        # (rows, length); with a leading dimension if the model gives images positions in the plane.
        positions = self.model._prepare_position_ids_for_generation(ids, {"attention_mask": mask, **images})
        cache = None
        while not self.stopped.is_set():
            output = self._forward(ids, mask, positions, cache, images)
            if cache is None:
                make_room(output.past_key_values)
            cache = output.past_key_values
            logits = output.logits[:, -1].to(self.device, torch.float32)
            tokens = choose_tokens(rows, logits)
            for row, token, scores in zip(rows, tokens.tolist(), logits, strict=True):
                if not row.future.done():  # settled if its grammar allows no token, or cancelled
                    self._append(row, token, scores)
            live = [i for i, row in enumerate(rows) if not row.future.done()]
            if not live:
                return
            ids, positions = tokens[:, None], positions[..., -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            if len(live) < len(rows):
                live = _in_place(live)
                index = torch.tensor(live)
                rows = [rows[i] for i in live]
                ids, mask, positions = ids[index], mask[index], positions[..., index, :]
                cache.reorder_cache(index)  # unlike `batch_select_indices`, every kind of cache layer has it

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any, images: Any) -> Any:
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        known = {name: value for name, value in inputs.items() if name in self.forward_takes}
        return self.model(**known, **(images if cache is None else {}))

    def _append(self, row: GenerationRow, token: int, logits: torch.Tensor) -> None:
        """Adds a token to `row`, and settles the row if the token ends it. `logits`: the model's, (vocabulary,)."""
        if token in row.stop_ids:
            return row.settle()
        row.tokens.append(token)
        if row.matcher is not None:
            row.matcher.accept(token)
        if row.params.logprobs is not None:
            row.logprobs.append(self._logprob(token, logits.log_softmax(-1), row.params.logprobs))
        if self._has_stop_text(row):
            row.settle()
        elif len(row.tokens) >= row.limit:
            row.finish = "length"
            row.settle()

    def _has_stop_text(self, row: GenerationRow) -> bool:
        """The last token completes a stop text. A token is at least one byte, so the last tokens decide."""
        stops = row.params.stop
        if not stops:
            return False
        longest = max(len(stop.encode()) for stop in stops)
        # 4 tokens more, because the first character of a text that is decoded alone can be lost.
        tail = decode_text(self.tokenizer, row.tokens[-longest - 4 :])
        return any(stop in tail for stop in stops)

    def _logprob(self, token: int, logprobs: torch.Tensor, alternatives: int) -> dict[str, Any]:
        """An entry of OpenAI's `logprobs.content` for one token of an answer."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
            piece = self.tokenizer.convert_ids_to_tokens(token) or ""
            if piece.startswith("\u2581"):  # SentencePiece's space, which decoding drops at the start
                text = piece.replace("\u2581", " ")
            # The bytes of a part of a character are not known: not every tokenizer tells them.
            return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

        values, tokens = logprobs.topk(min(alternatives, self.vocab))
        top = [entry(t, value) for t, value in zip(tokens.tolist(), values.tolist(), strict=True)]
        return {**entry(token, logprobs[token].item()), "top_logprobs": top}


def _in_place(live: list[int]) -> list[int]:
    """The places `live`, in ascending order, in an order that changes few: the last ones fill the gaps."""
    kept = [place for place in live if place < len(live)]
    last = iter(live[len(kept) :])
    taken = set(kept)
    return [place if place in taken else next(last) for place in range(len(live))]


def decode_text(tokenizer: Any, tokens: list[int]) -> str:
    """The text of generated tokens, without special tokens."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
