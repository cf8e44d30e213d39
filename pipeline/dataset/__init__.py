"""From input files to parsed rows and their keys."""
