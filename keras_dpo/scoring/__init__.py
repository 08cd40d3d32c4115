"""A policy and a batch in, log-probs of the completion tokens out.

Imports `compat` and `distribution`; never a dataset, a reference or a training
step.
"""
