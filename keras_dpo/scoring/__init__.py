"""Log-probs of completion tokens, from a policy and a batch.

Imports `compat` and `distribution`; never datasets, references or training
steps.
"""
