"""The checks before a run, and the dry run."""
