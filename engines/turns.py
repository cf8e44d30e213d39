"""Multi-turn rows: the user messages in `turns` follow one by one, each after the answer to the one before."""

from __future__ import annotations

import dataclasses

from engines.errors import Failure
from engines.structured import Generate
from engines.types import Completion, Message, Request


async def generate_turns(generate: Generate, request: Request) -> Completion:
    """Asks the request, then each of its `turns` with the answers before it. Returns the last completion.

    Its `dialogue` has the messages between. An error ends the conversation, names the turn and keeps the dialogue so far.
    If one of the answers was cut off, so is the row: its `finish_reason` is `length`.
    """
    if not request.turns:
        return await generate(request)
    dialogue: list[Message] = []
    before = Completion(attempts=0)
    last, is_cut = len(request.turns), False
    for at in range(last + 1):
        turn = dataclasses.replace(
            request,
            messages=[*request.messages, *dialogue],
            # Further choices are of use in the last turn only.
            generation=request.generation if at == last else dataclasses.replace(request.generation, n=None),
            key=f"{request.key}-turn{at + 1}" if request.key else "",
            turns=[],
            stream=request.stream if at == last else None,
        )
        completion = await generate(turn)
        completion.accumulate(before)
        completion.dialogue = dialogue
        if completion.error is None and completion.finish_reason == "content_filter" and at < last:
            completion.choices, completion.error = [], Failure("content_filter", "the answer was refused or filtered")
        if completion.error is not None:
            completion.error.message = f"turn {at + 1} of {last + 1}: {completion.error.message}"
            break
        if at < last and completion.message is not None:
            before = completion
            is_cut |= completion.finish_reason == "length"
            said = completion.message
            if said.get("content") is None and not said.get("tool_calls"):
                said = {**said, "content": ""}
            dialogue += [said, {"role": "user", "content": request.turns[at]}]
    for choice in completion.choices if is_cut else ():
        if choice.finish_reason == "stop":
            choice.finish_reason = "length"
    return completion
