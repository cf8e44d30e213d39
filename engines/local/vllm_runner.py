"""The tasks of `engine=vllm`. Its runner is fixed when it loads: it either generates, or pools for one purpose.

Nothing heavy is imported here: a run that asks for another task is refused before vLLM starts.
"""

from __future__ import annotations

from collections.abc import Mapping

from engines.config import EngineConfig
from engines.local.checkpoint_tasks import CLASSIFIES, EMBEDS, GENERATES, SCORES, checkpoint_tasks
from engines.tasks import TASKS

POOLS = frozenset(TASKS) - GENERATES
# The tasks of a pooling runner, by the pooling task that vLLM chose for its model.
POOLING_TASKS = {
    "embed": EMBEDS,
    "classify": CLASSIFIES,  # with one output also score and rerank
    "token_embed": frozenset(("score", "rerank")),  # late interaction, as ColBERT has it
    "token_classify": frozenset(("score",)),  # a reward model with an output for each token
}


def runner_tasks(config: EngineConfig) -> frozenset[str] | None:
    """The tasks of the runner that vLLM chooses by `engine.kwargs` and the checkpoint's files.

    None if neither tells: the model is on the hub, and `runner` and `convert` are not set.
    """
    kwargs = config.kwargs
    overrides = kwargs.get("hf_overrides")
    overrides = overrides if isinstance(overrides, Mapping) else {}
    found = SCORES if overrides.get("classifier_from_token") else checkpoint_tasks(config, overrides)
    runner, convert = kwargs.get("runner", "auto"), kwargs.get("convert", "auto")
    if runner == "generate":
        return GENERATES
    if convert == "embed":
        return EMBEDS
    if convert == "classify":
        return found if found in (SCORES, CLASSIFIES) else SCORES
    if runner == "pooling":
        return POOLS if found is None else EMBEDS if found == GENERATES else found
    return found


def loaded_tasks(pooling: str | None, labels: int, *, logprobs: bool) -> frozenset[str]:
    """The tasks of a loaded engine, by its pooling task (None: it generates) and its number of labels.

    `logprobs` is False if vLLM returns logits in the place of log probabilities.
    """
    if pooling is None:
        return GENERATES if logprobs else GENERATES - {"loglikelihood"}
    if pooling == "classify" and labels == 1:
        return SCORES
    return POOLING_TASKS.get(pooling, frozenset())
