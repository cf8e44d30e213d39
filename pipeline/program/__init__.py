"""A whole run from a Python program: `from pipeline import infer`."""
