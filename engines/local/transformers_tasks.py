"""The tasks of `engine=transformers` that generate nothing: embed, classify, score, rerank, loglikelihood.

A method per task makes rows of a request's input; `PaddedBatches` evaluates them beside the rows of other requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from engines.errors import EngineError, invalid
from engines.local.task_values import Vector, classify_values, cosine, rerank_values, shortened, sigmoid, softmax
from engines.local.text_batches import TextRow, values_of
from engines.local.transformers_batches import PaddedBatches
from engines.local.transformers_likelihood import Likelihood
from engines.local.transformers_model import TransformersModel
from engines.tasks import CHAT
from engines.text import counted
from engines.types import Completion, Message, Request

# The prompts of a sentence-transformers checkpoint for the two sides of a comparison; the first one that it has.
_QUERY_PROMPTS = ("query",)
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")


class TransformersTasks:
    """Answers requests of tasks other than chats. `use` is held while a batch uses the model."""

    def __init__(
        self,
        loaded: TransformersModel,
        max_rows: int | None,
        use: Callable[[], contextlib.AbstractContextManager[Any]],
        render: Callable[[list[Message], bool], str],
    ) -> None:
        self.loaded, self.tokenizer, self.render = loaded, loaded.tokenizer, render
        self.model = loaded.model
        self.encoder = loaded.model.base_model if CHAT in loaded.tasks else loaded.model
        self.forward_takes = inspect.signature(self.encoder.forward).parameters.keys()
        self.device: torch.device = loaded.model.device
        self.truncate = loaded.kwargs.get("truncate", loaded.pooling is not None and loaded.pooling.declared)
        self.likelihood = Likelihood(loaded)
        self.batches = PaddedBatches(self.device, max_rows, use, self._arrange, self.likelihood.logits)
        self.methods = {
            "embed": self._embed,
            "classify": self._classify,
            "score": self._score,
            "rerank": self._rerank,
            "loglikelihood": self._loglikelihood,
        }

    async def evaluate(self, request: Request) -> Completion:
        """The values of a request. Raises `EngineError`."""
        rows: list[TextRow] = []
        values = await self.methods[request.task](request, rows)
        return values_of(values, rows)

    def close(self) -> None:
        self.batches.close()
        self.model = self.encoder = self.likelihood.model = None

    # --- tasks; each adds its rows to `rows`

    async def _embed(self, request: Request, rows: list[TextRow]) -> dict[str, Any]:
        pooling = self.loaded.pooling
        assert pooling is not None
        prompt = pooling.prompts.get(pooling.prompt_name or "", "")
        [vector] = await self._results(rows, [self._embedding_row(prompt, request.inputs["text"])])
        return {"embedding": shortened(vector, request.generation.dimensions, pooling.normalized)}

    async def _classify(self, request: Request, rows: list[TextRow]) -> dict[str, Any]:
        [logits] = await self._results(rows, [self._text_row(request)])
        labels = self.model.config.id2label
        names = [str(labels.get(i, f"LABEL_{i}")) for i in range(len(logits))]
        return classify_values(names, self._probabilities(logits))

    async def _score(self, request: Request, rows: list[TextRow]) -> dict[str, Any]:
        if request.messages:
            if self.loaded.pooling:
                raise invalid("a checkpoint of embeddings scores query and text, not conversations")
            [logits] = await self._results(rows, [self._text_row(request)])
            return {"score": float(logits[0])}  # of a reward model: not bounded
        [score] = await self._pair_scores(request.inputs["query"], [request.inputs["text"]], rows)
        return {"score": score}

    async def _rerank(self, request: Request, rows: list[TextRow]) -> dict[str, Any]:
        return rerank_values(await self._pair_scores(request.inputs["query"], request.inputs["documents"], rows))

    async def _loglikelihood(self, request: Request, rows: list[TextRow]) -> dict[str, Any]:
        row = self.likelihood.row(request, self.truncate, self.render)
        [logprobs] = await self._results(rows, [row])
        return self.likelihood.values(logprobs, request)

    # --- rows

    async def _results(self, rows: list[TextRow], new: list[TextRow]) -> list[Any]:
        """The results of new rows, which are added to `rows`."""
        rows += new
        try:
            self.batches.submit(new)
            return await asyncio.gather(*(asyncio.wrap_future(row.future) for row in new))
        finally:
            for row in new:  # if cancelled, or if one failed: the others leave the queue
                row.future.cancel()

    async def _pair_scores(self, query: str, texts: list[str], rows: list[TextRow]) -> list[float]:
        """The score of each text for the query."""
        pooling = self.loaded.pooling
        if pooling:
            asked = self._embedding_row(_prompt(pooling.prompts, _QUERY_PROMPTS), query)
            prompt = _prompt(pooling.prompts, _DOCUMENT_PROMPTS)
            first, *vectors = await self._results(rows, [asked, *(self._embedding_row(prompt, text) for text in texts)])
            return [cosine(first, vector) for vector in vectors]
        pairs = [self._row(self._classify_rows, query, text) for text in texts]
        return [float(self._pair_activation(logits)[0]) for logits in await self._results(rows, pairs)]

    def _text_row(self, request: Request) -> TextRow:
        """The row of a text or a conversation for a classifier."""
        if not request.messages:
            return self._row(self._classify_rows, request.inputs["text"])
        return self._row(self._classify_rows, self.render(request.messages, False), special=False)

    def _embedding_row(self, prompt: str, text: str) -> TextRow:
        pooling = self.loaded.pooling
        assert pooling is not None
        whole = prompt + (text.lower() if pooling.lower_case else text)
        row = self._row(self._embed_rows, whole)
        if prompt and not pooling.include_prompt:
            ids = self.tokenizer(prompt)["input_ids"]
            row.start = len(ids) - (ids[-1] in self.tokenizer.all_special_ids)
        return row

    def _row(self, evaluate: Any, *texts: str, special: bool = True) -> TextRow:
        """The row of a text or of a pair. Raises `EngineError` if it is empty or too long."""
        limit = self.loaded.text_limit
        cut = {"truncation": True, "max_length": limit} if self.truncate and limit else {}
        found = self.tokenizer(*texts, add_special_tokens=special, **cut)
        tokens: list[int] = found["input_ids"]
        if not tokens:
            raise invalid("the text is empty")
        if limit is not None and len(tokens) > limit:
            raise EngineError(
                "context_length",
                f"the text has {counted(len(tokens), 'token')}, the model takes {limit}"
                " (engine.kwargs.truncate=true cuts longer texts)",
            )
        return TextRow(tokens, evaluate, found.get("token_type_ids"))

    # --- the thread of the batches

    def _arrange(self, rows: list[TextRow]) -> None:
        """Sorts rows for batches: by their function, then longest first; log likelihoods with one prompt together."""
        self.likelihood.arrange(rows)
        rows.sort(key=lambda row: (row.evaluate.__name__, self.likelihood.order(row), -len(row.tokens)))

    def _inputs(self, rows: Sequence[TextRow], padding: int) -> dict[str, torch.Tensor]:
        """The padded tensors of a batch, with padding at the end."""
        tensors = [torch.tensor(row.tokens) for row in rows]
        ids = pad_sequence(tensors, batch_first=True, padding_value=padding)
        mask = pad_sequence([torch.ones_like(each) for each in tensors], batch_first=True)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if rows[0].types is not None:
            inputs["token_type_ids"] = pad_sequence([torch.tensor(row.types) for row in rows], batch_first=True)
        return {name: tensor.to(self.device) for name, tensor in inputs.items() if name in self.forward_takes}

    def _embed_rows(self, rows: Sequence[TextRow]) -> Sequence[Vector]:
        pooling = self.loaded.pooling
        assert pooling is not None
        further = {"use_cache": False} if "use_cache" in self.forward_takes else {}
        output = self.encoder(**self._inputs(rows, self.tokenizer.pad_token_id or 0), **further)
        lengths = torch.tensor([len(row.tokens) for row in rows], device=self.device)
        skipped = torch.tensor([min(row.start, len(row.tokens) - 1) for row in rows], device=self.device)
        vectors = pooling.embed(output.last_hidden_state, lengths, skipped)
        return [np.array(vector) for vector in vectors.cpu().numpy()]

    def _classify_rows(self, rows: Sequence[TextRow]) -> Sequence[Vector]:
        settings = self.model.config.get_text_config()
        padding = settings.pad_token_id
        if padding is not None:
            return self._logits(rows, padding)
        # A classifier over a decoder reads the last token that is not padding, and refuses batches without a padding
        # token. A token that no row has takes its place.
        used = {token for row in rows for token in row.tokens}
        settings.pad_token_id = next(token for token in range(settings.vocab_size) if token not in used)
        try:
            return self._logits(rows, settings.pad_token_id)
        finally:
            settings.pad_token_id = None

    def _logits(self, rows: Sequence[TextRow], padding: int) -> Sequence[Vector]:
        logits = self.model(**self._inputs(rows, padding)).logits
        return list(logits.float().cpu().numpy())

    # --- scores of logits

    def _probabilities(self, logits: Vector) -> Sequence[float]:
        """The scores of a classifier's labels, as its `problem_type` says."""
        kind = getattr(self.model.config, "problem_type", None)
        if kind == "regression":
            return list(logits)
        independent = kind == "multi_label_classification" or len(logits) == 1
        return list(sigmoid(logits) if independent else softmax(logits))

    def _pair_activation(self, logits: Vector) -> Vector:
        """The score of a cross-encoder: through the function that the checkpoint names, else a sigmoid."""
        name = self._activation_name()
        if name.endswith("Identity") or (not name and getattr(self.model.config, "problem_type", None) == "regression"):
            return logits
        return sigmoid(logits)

    def _activation_name(self) -> str:
        settings = self.model.config
        own = getattr(settings, "sentence_transformers", None) or {}
        named = own.get("activation_fn") or getattr(settings, "sbert_ce_default_activation_function", None)
        if named is None and (path := self.loaded.find("config_sentence_transformers.json")):
            named = json.loads(path.read_text(encoding="utf-8")).get("activation_fn")
        return str(named or "")


def _prompt(prompts: dict[str, str], names: tuple[str, ...]) -> str:
    return next((prompts[name] for name in names if prompts.get(name)), "")
