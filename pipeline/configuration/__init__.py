"""From keys, options and files to a `Config`, with Hydra."""
