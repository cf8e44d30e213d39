"""A server on loopback with the APIs of tasks other than a chat. What it answers follows from each text alone.

`plan` has what the first requests meet: "429", "500", "few" (an embedding is missing), "shuffled". A text in `bad` makes
its whole request a 400. `most_texts` is the server's limit. While `held` is set, nothing is answered;
it is set after `held_after` requests.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiohttp import web

from tests.support.loopback import LoopbackServer

DIMENSIONS = 8


def vector(text: str, dimensions: int = DIMENSIONS) -> np.ndarray:
    """The embedding of a text: normalised, as OpenAI's are."""
    digest = hashlib.blake2b(text.encode(), digest_size=DIMENSIONS).digest()
    whole = np.frombuffer(digest, np.uint8).astype(np.float32) + 1
    first = whole[:dimensions]
    return first / np.linalg.norm(first)


def score(query: str, text: str) -> float:
    return float(vector(query) @ vector(text))


def tokens(text: str) -> int:
    return len(text) // 3 + 1


@dataclass
class TaskServer(LoopbackServer):
    plan: list[str] = field(default_factory=list)
    bad: frozenset[str] = frozenset()
    most_texts: int = 2048
    held: threading.Event = field(default_factory=threading.Event)
    held_after: int | None = None
    keeps_dimensions: bool = True
    bodies: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def reset(self, **values: Any) -> TaskServer:
        self.plan, self.bad, self.most_texts, self.keeps_dimensions, self.bodies = [], frozenset(), 2048, True, []
        self.held_after = None
        self.held.clear()
        for name, value in values.items():
            setattr(self, name, value)
        return self

    def sizes(self) -> list[int]:
        """The number of texts of each request, in the order in which they came."""
        return [len(body["input"]) for _, body in self.bodies]

    def application(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/{path:.*}", self.handle)
        return app

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append((request.path_qs, body))
        if self.held_after is not None and len(self.bodies) > self.held_after:
            self.held.set()
        while self.held.is_set():
            await asyncio.sleep(0.01)
        fault = self.plan.pop(0) if self.plan else ""
        if fault.isdigit():
            return failed(int(fault), "not now")
        texts = body.get("input") or body.get("text_2") or body.get("prompt") or []
        texts = [texts] if isinstance(texts, str) else texts
        if len(texts) > self.most_texts:
            return failed(400, "Too many inputs in request, split into more batches.")
        if self.bad.intersection(texts):
            return failed(400, "an input is not valid")
        handler = {"embeddings": self.embeddings, "score": self.scores, "rerank": self.rerank, "classify": self.classes,
                   "pooling": self.pooling, "completions": self.completions,
                   "tokenize": self.tokenize}[request.path.rpartition("/")[2]]  # fmt: skip
        found = handler(body, texts)
        if fault == "few":
            found["data"] = found["data"][:-1]
        if fault == "shuffled":
            found["data"].reverse()
        return web.json_response({"model": body["model"], **found})

    def embeddings(self, body: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
        wanted = body.get("dimensions", DIMENSIONS) if self.keeps_dimensions else DIMENSIONS
        vectors = [vector(text, wanted) for text in texts]
        as_text = body.get("encoding_format") == "base64"
        shown = [base64.b64encode(v.astype("<f4").tobytes()).decode() if as_text else v.tolist() for v in vectors]
        data = [{"index": at, "object": "embedding", "embedding": each} for at, each in enumerate(shown)]
        return {"object": "list", "data": data, "usage": usage(texts)}

    def scores(self, body: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
        pairs = zip(body["text_1"], texts, strict=True)
        return {"data": [{"index": i, "score": score(*pair)} for i, pair in enumerate(pairs)], "usage": usage(texts)}

    def rerank(self, body: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
        scores = [score(body["query"], text) for text in body["documents"]]
        order = sorted(range(len(scores)), key=lambda at: -scores[at])
        return {"results": [{"index": at, "relevance_score": scores[at]} for at in order],
                "usage": {"total_tokens": sum(map(tokens, body["documents"]))}}  # fmt: skip

    def classes(self, body: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
        found = [{"index": i, "label": "long" if len(text) > 9 else "short", "num_classes": 2,
                  "probs": [0.25, 0.75] if len(text) > 9 else [0.875, 0.125]} for i, text in enumerate(texts)]  # fmt: skip
        return {"data": found, "usage": usage(texts)}

    def pooling(self, body: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
        said = body["messages"][-1]["content"]
        return {"data": [{"index": 0, "data": [[float(len(said))]]}], "usage": usage([said])}

    def tokenize(self, body: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
        """The template writes each role and each word of its content; then the role of the next answer."""
        words = [word for said in body["messages"] for word in (said["role"], *said["content"].split())]
        return {"tokens": [sum(word.encode()) for word in [*words, *["assistant"] * body["add_generation_prompt"]]]}

    def of_tokens(self, prompt: list[int]) -> dict[str, Any]:
        found = {"tokens": list(map(str, prompt)), "token_logprobs": [None, *(-each / 100 for each in prompt[1:]), -9.0]}
        return {
            "choices": [{"index": 0, "text": "", "logprobs": found}],
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": 1},
        }

    def completions(self, body: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
        """Tokens are words with the space before them, and one more word that the model writes."""
        if texts and isinstance(texts[0], int):
            return self.of_tokens(body["prompt"])
        choices = []
        for at, text in enumerate(texts):
            words = [f" {word}" if i else word for i, word in enumerate(text.split(" "))]
            offsets = [sum(map(len, words[:i])) for i in range(len(words) + 1)]
            logprobs: list[float | None] = [None, *(-0.25 * len(word) for word in words[1:]), -9.0]
            found = {"tokens": [*words, " more"], "token_logprobs": logprobs, "text_offset": offsets}
            choices.append({"index": at, "text": text, "logprobs": found, "finish_reason": "length"})
        counts = usage(texts)
        return {"choices": choices, "usage": {**counts, "completion_tokens": len(texts)}}


def usage(texts: Sequence[str]) -> dict[str, int]:
    return {"prompt_tokens": sum(map(tokens, texts)), "total_tokens": sum(map(tokens, texts))}


def failed(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": "t", "code": None}}, status=status)
