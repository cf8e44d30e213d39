"""The batch executor: rows go through a provider's batch API."""
