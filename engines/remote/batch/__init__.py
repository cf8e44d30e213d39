"""Providers' batch APIs: the same requests at about half the price, answered within a day.

`engine.infer_batch(conversations)` and its sisters for a program; `run.mode=batch` for datasets
(pipeline/executors/batch/executor.py).
"""
