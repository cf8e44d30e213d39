"""Providers' batch APIs: the same requests, usually at half the price, answered within a day.

Programs call `engine.infer_batch(conversations)` and the methods beside it (api.py). Datasets use `run.mode=batch`
(pipeline/executors/batch/executor.py).
"""
