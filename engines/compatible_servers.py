"""Well-known servers with OpenAI's chat completions API that have no engine of their own: use `openai_compatible`."""

from __future__ import annotations

from collections.abc import Iterable

from engines.errors import no_such

# Name -> base URL, and the usual environment variable of the API key, if the server needs one. Names are compared without
# `-` and `_`. A word in capitals is to be replaced.
SERVERS: dict[str, tuple[str, str | None]] = {
    "ollama": ("http://localhost:11434/v1", None),
    "lmstudio": ("http://localhost:1234/v1", None),
    "llamaserver": ("http://localhost:8080/v1", None),
    "groq": ("https://api.groq.com/openai/v1", "GROQ_API_KEY"),
    "mistral": ("https://api.mistral.ai/v1", "MISTRAL_API_KEY"),
    "xai": ("https://api.x.ai/v1", "XAI_API_KEY"),
    "azure": ("https://RESOURCE.openai.azure.com/openai/v1", "AZURE_OPENAI_API_KEY"),
}
ALIASES = {"llamacppserver": "llamaserver", "grok": "xai", "mistralai": "mistral", "azureopenai": "azure"}


def no_such_engine(name: str, known: Iterable[str]) -> str:
    """The message for an unknown engine: the keys for a server that needs no engine of its own, or the nearest name."""
    plain = name.lower().replace("-", "").replace("_", "")
    if (server := SERVERS.get(ALIASES.get(plain, plain))) is None:
        return no_such("engine", name, known)
    url, variable = server
    key = f" engine.api_key_env={variable}" if variable else ""
    return f"there is no engine '{name}': use engine=openai_compatible engine.base_url={url}{key}"
