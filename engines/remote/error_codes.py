"""Tables of what providers' errors mean: by their codes, then by their words, then by the HTTP status.

A code decides before words. Words decide only where a provider has no code for the case, or one code for several cases.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from engines.errors import ErrorCode, ErrorType, Scope
from engines.params import GENERATION_FIELDS


class Meaning(NamedTuple):
    """The meaning of an error for its request and for other requests."""

    type: ErrorType
    scope: Scope = "row"
    retryable: bool = False
    code: ErrorCode | None = None


EMPTY = Meaning("auth", "key", code=ErrorCode.ACCOUNT_EMPTY)  # the account has no money, or its spending limit is reached
KEY = Meaning("auth", "key", code=ErrorCode.KEY_REFUSED)
NO_MODEL = Meaning("not_found", "model")  # misspelt, retired or not deployed
NO_ACCESS = Meaning("auth", "model")  # gated, or not part of the account's plan
NO_ADDRESS = Meaning("not_found", "run")
PARAMETER = Meaning("bad_request", "run")
BAD_REQUEST = Meaning("bad_request")
TOO_LONG = Meaning("context_length")
FILTERED = Meaning("content_filter")
RATE = Meaning("rate_limit", "key", retryable=True)
SERVER = Meaning("server", retryable=True)
TIMEOUT = Meaning("timeout", retryable=True)
BAD_ANSWER = Meaning("bad_response", retryable=True)

_BY_MEANING: tuple[tuple[Meaning, str], ...] = (
    (
        EMPTY,
        "insufficient_quota billing_hard_limit_reached billing_not_active billing_error billing_disabled credit_limit "
        "insufficient_balance insufficient_credits insufficient_user_quota credit_balance_exhausted payment_required "
        "organization_usage_limit_exceeded organization_spend_limit_exceeded project_spend_limit_exceeded "
        "exceeded_current_quota_error arrearage allocationquota.freetieronly prepaidbilloverdue postpaidbilloverdue "
        "commoditynotpurchased blocked_api_access 1113 30001 30011",
    ),
    (
        KEY,
        "invalid_api_key authentication_error invalid_authentication_error incorrect_api_key_error wrong_api_key "
        "invalidapikey unauthenticated api_key_invalid api_key_service_blocked account_deactivated organization_restricted "
        "permission_error unsupported_country_region_territory ip_not_authorized consumer_suspended service_disabled "
        "unrecognizedclientexception expiredtokenexception invalidsignatureexception 1000 1001 1002 1003 1004 1110 1111 "
        "1112",
    ),
    (
        NO_MODEL,
        "model_not_found modelnotfound model_not_available model_not_supported model_decommissioned deploymentnotfound "
        "invalid_model resourcenotfoundexception 1211 1221 1222",
    ),
    (NO_ACCESS, "model.accessdenied accessdenied.unpurchased model_access_denied 1220"),
    (TOO_LONG, "context_length_exceeded exceed_context_size_error tokens_too_long characters_too_long 3051 1261"),
    (
        FILTERED,
        "content_filter content_policy_violation responsibleaipolicyviolation data_inspection_failed datainspectionfailed "
        "invalid_prompt moderation moderation_blocked unsafe_request 1301",
    ),
    (
        RATE,
        "rate_limit_exceeded rate_limit_error rate_limit_reached_error ratelimitreached too_many_requests "
        "too_many_requests_error request_quota_exceeded token_quota_exceeded too_many_tokens_error queue_exceeded "
        "model_rate_limit resource_exhausted resource_unavailable limit_requests limitrequests limit_burst_rate throttling "
        "throttling.ratequota throttling.burstrate throttling.allocationquota throttlingexception toomanyrequestsexception "
        "servicequotaexceededexception service_tier_capacity_exceeded engine_overloaded_error capacity_exceeded slow_down "
        "1302 1303 1305 1308",
    ),
    (SERVER, "overloaded overloaded_error generation incomplete_generation modelerrorexception "
             "modelnotreadyexception"),
    (TIMEOUT, "modeltimeoutexception"),
    (BAD_ANSWER, "json_validate_failed tool_use_failed"),  # Groq: the model's output was not what the API asked it for
)  # fmt: skip
CODES = {code: meaning for meaning, codes in _BY_MEANING for code in codes.split()}
# Codes of refused parameters, and the parameters that configurations set. A refusal of one of them would hit every row.
PARAMETER_CODES = frozenset(("unsupported_parameter", "unknown_parameter", "unsupported_value"))
PARAMETERS = frozenset(GENERATION_FIELDS) | {
    "max_completion_tokens", "max_output_tokens", "top_logprobs", "reasoning", "verbosity", "service_tier",
    "parallel_tool_calls",
}  # fmt: skip

STATUSES: dict[int, Meaning] = {
    401: KEY, 402: EMPTY, 403: Meaning("auth"), 404: NO_ADDRESS, 405: NO_ADDRESS, 408: TIMEOUT, 409: SERVER, 410: NO_MODEL,
    425: SERVER, 429: RATE, 498: RATE, 501: PARAMETER, 504: TIMEOUT,
}  # fmt: skip


def _words(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE)


TOO_LONG_WORDS = _words(
    r"(context|prompt|input)[ _](length|window|size|tokens?)\b.{0,60}(exceed|longer|too (long|large)|greater|overflow)",
    r"exceed\w*\b.{0,60}\b(context|token limit|model token|max(imum)? (allowed )?(input|number of tokens|prompt))",
    r"(maximum|max|available) (context|model|prompt) (length|size|len)\b|max_model_len|context the overflows",
    r"longer than the (maximum model length|model'?s context|context)|(prompt|input|request) is too (long|large)",
    r"too many (input )?tokens|reduce the length of the (messages|prompt|input)|too large for model with",
    r"range of input length should be|`inputs` (tokens|must have less)|prompt contains \d+ tokens|request too large",
    r"context size has been exceeded|prompt (is )?too long|超长",
)
FILTERED_WORDS = _words(
    r"content[ _-]?(filter|policy|management)|safety (system|check|filter|polic|setting)|safety_check|moderation",
    r"was flagged|violat\w+ (our |the |openai's )?(usage|content|community|safety) (guidelines|polic)",
    r"inappropriate content|content exists risk|considered high risk|sensitive content|不安全|敏感",
    r"blocked by (our |the )?(content|safety)",
)
EMPTY_WORDS = _words(
    r"credit balance is too low|insufficient (account |paid )?(balance|credits?|funds|quota)|balance is insufficient",
    r"exceeded your current quota|used all available credits|(out of|have any|requires more|included) credits",
    r"credit limit exceeded|spending limit|billing (hard )?limit|specified api usage limits|key limit exceeded",
    r"account .{0,80}(is suspended|not active|in good standing)|余额不足|欠费",
)
KEY_WORDS = _words(
    r"(incorrect|invalid|wrong) (x-)?api[ _-]?key|api key (is |not )(in)?valid|organization has been (disabled|restricted)",
    r"location is not supported",
)
# Of a 403 only: in a 400 these may speak of the request.
DENIED_WORDS = _words(
    r"\b(key|token|credentials?)\b|unauthorized|not authorized|permission|access denied|firewall|country|region|consumer"
)
NO_ACCESS_WORDS = _words(
    r"access to (the |this )?(model|gated)|have access to (the )?model|gated (repo|model)|model (is )?(gated|restricted)"
)
NO_MODEL_WORDS = _words(
    r"\bmodels?\b.{0,160}(not found|(does |doesn't )?not exist|not supported by any)",
    r"\bmodels?\b.{0,160}(decommissioned|end of (its )?life|no longer)|no models loaded|^model: |模型不存在",
    r"(unknown|invalid|no such|unable to access|not found the) (non-serverless )?model|not a valid model",
    r"model identifier is invalid|on-demand throughput|no endpoints found (for|matching)",
)
# OpenRouter's 404 for a request that none of the model's hosts can serve.
UNSERVED_WORDS = _words(r"no endpoints found that support")
# DashScope gives its limit of tokens a minute the code of an empty account.
PER_MINUTE_WORDS = _words(r"token-limit|(?<!free )allocated quota exceeded|batch requests are being throttled")
# A rate limit of 0: the account's plan does not include the model (Gemini's free tier).
NO_QUOTA_WORDS = _words(r"\blimit: 0\b")
# A single request that is larger than the limit of a minute never succeeds (OpenAI, Groq).
OVER_MINUTE_WORDS = _words(r"request too large")
# LM Studio's answer, with status 200, at a path that it does not have.
WRONG_PATH_WORDS = _words(r"unexpected endpoint or method")


def meaning_of(status: int, codes: list[str], message: str, param: str | None, asks_to_wait: bool) -> Meaning:
    """The meaning of an error. `codes` are in lower case, the most specific first."""
    meaning = _by_code(status, codes, message) or _by_words(status, message, asks_to_wait) or _by_status(status, param)
    if meaning in (BAD_REQUEST, PARAMETER) and status < 500:
        root = re.split(r"[.\[]", param or "")[0].lower()
        unsupported = not PARAMETER_CODES.isdisjoint(codes) and root not in ("messages", "input", "prompt")
        return PARAMETER if unsupported or root in PARAMETERS or status == 501 else BAD_REQUEST
    return meaning


def _by_code(status: int, codes: list[str], message: str) -> Meaning | None:
    meaning = next((CODES[code] for code in codes if code in CODES), None)
    if status >= 500:  # the server failed, whatever code it gives, unless the row is too long
        return TOO_LONG if meaning == TOO_LONG else None
    if meaning == EMPTY and "insufficient_quota" in codes and PER_MINUTE_WORDS.search(message):
        return RATE
    if meaning == RATE:
        if status == 413 or OVER_MINUTE_WORDS.search(message):
            return TOO_LONG
        if NO_QUOTA_WORDS.search(message):
            return NO_ACCESS
    # Anthropic's code of a key without rights is also that of a key without rights for one model.
    if meaning == KEY and status == 403 and NO_ACCESS_WORDS.search(message):
        return NO_ACCESS
    return meaning


def _by_words(status: int, message: str, asks_to_wait: bool) -> Meaning | None:
    final = status in (400, 402, 403, 404, 412, 422) or (status == 429 and not asks_to_wait)
    if final and EMPTY_WORDS.search(message):
        return EMPTY
    if status in (400, 413, 422, 500) and TOO_LONG_WORDS.search(message):
        return TOO_LONG
    if status == 429 and OVER_MINUTE_WORDS.search(message):
        return TOO_LONG
    if status in (400, 403, 422) and FILTERED_WORDS.search(message):
        return FILTERED
    if status in (400, 401, 403, 404, 422):
        if NO_ACCESS_WORDS.search(message):
            return NO_ACCESS
        if NO_MODEL_WORDS.search(message):
            return NO_MODEL
    if (status in (400, 403) and KEY_WORDS.search(message)) or (status == 403 and DENIED_WORDS.search(message)):
        return KEY
    if status == 404 and UNSERVED_WORDS.search(message):
        return BAD_REQUEST
    if status < 300 and WRONG_PATH_WORDS.search(message):
        return NO_ADDRESS
    return None


def _by_status(status: int, param: str | None) -> Meaning:
    if status == 404 and param == "model":
        return NO_MODEL
    if 300 <= status < 400:
        return NO_ADDRESS
    return STATUSES.get(status, SERVER if status >= 500 or status < 300 else BAD_REQUEST)
