"""The tasks of a checkpoint from its files, and the rule for the tokens of a completion."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from engines.config import EngineConfig
from engines.errors import EngineError
from engines.identity import identity
from engines.local.checkpoint_tasks import CLASSIFIES, EMBEDS, GENERATES, SCORES, checkpoint_tasks
from engines.local.likelihood import likelihood_values, pair_tokens, split_at_answer
from engines.local.vllm_runner import runner_tasks
from engines.registry import request_check
from engines.tasks import TASKS
from engines.types import Request

POOLING = [
    {"type": "sentence_transformers.models.Transformer", "path": ""},
    {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
]
ONE, THREE = {"id2label": {"0": "LABEL_0"}}, {"id2label": {"0": "a", "1": "b", "2": "c"}}


@pytest.mark.parametrize(
    ("settings", "modules", "tasks"),
    [({"architectures": ["LlamaForCausalLM"]}, None, GENERATES),
     ({"architectures": ["LlamaForCausalLM"]}, POOLING, EMBEDS),
     ({"architectures": ["LlamaForCausalLM"]}, "broken", GENERATES),
     ({"architectures": ["BertModel"]}, POOLING, EMBEDS),
     ({"architectures": ["BertModel"]}, None, EMBEDS),
     ({"architectures": ["BertForSequenceClassification"], **THREE}, None, CLASSIFIES),
     ({"architectures": ["BertForSequenceClassification"]}, None, CLASSIFIES),
     ({"architectures": ["LlamaForSequenceClassification"], **ONE}, None, SCORES),
     ({"architectures": ["BertForSequenceClassification"], **ONE}, POOLING, SCORES),
     ({"architectures": ["Qwen2ForRewardModel"]}, None, {"score"}),
     ({"architectures": ["Qwen2ForProcessRewardModel"]}, None, {"score"}),
     ({}, None, GENERATES)],
)  # fmt: skip
def test_tasks_come_from_the_files(tmp_path: Path, settings: dict[str, Any], modules: Any, tasks: set[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    if modules is not None:
        (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert checkpoint_tasks(EngineConfig(model=str(tmp_path))) == tasks


def test_a_hub_id_tells_nothing_before_it_is_loaded() -> None:
    assert checkpoint_tasks(EngineConfig(model="org/no-such-model")) is None
    assert checkpoint_tasks(EngineConfig()) is None


@pytest.mark.parametrize(
    ("kwargs", "local", "hub"),
    [({}, GENERATES, None),
     ({"runner": "pooling"}, EMBEDS, set(TASKS) - GENERATES),
     ({"convert": "embed"}, EMBEDS, EMBEDS),
     ({"runner": "generate"}, GENERATES, GENERATES),
     ({"convert": "classify"}, SCORES, SCORES),
     ({"hf_overrides": {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}}, SCORES, None),
     ({"hf_overrides": {"architectures": ["Qwen3ForSequenceClassification"], "classifier_from_token": ["no", "yes"]}},
      SCORES, SCORES)],
)  # fmt: skip
def test_the_runner_of_vllm_decides_its_tasks(
    tmp_path: Path, kwargs: dict[str, Any], local: set[str], hub: set[str] | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert runner_tasks(EngineConfig(kind="vllm", model=str(tmp_path), kwargs=kwargs)) == local
    assert runner_tasks(EngineConfig(kind="vllm", model="org/model", kwargs=kwargs)) == hub


def test_a_task_that_the_runner_lacks_is_refused_before_vllm_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    check = request_check(EngineConfig(kind="vllm", model=str(tmp_path)))
    assert check is not None
    check(Request([], task="loglikelihood", inputs={"prompt": "a", "completion": "b"}))
    with pytest.raises(EngineError) as error:
        check(Request([], task="embed", inputs={"text": "a"}))
    assert str(error.value) == "engine=vllm does not support task=embed (it supports chat, loglikelihood)"


def test_the_pooling_of_vllm_is_part_of_the_key() -> None:
    ways: list[dict[str, Any]] = [{}, {"runner": "pooling"}, {"pooler_config": {"pooling_type": "CLS"}}]
    assert len({str(identity(EngineConfig(kind="vllm", model="org/model", kwargs=each)).values) for each in ways}) == 3


def encode(text: str) -> list[int]:
    """Token ids of a small vocabulary, the longest match first."""
    words, ids = ["world", "wor", "ld", "Hello", " "], []
    while text:
        word = next(word for word in words if text.startswith(word))
        ids.append(words.index(word))
        text = text[len(word) :]
    return ids


def test_a_completion_begins_at_the_first_token_that_the_prompt_alone_does_not_have() -> None:
    assert pair_tokens(encode, "Hello ", "world", None) == ([3, 4, 0], 2)
    assert pair_tokens(encode, "Hello wor", "ld", None) == ([3, 4, 0], 2)  # the token that spans both is the completion's
    assert pair_tokens(encode, "", "ld", 9) == ([9, 2], 1)
    for prompt, completion, first in (("Hello", "", 9), ("", "ld", None)):
        with pytest.raises(EngineError) as error:
            pair_tokens(encode, prompt, completion, first)
        assert error.value.type == "invalid_input"


def test_the_completion_of_a_conversation_is_its_last_answer() -> None:
    assert split_at_answer("user: yes? assistant: yes", "yes") == ("user: yes? assistant: ", "yes")
    assert split_at_answer("assistant: yes ", " yes ") == ("assistant: ", "yes ")
    with pytest.raises(EngineError):
        split_at_answer("assistant: YES", "yes")


def test_the_values_of_a_likelihood() -> None:
    assert likelihood_values([-1.0, -3.0], each=False) == {"loglikelihood": -4.0, "tokens": 2, "perplexity": math.exp(2)}
    assert likelihood_values([-1.0], each=True)["token_logprobs"] == [-1.0]
    assert likelihood_values([-1e6], each=False)["perplexity"] == math.inf
