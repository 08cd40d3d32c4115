"""Save and load LoRA policies without Keras merging the adapters.

Keras 3.15 saves a LoRA layer's kernel with the adapters merged in and loads it
with the adapters at zero, so a loaded policy would be compared with the wrong
reference. Here the three arrays are stored separately. `tests/test_saving.py`
tells when upstream does so.
"""

import json
from typing import Any

import keras
import numpy as np

from keras_dpo.errors import UserError


def adapted(policy: keras.Model) -> list[tuple[int, keras.layers.Layer]]:
    """(index, layer) of all layers with LoRA, in Keras' flattened order."""
    return [
        (index, layer)
        for index, layer in enumerate(policy._flatten_layers())
        if getattr(layer, "lora_enabled", False)
    ]


def trained_parts(policy: keras.Model) -> dict[str, Any]:
    """Record LoRA settings, per-layer dtypes and trainable weights.

    These are not in the layers' configs. LoRA settings are rank, alpha and
    whatever else Keras stores in `lora_*` attributes.
    """
    return {
        "lora": settings(policy),
        "number_types": _number_types(policy),
        "trainable": [bool(v.trainable) for v in policy.weights],
    }


def restore_trained_parts(policy: keras.Model, record: dict[str, Any]) -> None:
    """Enable LoRA and freeze as `trained_parts` recorded it.

    Raises:
        UserError: A layer was restored with a different dtype.
    """
    layers = list(policy._flatten_layers())
    for index, saved_settings in record["lora"].items():
        layer = layers[int(index)]
        if not layer.lora_enabled:
            # Keras' own layers restore LoRA; Keras-Hub backbones do not.
            layer.enable_lora(saved_settings["lora_rank"])
        for name, value in saved_settings.items():
            setattr(layer, name, value)
    for variable, trainable in zip(
        policy.weights, record["trainable"], strict=True
    ):
        variable.trainable = trainable
    saved, now = record["number_types"], _number_types(policy)
    changed = [index for index in saved if saved[index] != now.get(index)]
    if changed:
        raise UserError(
            "The saved policy computed with number types that its config does "
            f"not hold. Received: {layers[int(changed[0])].path} in "
            f"{saved[changed[0]]}, loaded in {now.get(changed[0])}. Give the "
            "backbone one dtype, or quantize it after training."
        )


def settings(policy: keras.Model) -> dict[str, dict[str, Any]]:
    """Index -> LoRA settings, such as rank and alpha, of adapted layers."""
    return {str(i): _lora_settings(layer) for i, layer in adapted(policy)}


def _lora_settings(layer: keras.layers.Layer) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(layer).items()
        if name.startswith("lora_") and isinstance(value, bool | int | float)
    }


def _number_types(policy: keras.Model) -> dict[str, str]:
    """Index -> dtypes of the layers that own weights."""
    return {
        str(index): number_type(layer)
        for index, layer in enumerate(policy._flatten_layers())
        if layer._trainable_variables or layer._non_trainable_variables
    }


def number_type(layer: keras.layers.Layer) -> str:
    """A layer's compute dtype, variable dtype and quantization mode."""
    parts = (layer.compute_dtype, layer.variable_dtype, layer.quantization_mode)
    return "/".join(str(part) for part in parts if part)


def policy_config(policy: keras.Model) -> dict[str, Any]:
    """The serialized policy, including settings that Keras-Hub omits."""
    config = keras.saving.serialize_keras_object(policy)
    # Keras-Hub compiles its models for supervised training, and Keras warns
    # that it cannot restore that.
    config.pop("compile_config", None)
    backbone: Any = getattr(policy, "backbone", None)
    # Llama's config leaves this out (Keras-Hub 0.32).
    if hasattr(backbone, "tie_word_embeddings"):
        config["config"]["backbone"]["config"]["tie_word_embeddings"] = (
            backbone.tie_word_embeddings
        )
    return config


class StoredState(keras.layers.Layer):
    """Saves the state that Keras' own traversal of a `DPOModel` mishandles.

    Its attribute name sorts last, so it is loaded after all layers. Stores
    the adapted layers' arrays, the loss's running means and the reference's
    provenance.
    """

    def __init__(self, model: keras.Model) -> None:
        super().__init__(trainable=False)
        # Closures hide the model from Keras' attribute tracking.
        self._variables = lambda: _apart(model)
        self._get_lora = lambda: settings(model.policy)
        self._get_origin = lambda: model.reference_origin()
        self._set_origin = lambda origin: model.restore_reference_origin(origin)
        self._refusal = UserError(
            "The file holds no state of a DPOModel: it is another model's, or "
            "of an earlier version."
        )
        self.built = True

    def save_own_variables(self, store: Any) -> None:
        for index, variable in enumerate(self._variables()):
            store[str(index)] = variable
        state = {"origin": self._get_origin(), "lora": self._get_lora()}
        text = json.dumps(state)
        store["origin"] = np.frombuffer(text.encode(), "uint8")

    def load_own_variables(self, store: Any) -> None:
        if "origin" not in store.keys():
            # After an error in the first location Keras tries a second, empty
            # one; raise the first error again.
            raise self._refusal
        try:
            self._load(store)
        except UserError as error:
            self._refusal = error
            raise

    def _load(self, store: Any) -> None:
        variables = self._variables()
        found = len(store.keys()) - 1
        if found != len(variables):
            raise UserError(
                f"The file holds {found} LoRA and loss variables, "
                f"the model {len(variables)}. Enable LoRA with the same rank "
                "on the same layers, and compile with the same loss, before "
                "loading."
            )
        state = json.loads(np.asarray(store["origin"]).tobytes())
        if state["lora"] != self._get_lora():
            raise UserError(
                "The file's LoRA adapters were trained with other settings. "
                f"Received: {_first(state['lora'])} in the file, "
                f"{_first(self._get_lora())} in the model. Enable LoRA with "
                "the same rank and alpha on the same layers before loading."
            )
        for index, variable in enumerate(variables):
            variable.assign(store[str(index)])
        self._set_origin(state["origin"])


def _first(found: dict[str, dict[str, Any]]) -> Any:
    return next(iter(found.values()), "none")


def _apart(model: keras.Model) -> list[keras.Variable]:
    layers = [layer for _, layer in adapted(model.policy)]
    arrays = [
        variable
        for layer in layers
        for variable in (
            layer._embeddings
            if isinstance(layer, keras.layers.Embedding)
            else layer._kernel,
            *adapters(layer),
        )
    ]
    return [*arrays, *model.preference_loss.variables]


def adapters(layer: keras.layers.Layer) -> list[keras.Variable]:
    """A layer's LoRA variables; an empty list without LoRA."""
    names = ("kernel", "embeddings")
    found = [
        getattr(layer, f"lora_{name}_{side}", None)
        for name in names
        for side in "ab"
    ]
    return [variable for variable in found if variable is not None]
