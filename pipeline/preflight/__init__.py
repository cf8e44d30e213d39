"""Checks before a run, and the dry run."""
