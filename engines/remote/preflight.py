"""What can be checked of a remote engine's configuration before anything is sent, and how its secrets are hidden."""

from __future__ import annotations

import dataclasses
import os
import re

from engines.config import EngineConfig
from engines.errors import ConfigError, Finding
from engines.remote.auth import Auth
from engines.remote.provider import Provider, endpoints

HIDDEN = "***"
_SECRET_HEADER = re.compile(r"authorization|cookie|api[_-]?key|token|secret|password", re.IGNORECASE)


def findings(config: EngineConfig) -> list[Finding]:
    """Problems of URLs, and a key that is missing on this machine."""
    found = []
    try:
        provider = Provider.of(config)
        if provider.auth == "aws":  # boto3 looks for both
            return []
        endpoints(config, provider)
    except ConfigError as error:
        return [Finding.of(error)]
    try:
        Auth.of(config, provider)
    except ConfigError as error:
        found.append(Finding.of(error, local=True))
    return found


def without_secrets(config: EngineConfig) -> EngineConfig:
    """The configuration for an engine that only renders requests: it needs no key, and has `***` in its place."""
    provider, headers = Provider.of(config), dict(config.headers)
    keyed = provider.auth != "optional" or os.environ.get(config.api_key_env or "")
    if keyed and not any(name.lower() in ("authorization", "x-api-key") for name in headers):
        headers |= {"x-api-key": HIDDEN} if provider.auth == "x-api-key" else {"authorization": f"Bearer {HIDDEN}"}
    values = config.provider
    if provider.auth == "google":  # its token comes from files and services that need not be here
        values = {**values, "auth": "optional"}
    return dataclasses.replace(config, headers=headers, provider=values, api_key_env=None, fallback=[])


def masked(name: str, value: str) -> str:
    """A header's value as people may see it."""
    if not _SECRET_HEADER.search(name):
        return value
    return f"Bearer {HIDDEN}" if value.startswith("Bearer ") else HIDDEN
