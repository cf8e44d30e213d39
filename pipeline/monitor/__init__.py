"""The state of a run for people and tools: status, progress, metrics, traces."""
