"""The tasks of `engine=llamacpp` other than chats: embed, classify, score, rerank, loglikelihood.

Log likelihoods go through the scheduler of the chats, so that completions of one prompt share its evaluation. The other
tasks go through `LlamaTexts`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from engines.errors import EngineError, invalid
from engines.local.chat_template import ChatTemplate
from engines.local.likelihood import likelihood_values, pair_tokens, split_at_answer
from engines.local.llama_library import L
from engines.local.llamacpp_model import LlamaModel
from engines.local.llamacpp_scheduler import Scheduler
from engines.local.llamacpp_sequence import Sequence
from engines.local.llamacpp_texts import LlamaTexts
from engines.local.task_values import Vector, classify_values, cosine, rerank_values, shortened, sigmoid, softmax
from engines.local.text_batches import TextRow, values_of
from engines.text import counted
from engines.types import Completion, Request, text_of
from engines.usage import Usage


class LlamaTasks:
    """Answers requests of tasks other than chats. `scheduler` is None for a model that does not generate."""

    def __init__(
        self, model: LlamaModel, template: ChatTemplate, scheduler: Scheduler | None, kwargs: dict[str, Any]
    ) -> None:
        self.model, self.template, self.scheduler, self.kwargs = model, template, scheduler, kwargs
        self.head, self.tokenizer = model.head, model.tokenizer
        self.truncate = bool(kwargs.get("truncate"))
        self.normalized = bool(kwargs.get("normalize", True))
        self.closed = False
        self._texts: LlamaTexts | None = None
        self.methods: dict[str, Callable[..., Any]] = {
            "embed": self._embed,
            "classify": self._classify,
            "score": self._score,
            "rerank": self._rerank,
            "loglikelihood": self._loglikelihood,
        }

    async def evaluate(self, request: Request) -> Completion:
        """The values of a request. Raises `EngineError`."""
        if self.closed:  # the tokenizer is freed
            raise EngineError("cancelled", "the engine is closed")
        completion: Completion = await self.methods[request.task](request)
        return completion

    def texts(self) -> LlamaTexts:
        """The context for embeddings and classifiers, made by the first call. Raises `ConfigError`."""
        if self._texts is None:
            self._texts = LlamaTexts(self.model, self.head, self.kwargs)
        return self._texts

    def close(self) -> None:
        self.closed = True
        if self._texts is not None:
            self._texts.close()

    # --- tasks

    async def _embed(self, request: Request) -> Completion:
        [vector], rows = await self._evaluated([self._encoded(request.inputs["text"])])
        vector = _normalize(vector) if self.normalized else vector
        return values_of({"embedding": shortened(vector, request.generation.dimensions, self.normalized)}, rows)

    async def _classify(self, request: Request) -> Completion:
        [outputs], rows = await self._evaluated([self._text_tokens(request)])
        names = [L.llama_model_cls_label(self.model.handle, i) for i in range(len(outputs))]
        labels = [name.decode("utf-8", "replace") if name else f"LABEL_{i}" for i, name in enumerate(names)]
        scores = sigmoid(outputs) if len(outputs) == 1 else self._softmax(outputs)
        return values_of(classify_values(labels, list(scores)), rows)

    async def _score(self, request: Request) -> Completion:
        if request.messages:
            if self.head.pooling != "rank":
                raise invalid("a model of embeddings scores query and text, not conversations")
            [outputs], rows = await self._evaluated([self._text_tokens(request)])
            return values_of({"score": float(outputs[0])}, rows)
        [score], rows = await self._pair_scores(request.inputs["query"], [request.inputs["text"]])
        return values_of({"score": score}, rows)

    async def _rerank(self, request: Request) -> Completion:
        scores, rows = await self._pair_scores(request.inputs["query"], request.inputs["documents"])
        return values_of(rerank_values(scores), rows)

    async def _loglikelihood(self, request: Request) -> Completion:
        assert self.scheduler is not None
        self.scheduler.check_open()  # it may have failed
        tokens, start = self._likelihood_tokens(request)
        sequence = Sequence(prompt=tokens[:-1], limit=0, scored=tokens, score_from=start)
        submitted = time.perf_counter()
        try:
            self.scheduler.submit([sequence])
            done = await asyncio.wrap_future(sequence.future)
        finally:
            sequence.future.cancel()
        values = likelihood_values(done.scores, each=request.generation.logprobs is not None)
        return Completion(
            values=values, usage=Usage(len(tokens), cached_input=done.cached), queued_s=done.started - submitted
        )

    # --- texts

    async def _evaluated(self, texts: list[list[int]]) -> tuple[list[Vector], list[TextRow]]:
        """The vector, or the classifier's outputs, of each text."""
        batches = self.texts()
        evaluate = batches.outputs if self.head.pooling == "rank" else batches.vectors
        rows = [TextRow(self._checked(tokens), evaluate) for tokens in texts]
        try:
            batches.submit(rows)
            return await asyncio.gather(*(asyncio.wrap_future(row.future) for row in rows)), rows
        finally:
            for row in rows:  # if cancelled, or if one failed: the others leave the queue
                row.future.cancel()

    def _checked(self, tokens: list[int]) -> list[int]:
        limit = self.model.n_ctx
        if not tokens:
            raise invalid("the text is empty")
        if len(tokens) <= limit:
            return tokens
        if not self.truncate:
            raise EngineError(
                "context_length",
                f"the text has {counted(len(tokens), 'token')}, the context holds {limit}"
                " (engine.kwargs.truncate=true cuts longer texts)",
            )
        ends = {L.llama_vocab_eos(self.model.vocab), L.llama_vocab_sep(self.model.vocab)}
        return [*tokens[: limit - 1], tokens[-1]] if tokens[-1] in ends else tokens[:limit]

    async def _pair_scores(self, query: str, texts: list[str]) -> tuple[list[float], list[TextRow]]:
        """The score of each text for the query."""
        if self.head.pooling != "rank":
            (first, *vectors), rows = await self._evaluated([self._encoded(text) for text in (query, *texts)])
            return [cosine(first, vector) for vector in vectors], rows
        outputs, rows = await self._evaluated([self._pair(query, text) for text in texts])
        # The outputs yes and no are probabilities already.
        return [float(found[0] if len(found) > 1 else sigmoid(found)[0]) for found in outputs], rows

    def _text_tokens(self, request: Request) -> list[int]:
        if not request.messages:
            return self._encoded(request.inputs["text"])
        return self.tokenizer.tokenize(self.template.render(request.messages, None, None, whole=True))

    def _encoded(self, text: str) -> list[int]:
        return self.tokenizer.encode(text) if text else []

    def _pair(self, query: str, text: str) -> list[int]:
        """A query and a text as a cross-encoder reads them: by the model's template for pairs, or with separators."""
        if template := L.llama_model_chat_template(self.model.handle, b"rerank"):
            form = template.decode("utf-8", "replace")
            return self.tokenizer.encode(form.replace("{query}", query).replace("{document}", text))
        vocab = self.model.vocab
        first, second = (self.tokenizer.encode(each, add=False) for each in (query, text))
        bos, eos, sep = L.llama_vocab_bos(vocab), L.llama_vocab_eos(vocab), L.llama_vocab_sep(vocab)
        if L.llama_vocab_type(vocab) == L.LLAMA_VOCAB_TYPE_WPM:
            return [bos, *first, sep, *second, sep]
        start = [bos] if L.llama_vocab_get_add_bos(vocab) else []
        end = [sep if eos < 0 else eos] if L.llama_vocab_get_add_eos(vocab) else []
        between = [sep] if L.llama_vocab_get_add_sep(vocab) else []
        return [*start, *first, *end, *between, *second, *end]

    def _softmax(self, outputs: Vector) -> Vector:
        # llama.cpp gives probabilities for Qwen3.
        return outputs if self.model.metadata("general.architecture") == "qwen3" else softmax(outputs)

    def _likelihood_tokens(self, request: Request) -> tuple[list[int], int]:
        """The tokens of prompt and completion, and the place of the completion. Raises `EngineError` if too long."""
        if request.messages:
            text = self.template.render(request.messages, None, None, continues=True)
            prompt, completion = split_at_answer(text, text_of(request.messages[-1]) or "")
        else:
            prompt, completion = request.inputs["prompt"], request.inputs["completion"]
        ends = (L.llama_vocab_bos(self.model.vocab), L.llama_vocab_eos(self.model.vocab))
        first = next((token for token in ends if token >= 0), None)
        tokens, start = pair_tokens(self.tokenizer.prompt_tokens, prompt, completion, first)
        over = len(tokens) - 1 - self.model.n_ctx  # the last token is predicted, not read
        if over > 0:
            if not self.truncate or over >= start:
                raise EngineError(
                    "context_length",
                    f"prompt and completion have {counted(len(tokens), 'token')}, the context holds {self.model.n_ctx}"
                    " (engine.kwargs.truncate=true cuts the beginning of the prompt)",
                )
            tokens, start = tokens[over:], start - over
        return tokens, start


def _normalize(vector: Vector) -> Vector:
    norm = float(np.linalg.norm(vector))
    return np.asarray(vector / norm, dtype=np.float32) if norm else vector
