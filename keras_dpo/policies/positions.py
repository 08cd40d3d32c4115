"""Number of positions that a model supports."""

import sys
from typing import Any

import keras


def num_positions(policy: keras.Model) -> int | None:
    """Size of the policy's position embedding; None if it has none.

    A position beyond it would give NaN (JAX's `take`) or a shape error.
    """
    if "keras_hub" not in sys.modules:
        # Avoid an import of several seconds: no layer can be from Keras-Hub.
        return None
    import keras_hub

    backbone: Any = getattr(policy, "backbone", policy)
    tables = [
        layer.sequence_length
        for layer in backbone._flatten_layers()
        if isinstance(layer, keras_hub.layers.PositionEmbedding)
    ]
    return min(tables, default=None)
