"""The tasks of `engine=vllm` other than a chat, through vLLM's own handlers of pooling requests.

The handlers tokenise, pair texts and pool as `vllm serve` does: the pooling, the normalisation and the activation are those
of the checkpoint, or of `engine.kwargs` (`pooler_config`, `hf_overrides`, `chat_template`). The score of a conversation is
the output of the reward model itself, without an activation. Log likelihoods are vLLM's log probabilities of a prompt.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.entrypoints.pooling.classify.protocol import ClassificationChatRequest, ClassificationCompletionRequest
from vllm.entrypoints.pooling.embed.protocol import EmbeddingCompletionRequest
from vllm.entrypoints.pooling.pooling.protocol import PoolingChatRequest
from vllm.entrypoints.pooling.scoring.protocol import RerankRequest, ScoreQueriesDocumentsRequest
from vllm.inputs import tokens_input
from vllm.outputs import ScoringOutput
from vllm.renderers import ChatParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from engines.errors import EngineError, invalid
from engines.local.likelihood import likelihood_values, pair_tokens, split_at_answer
from engines.local.task_values import classify_values, rerank_values, shortened
from engines.local.vllm_runner import loaded_tasks
from engines.types import Completion, Request, text_of, with_effect
from engines.usage import Usage

LORA = "engine.kwargs.lora_target_modules"


class VLLMTasks:
    """Evaluates requests in vLLM's event loop. `tasks` are those of the loaded model."""

    def __init__(self, llm: AsyncLLM, state: Any, supported: tuple[Any, ...]) -> None:
        self.llm, self.state = llm, state
        self.model = llm.model_config
        self.pooling = None if "generate" in supported else self.model.get_pooling_task(supported)
        logprobs = not self.model.logprobs_mode.endswith("logits")
        self.tasks = loaded_tasks(self.pooling, getattr(self.model.hf_config, "num_labels", 0), logprobs=logprobs)
        self.template_kwargs: dict[str, Any] = state.args.default_chat_template_kwargs or {}
        self.counter = itertools.count()
        self.evaluators: dict[str, Callable[..., Any]] = {
            "embed": self._embed, "classify": self._classify, "score": self._score, "rerank": self._rerank,
            "loglikelihood": self._loglikelihood,
        }  # fmt: skip
        for name in ("serving_embedding", "serving_classification", "serving_scores", "serving_pooling"):
            if handler := getattr(state, name, None):
                handler._build_response = lambda context: context  # tensors in the place of an HTTP response

    async def evaluate(self, request: Request, name: str, fields: dict[str, Any], messages: list[Any]) -> Completion:
        """The values of a request. `name` is the model or the adapter, `fields` are further fields of vLLM's request.

        Raises `EngineError`, and vLLM's own exceptions.
        """
        completion: Completion = await self.evaluators[request.task](request, {**fields, "model": name}, messages)
        return completion

    # -- the pooling runner -------------------------------------------------------------------------------------------

    async def _embed(self, request: Request, fields: dict[str, Any], messages: list[Any]) -> Completion:
        asked = EmbeddingCompletionRequest(**{**fields, "input": request.inputs["text"]})
        context = await self.state.serving_embedding(asked)
        embedding = np.array(context.final_res_batch[0].outputs.data.float().numpy())  # a copy: the buffer is the batch's
        normalized = context.pooling_params.use_activation
        embedding = shortened(embedding, request.generation.dimensions, normalized)
        return Completion(values={"embedding": embedding}, usage=_usage(context))

    async def _classify(self, request: Request, fields: dict[str, Any], messages: list[Any]) -> Completion:
        if messages:
            asked: Any = ClassificationChatRequest(**self._chat(fields, messages))
        else:
            asked = ClassificationCompletionRequest(**{**fields, "input": request.inputs["text"]})
        context = await self.state.serving_classification(asked)
        scores = context.final_res_batch[0].outputs.data.float().tolist()
        labels = [str(self.model.hf_config.id2label.get(i, f"LABEL_{i}")) for i in range(len(scores))]
        return Completion(values=classify_values(labels, scores), usage=_usage(context))

    async def _score(self, request: Request, fields: dict[str, Any], messages: list[Any]) -> Completion:
        if messages:
            return await self._reward(fields, messages)
        if self.state.serving_scores is None:
            raise invalid("the model is a reward model: task=score needs messages")
        asked = {**fields, "queries": request.inputs["query"], "documents": request.inputs["text"]}
        context = await self.state.serving_scores(ScoreQueriesDocumentsRequest(**asked))
        return Completion(values={"score": _score_of(context.final_res_batch[0])}, usage=_usage(context))

    async def _reward(self, fields: dict[str, Any], messages: list[Any]) -> Completion:
        asked = {"use_activation": False, **self._chat(fields, messages)}
        if self.pooling == "classify":
            context = await self.state.serving_classification(ClassificationChatRequest(**asked))
            reward = context.final_res_batch[0].outputs.data
        elif self.pooling == "token_classify":  # the last token has read the whole conversation
            context = await self.state.serving_pooling(PoolingChatRequest(**asked, task="token_classify"))
            reward = context.final_res_batch[0].outputs.data[-1]
        else:
            raise invalid("the model compares two texts: task=score needs query and text, not messages")
        if reward.numel() != 1:
            raise invalid(f"the model has {reward.numel()} outputs, so a conversation has no single score")
        return Completion(values={"score": reward.item()}, usage=_usage(context))

    async def _rerank(self, request: Request, fields: dict[str, Any], messages: list[Any]) -> Completion:
        asked = RerankRequest(**{**fields, "query": request.inputs["query"], "documents": request.inputs["documents"]})
        context = await self.state.serving_scores(asked)
        values = rerank_values([_score_of(found) for found in context.final_res_batch])
        return Completion(values=values, usage=_usage(context))

    def _chat(self, fields: dict[str, Any], messages: list[Any]) -> dict[str, Any]:
        return {"chat_template_kwargs": self.template_kwargs, **fields, "messages": messages}

    # -- the generating runner ----------------------------------------------------------------------------------------

    async def _loglikelihood(self, request: Request, fields: dict[str, Any], messages: list[Any]) -> Completion:
        if (lora := self.llm.vllm_config.lora_config) and "lm_head" in (lora.target_modules or ("lm_head",)):
            # vLLM would apply the adapters of a batch's rows to the wrong tokens; on CPU the engine dies.
            text = "task=loglikelihood with adapters needs engine.kwargs.lora_target_modules without lm_head"
            raise EngineError(
                "invalid_input", f"{text}, for example [q_proj,v_proj]: the modules of the adapters", key=LORA, scope="run"
            )
        if unknown := with_effect({key: value for key, value in fields.items() if key != "model"}):
            raise invalid(f"task=loglikelihood on engine=vllm does not know {', '.join(unknown)} of the body")
        if messages:
            prompt, completion = await self._rendered(messages, text_of(request.messages[-1]))
        else:
            prompt, completion = request.inputs["prompt"], request.inputs["completion"]
        tokenizer = self.llm.get_tokenizer()
        # A chat template writes the first token itself.
        encode = functools.partial(tokenizer.encode, add_special_tokens=not messages)
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        tokenize = functools.partial(pair_tokens, encode, prompt, completion, first)
        tokens, start = await asyncio.get_running_loop().run_in_executor(self.llm.renderer._executor, tokenize)
        if len(tokens) >= self.model.max_model_len:  # vLLM always generates a token
            reason = (
                f"prompt and completion have {len(tokens)} tokens, and the context holds {self.model.max_model_len - 1}"
            )
            raise EngineError("context_length", reason)
        logprobs, cached = await self._logprobs(tokens, start, fields["model"])
        values = likelihood_values(logprobs, each=request.generation.logprobs is not None)
        return Completion(values=values, usage=Usage(input=len(tokens), cached_input=cached))

    async def _rendered(self, messages: list[Any], answer: str | None) -> tuple[str, str]:
        """The conversation as prompt and completion, by vLLM's chat template."""
        if answer is None:
            raise invalid("the last message has no text, so its likelihood is not known")
        how = {"tokenize": False, "add_generation_prompt": False, "continue_final_message": True}
        renderer = self.state.online_renderer
        params = ChatParams(renderer.chat_template, renderer.chat_template_content_format, {**self.template_kwargs, **how})
        _, prompt = await self.llm.renderer.render_messages_async(messages, params)
        if "prompt" not in prompt or "multi_modal_data" in prompt:
            raise invalid("task=loglikelihood on engine=vllm takes text only, and a tokenizer with a Jinja chat template")
        return split_at_answer(prompt["prompt"], answer)

    async def _logprobs(self, tokens: list[int], start: int, name: str) -> tuple[list[float], int]:
        """The log probabilities of `tokens[start:]`, and the number of tokens that were in the prefix cache.

        vLLM computes none where it reads its prefix cache, so by default it does not read the cache if they are wanted.
        Only those of the completion are wanted here: the prompt may be read from the cache, which several completions of
        one prompt share. Asked again without the cache if the part that was read reaches into the completion.
        """
        for skip_cache in (False, True):
            params = SamplingParams(
                max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False,
                skip_reading_prefix_cache=skip_cache, output_kind=RequestOutputKind.FINAL_ONLY,
            )  # fmt: skip
            lora = self.state.openai_serving_models.lora_requests.get(name)
            name_of_try = f"likelihood-{next(self.counter)}"
            async for answer in self.llm.generate(tokens_input(tokens), params, name_of_try, lora_request=lora):
                found = answer
            # One entry for each token; those of tokens in the cache are missing or have no meaning.
            logprobs = (found.prompt_logprobs.logprobs if found.prompt_logprobs else [])[start - len(tokens) :]
            cached = found.num_cached_tokens or 0
            if cached < start and len(logprobs) == len(tokens) - start:
                return logprobs, cached
        raise EngineError("server", "vLLM returned no log probabilities for the completion", retryable=True)


def _score_of(output: Any) -> float:
    return ScoringOutput.from_base(output.outputs).score


def _usage(context: Any) -> Usage:
    return Usage(input=sum(len(each["prompts"]["prompt_token_ids"]) for each in context.engine_inputs))
