"""An OpenAI-compatible server on Ray Serve."""
