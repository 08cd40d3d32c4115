"""Policies: loading and saving presets, LoRA, generation.

Imports `data` for tokenizers and preprocessors; never references or training.
"""
