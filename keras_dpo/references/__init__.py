"""Where reference log-probs come from, and the stores that keep them.

Imports `policies`, `scoring` and `data`; never training or callbacks.
"""
