"""Engines that load a model on this machine.

    llamacpp        llamacpp*.py, llama_library.py; gguf*.py read and convert its model files
    transformers    transformers*.py, vision.py, images.py; continuous_batching.py is the library's own
    vllm            vllm*.py
    sglang_offline  sglang.py, process_guard.py

grammar.py enforces structured output for the first two. The other modules know a model without loading it: its files, size,
chat template and prompts, and the checks before a run.
"""
