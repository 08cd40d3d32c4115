"""The optimizer's averages, which Keras shares with the policy after `fit`."""

from typing import Any

import jax.numpy as jnp


def separate_averages(model: Any) -> None:
    """Give weights arrays of their own where they share the averages'.

    With `use_ema` Keras (3.15) ends `fit` by assigning the averages' own arrays
    to the weights. The next step, or an evaluation, would donate an array
    twice, or delete what the optimizer still holds.
    `tests/test_sequences.py` tells when that changes.

    Args:
        model: A compiled model, its state in its variables.
    """
    held = {id(variable.value) for variable in model.optimizer.variables}
    for variable in model.trainable_variables:
        if id(variable.value) in held:
            variable.assign(jnp.copy(variable.value))
