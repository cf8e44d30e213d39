"""Shows the state of a run to people and tools: status, progress, metrics, traces."""
