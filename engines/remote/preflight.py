"""Checks a remote engine's configuration before anything is sent, and hides its secrets in what people see."""

from __future__ import annotations

import dataclasses
import datetime
import os
from urllib.parse import urlsplit, urlunsplit

from engines.config import EngineConfig
from engines.errors import ConfigError, Finding
from engines.prices import priced
from engines.remote.auth import SECRET_HEADER, Auth
from engines.remote.provider import Provider, endpoints

HIDDEN = "***"
# A model whose last day is nearer than this gets a warning.
WARNING_DAYS = 60


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
    return [*found, *_last_days(config)]


def _last_days(config: EngineConfig) -> list[Finding]:
    """A warning if the price list has a day on which the provider switches the model off."""
    ends = priced(config).ends
    if ends is None:
        return []
    day = datetime.date.fromisoformat(ends)
    if day > datetime.date.today() + datetime.timedelta(days=WARNING_DAYS):
        return []
    when = (
        f"switches {config.model} off on {ends}"
        if day > datetime.date.today()
        else f"switched {config.model} off on {ends}"
    )
    return [Finding(f"the provider {when}: choose another engine.model", key="engine.model", is_warning=True)]


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
    if not SECRET_HEADER.search(name):
        return value
    return f"Bearer {HIDDEN}" if value.startswith("Bearer ") else HIDDEN


def shown_url(url: str) -> str:
    """A URL as people may see it: without a user name, a password and a query, which may hold a key."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
