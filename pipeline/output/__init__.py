"""The final output files, their columns and the manifest."""
