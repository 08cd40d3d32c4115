"""LoRA policies through Keras' save and load, which would merge them.

Keras writes a LoRA layer's kernel with the adapters merged in and reads it
back with the adapters at zero (Keras 3.15), so that a loaded policy would be
held against the wrong reference. Here the three arrays are kept apart.
`tests/test_saving.py` tells when upstream does it.
"""

from typing import Any

import keras

from keras_dpo.errors import UserError


def adapted(policy: keras.Model) -> list[tuple[int, keras.layers.Layer]]:
    """(index, layer) of the layers with LoRA, in Keras' flat order."""
    return [
        (index, layer)
        for index, layer in enumerate(policy._flatten_layers())
        if getattr(layer, "lora_enabled", False)
    ]


def trained_parts(policy: keras.Model) -> dict[str, Any]:
    """Which layers have LoRA, of what rank, and which weights train."""
    return {
        "ranks": {str(i): layer.lora_rank for i, layer in adapted(policy)},
        "trainable": [bool(v.trainable) for v in policy.weights],
    }


def restore_trained_parts(policy: keras.Model, record: dict[str, Any]) -> None:
    """Enable LoRA and freeze as `trained_parts` recorded it."""
    layers = list(policy._flatten_layers())
    for index, rank in record["ranks"].items():
        layers[int(index)].enable_lora(rank)
    for variable, trainable in zip(
        policy.weights, record["trainable"], strict=True
    ):
        variable.trainable = trainable


def policy_config(policy: keras.Model) -> dict[str, Any]:
    """The serialized policy, with what Keras-Hub forgets put back."""
    config = keras.saving.serialize_keras_object(policy)
    backbone: Any = getattr(policy, "backbone", None)
    # Llama's config leaves this out (Keras-Hub 0.32).
    if hasattr(backbone, "tie_word_embeddings"):
        config["config"]["backbone"]["config"]["tie_word_embeddings"] = (
            backbone.tie_word_embeddings
        )
    return config


class StoredState(keras.layers.Layer):
    """Writes what Keras' own walk through a `DPOModel` gets wrong or misses.

    Its attribute name sorts last, so that its values are read after the
    layers'. Holds the adapted layers' arrays and the loss's running means.
    """

    def __init__(self, model: keras.Model) -> None:
        super().__init__(trainable=False)
        # In a closure, out of sight of Keras' tracking.
        self._variables = lambda: _apart(model)
        self.built = True

    def save_own_variables(self, store: Any) -> None:
        for index, variable in enumerate(self._variables()):
            store[str(index)] = variable

    def load_own_variables(self, store: Any) -> None:
        variables = self._variables()
        if len(store.keys()) != len(variables):
            raise UserError(
                f"The file holds {len(store.keys())} LoRA and loss variables, "
                f"the model {len(variables)}. Enable LoRA with the same rank "
                "on the same layers, and compile with the same loss, before "
                "loading."
            )
        for index, variable in enumerate(variables):
            variable.assign(store[str(index)])


def _apart(model: keras.Model) -> list[keras.Variable]:
    layers = [layer for _, layer in adapted(model.policy)]
    arrays = [
        variable
        for layer in layers
        for variable in (
            layer._embeddings
            if isinstance(layer, keras.layers.Embedding)
            else layer._kernel,
            *_adapters(layer),
        )
    ]
    return [*arrays, *model.preference_loss.variables]


def _adapters(layer: keras.layers.Layer) -> list[keras.Variable]:
    names = ("kernel", "embeddings")
    found = [
        getattr(layer, f"lora_{name}_{side}", None)
        for name in names
        for side in "ab"
    ]
    return [variable for variable in found if variable is not None]
