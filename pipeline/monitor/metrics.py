"""Prometheus metrics of a replica, exported through Ray. Scrape the `metrics` port of every node. docs/grafana.json is a
dashboard for them.

Ray adds the prefix `ray_` to each name. All metrics have the tags `engine` and `model`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from engines.config import EngineConfig
from pipeline.storage.ledger import TOKENS, Record

TAGS = ("engine", "model")
COUNTERS = {
    "eagleray_requests": "finished requests (duplicate rows share one) by result: ok, or the type of the error",
    "eagleray_tokens": "tokens by kind: input; cached_input and cache_write, parts of it; output; reasoning, a part of it",
    "eagleray_cost_usd": "known cost of the requests in US$",
    "eagleray_retries": "tries of a request after its first",
    "eagleray_throttled": "responses of a provider with the status 429, too many requests",
    "eagleray_limiter_wait_seconds": "seconds that requests waited for the cluster's rate limits",
}
GAUGES = {
    "eagleray_requests_in_flight": "requests in the engine",
    "eagleray_requests_at_hand": "requests that wait in the replica for the engine",
}
HISTOGRAMS = {
    "eagleray_latency_seconds": "seconds that the engine took for a request",
    "eagleray_queue_wait_seconds": "seconds that a request waited in the replica for the engine",
}
MORE_TAGS = {"eagleray_requests": ("result",), "eagleray_tokens": ("kind",)}
SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]
# Shorter times are not recorded in histograms: recording them would take a noticeable share of such an engine's time.
SLOW_S = 0.001
# If more times come together, an even sample of so many is recorded. Ray takes 20 µs for each of them on its way.
MOST_TIMES = 500


class Metrics:
    """The metrics of one replica."""

    def __init__(self, config: EngineConfig) -> None:
        from ray.util.metrics import Counter as RayCounter
        from ray.util.metrics import Gauge, Histogram

        self.tags = {"engine": config.kind, "model": config.model or ""}
        self.found: dict[str, Any] = {}
        for name, about in COUNTERS.items():
            self.found[name] = RayCounter(name, about, (*TAGS, *MORE_TAGS.get(name, ())))
        for name, about in GAUGES.items():
            self.found[name] = Gauge(name, about, TAGS)
        for name, about in HISTOGRAMS.items():
            self.found[name] = Histogram(name, about, SECONDS, TAGS)
        for metric in self.found.values():
            metric.set_default_tags(self.tags)
        self.reported: Counter[str] = Counter()  # the engine's counts as of the last call of `record`

    def record(
        self, records: Sequence[Record], waits: Sequence[float], engine: Mapping[str, float], in_flight: int, at_hand: int
    ) -> None:
        """Adds the events since the last call. `engine` holds the engine's own counts since its start."""
        with_result = [record for record in records if not record.superseded]
        results = Counter(record.completion.error.type if record.completion.error else "ok" for record in with_result)
        for result, requests in results.items():
            self._add("eagleray_requests", requests, {"result": result})
        usage = [record.completion.usage for record in records]
        sums = {kind: sum(getattr(one, kind) for one in usage) for kind in TOKENS}
        for kind, tokens in sums.items():
            self._add("eagleray_tokens", tokens, {"kind": kind})
        self._add("eagleray_cost_usd", sum(record.completion.cost_usd or 0.0 for record in records))
        self._add("eagleray_retries", sum(max(0, record.completion.attempts - 1) for record in records))
        for name in ("throttled", "limiter_wait_seconds"):
            self._add(f"eagleray_{name}", engine.get(name, 0.0) - self.reported[name])
        self.reported.update({name: engine.get(name, 0.0) - self.reported[name] for name in engine})
        self.found["eagleray_requests_in_flight"].set(in_flight)
        self.found["eagleray_requests_at_hand"].set(at_hand)
        self._observe("eagleray_latency_seconds", [record.completion.latency_s for record in with_result])
        self._observe("eagleray_queue_wait_seconds", waits)

    def _observe(self, name: str, times: Sequence[float]) -> None:
        slow = [seconds for seconds in times if seconds > SLOW_S]
        for seconds in slow[:: -(-len(slow) // MOST_TIMES) or 1]:
            self.found[name].observe(seconds)

    def _add(self, name: str, value: float, tags: dict[str, str] | None = None) -> None:
        if value > 0:
            self.found[name].inc(value, tags)
