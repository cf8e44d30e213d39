"""Advice for each type of failed rows, and for truncated answers. `eagleray errors` and the report show it."""

from __future__ import annotations

# Error type -> its meaning and what to do about it.
ADVICE = {
    "invalid_input": "The row is not a valid request: correct it in the input (the message names file and line).",
    "context_length": "The prompt and the answer do not fit into the model's context: shorten the row or lower "
    "generation.max_tokens; eagleray plan finds such rows.",
    "content_filter": "The provider or the model refused the content: another model may accept it (engine.fallback=[…]).",
    "auth": "The server refused the API key, or the key may not use the model: check the variable that engine.api_key_env "
    "names, and the account's access to the model.",
    "not_found": "The server does not know the model or the address: check engine.model and engine.base_url.",
    "bad_request": "The server refused the request: the message names the parameter; check the generation keys and "
    "engine.extra_body.",
    "rate_limit": "The provider's limit or quota was still reached after all retries: set engine.requests_per_minute to "
    "your limit, or wait.",
    "server": "The server failed at each attempt: send the rows again later, or raise engine.max_retries.",
    "timeout": "No answer arrived in time: raise engine.timeout_s; lower generation.max_tokens or engine.max_concurrency.",
    "connection": "The server could not be reached: check engine.base_url and the network, then send the rows again.",
    "bad_response": "The response was not an answer as the API describes it: send the rows again.",
    "schema_mismatch": "The answer does not match generation.response_format: raise generation.max_tokens, or simplify the "
    "schema.",
    "engine_crash": "The engine's process died twice while it worked on this row: the row may need too much memory.",
    "cancelled": "The row was cancelled before it was answered: send it again.",
    "budget": "The budget was used up before this row: raise run.budget_usd.",
}

TRUNCATED = (
    "Raise generation.max_tokens. For a reasoning model, lower generation.reasoning_effort, because reasoning uses "
    "the same limit. A changed setting changes every request, so the next run sends all rows again."
)
