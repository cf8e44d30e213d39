"""Scripts: a conversation whose user has more to say after each answer, whatever that is."""

from __future__ import annotations

import dataclasses

from engines.errors import Failure
from engines.structured import Generate
from engines.types import Completion, Message, Request


async def generate_turns(generate: Generate, request: Request) -> Completion:
    """Asks the request and then each of its `turns`, after the answers before it; the completion is the last one's.

    What was said between is its `dialogue`; an error, which ends the script, names the turn and keeps what came before.
    """
    if not request.turns:
        return await generate(request)
    dialogue: list[Message] = []
    before = Completion(attempts=0)
    last = len(request.turns)
    for at in range(last + 1):
        turn = dataclasses.replace(
            request,
            messages=[*request.messages, *dialogue],
            # Only the last one's choices are of use.
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
            said = completion.message
            if said.get("content") is None and not said.get("tool_calls"):
                said = {**said, "content": ""}
            dialogue += [said, {"role": "user", "content": request.turns[at]}]
    return completion
