"""How many positions a model knows."""

import sys
from typing import Any

import keras


def num_positions(policy: keras.Model) -> int | None:
    """Rows of the policy's table of positions; None where it has no table.

    A position beyond it would be NaN (`take` of JAX) or a shape error.
    """
    if "keras_hub" not in sys.modules:
        # Seconds to import, and no layer can be one of its.
        return None
    import keras_hub

    backbone: Any = getattr(policy, "backbone", policy)
    tables = [
        layer.sequence_length
        for layer in backbone._flatten_layers()
        if isinstance(layer, keras_hub.layers.PositionEmbedding)
    ]
    return min(tables, default=None)
