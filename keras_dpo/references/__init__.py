"""Sources of reference log-probs, and the stores that cache them.

Imports `policies`, `scoring` and `data`; never training or callbacks.
"""
