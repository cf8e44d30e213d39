"""The models that a provider has now, from its own list over HTTP: `GET …/models`, or two calls of Bedrock's API."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from engines.config import EngineConfig
from engines.errors import ConfigError, EngineError
from engines.remote.auth import Auth
from engines.remote.batch.client import Client
from engines.remote.bedrock import call, new_client
from engines.remote.preflight import shown_url
from engines.remote.provider import WIRE_PATHS, Provider, endpoints

# A list arrives at once, so this is shorter than for an answer. Temporary errors are repeated for `PATIENCE_S`.
TIMEOUT_S, PATIENCE_S = 30.0, 5.0
# Anthropic's largest page. Other servers ignore the parameter or allow it.
PAGE, MOST_PAGES = 1000, 100
# The names of one field in the lists of OpenAI and Azure, Mistral, and OpenRouter: the last day of a model.
_ENDS = ("shutdown_date", "deprecation", "expiration_date")
# The same for the length of the context: OpenRouter, Together and Fireworks; vLLM and SGLang; Mistral; Groq; Anthropic.
_CONTEXT = ("context_length", "max_model_len", "max_context_length", "context_window", "max_input_tokens")


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One model in a provider's list."""

    id: str
    context: int | None = None  # tokens
    ends: str | None = None  # the day on which the provider switches it off, such as 2027-04-01


def list_models(config: EngineConfig) -> tuple[str, list[ListedModel]]:
    """The URL of the list, and the models in it, sorted.

    Raises `ConfigError` if the engine has no list or its key is missing, and `EngineError` if the server gives no list.
    """
    provider = Provider.of(config)
    if not config.provider:
        text = f"engine={config.kind} has no list of models: engine.model is a file, a directory or an id of the hub"
        raise ConfigError(text, key=f"engine={config.kind}")
    if not provider.lists_models:
        text = f"the API of engine={config.kind} has no list of models: see the provider's own pages"
        raise ConfigError(text, key=f"engine={config.kind}")
    found = _bedrock(config) if provider.wire == "converse" else _over_http(config, provider)
    return found[0], sorted(found[1], key=lambda model: model.id)


def _over_http(config: EngineConfig, provider: Provider) -> tuple[str, list[ListedModel]]:
    url = urlsplit(endpoints(config, provider)[0])
    base = url._replace(path=url.path.removesuffix(WIRE_PATHS[provider.wire]), query="").geturl()
    auth = Auth.of(config, provider)
    client = Client(base, {**provider.headers, **config.headers, **auth.fixed}, auth.clean, PATIENCE_S, url.query)
    client.http.timeout = httpx.Timeout(TIMEOUT_S)
    first = f"/models?limit={PAGE}" if provider.wire == "messages" else "/models"
    shown = shown_url(f"{base}/models")
    try:
        models = {model.id: model for item in _items(client, first) if (model := _model(item))}
    except EngineError as error:
        error.args = (f"{shown}: {error}",)
        raise
    finally:
        client.close()
    return shown, list(models.values())


def _items(client: Client, path: str) -> Iterator[Any]:
    """The entries of all pages. Together sends a list, the others `{"data": […]}`."""
    first = path
    for _ in range(MOST_PAGES):
        page = client.json("GET", path)
        items = page.get("data") if isinstance(page, Mapping) else page
        if not isinstance(items, list):
            raise EngineError("bad_response", "the answer is not a list of models")
        yield from items
        links = page.get("links") if isinstance(page, Mapping) else None
        if isinstance(links, Mapping) and isinstance(links.get("next"), str):  # OpenRouter
            path = client.resolve(links["next"])
            if not client.ours(path):
                return
        elif isinstance(page, Mapping) and page.get("has_more") is True and isinstance(page.get("last_id"), str):
            path = f"{first}{'&' if '?' in first else '?'}after_id={quote(page['last_id'])}"  # Anthropic
        else:
            return


def _model(item: Any) -> ListedModel | None:
    if not isinstance(item, Mapping) or not isinstance(item.get("id"), str):
        return None
    numbers = (item.get(name) for name in _CONTEXT)
    context = next((n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)
    ends = next((day for name in _ENDS if (day := _day(item.get(name)))), None)
    return ListedModel(item["id"].removeprefix("models/"), context, ends)  # Gemini's ids have this prefix


def _day(value: Any) -> str | None:
    """The day of a date, or of a time, in ISO form."""
    if isinstance(value, datetime.datetime):
        return value.date().isoformat()
    try:
        return datetime.date.fromisoformat(value[:10]).isoformat() if isinstance(value, str) else None
    except ValueError:
        return None


def _bedrock(config: EngineConfig) -> tuple[str, list[ListedModel]]:
    """The models that write text and can be asked by their id, and the inference profiles, which have ids too."""
    client = new_client(config, "bedrock")
    found = []
    summaries = call(partial(client.list_foundation_models, byOutputModality="TEXT"))["modelSummaries"]
    for summary in summaries:
        if "ON_DEMAND" in summary.get("inferenceTypesSupported", ["ON_DEMAND"]):
            ends = _day((summary.get("modelLifecycle") or {}).get("endOfLifeTime"))
            found.append(ListedModel(summary["modelId"], ends=ends))
    more: dict[str, str] = {}
    for _ in range(MOST_PAGES):
        page = call(partial(client.list_inference_profiles, **more))
        found += [ListedModel(profile["inferenceProfileId"]) for profile in page["inferenceProfileSummaries"]]
        if not (token := page.get("nextToken")):
            break
        more = {"nextToken": token}
    url = str(client.meta.endpoint_url)
    client.close()
    return shown_url(f"{url}/foundation-models"), found
