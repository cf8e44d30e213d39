"""The values of tasks, as all local engines give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engines.errors import invalid

Vector = np.ndarray[Any, Any]


def softmax(logits: Vector) -> Vector:
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum())


def sigmoid(logits: Vector) -> Vector:
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -80, 80))))


def classify_values(labels: Sequence[str], scores: Sequence[float]) -> dict[str, Any]:
    """The `values` of task=classify: the scores of all labels, the highest first."""
    order = sorted(range(len(labels)), key=lambda i: -scores[i])
    ranked = [{"label": labels[i], "score": float(scores[i])} for i in order]
    return {"label": ranked[0]["label"], "scores": ranked}


def rerank_values(scores: Sequence[float]) -> dict[str, Any]:
    """The `values` of task=rerank: the documents' places and scores, the best first."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return {"ranking": [{"index": i, "score": float(scores[i])} for i in order]}


def cosine(a: Vector, b: Vector) -> float:
    """The cosine of two embeddings; 0 if one of them is zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else 0.0


def shortened(vector: Vector, dimensions: int | None, normalized: bool) -> Vector:
    """The first `dimensions` numbers of an embedding, normalised again if the whole embedding is normalised.

    Raises `EngineError("invalid_input")` if the embedding has fewer numbers.
    """
    if dimensions is None:
        return vector
    if dimensions > len(vector):
        raise invalid(f"generation.dimensions is {dimensions}, the model's embeddings have {len(vector)} dimensions")
    head = vector[:dimensions]
    norm = float(np.linalg.norm(head))
    return np.asarray(head / norm if normalized and norm else head, dtype=np.float32)
