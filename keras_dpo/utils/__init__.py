"""Shared helpers: files, messages, time limits and sizes.

Imports nothing from keras_dpo but `errors`.
"""
