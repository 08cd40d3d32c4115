"""Hashes of everything a model's log-probs depend on, stable over processes."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import keras
import numpy as np

from keras_dpo.distribution.processes import to_host
from keras_dpo.policies import lora
from keras_dpo.references.store import hash_arrays

# Entries of a Keras config that affect no log-prob. Names are numbered per
# process, and dtypes are hashed separately.
NOT_COMPUTED_WITH = (
    "name",
    "dtype",
    "trainable",
    "preprocessor",
    "dropout",
    "build_config",
    "compile_config",
    "registered_name",
)


def content_of(
    model: keras.Model, trainable_values: Sequence[jax.Array] | None = None
) -> dict[str, str]:
    """Hash everything that log-probs depend on beyond token ids, by name.

    Args:
        model: A policy or a reference.
        trainable_values: Values of its trainable variables, in order, if not
            the current ones.
    """
    values = {
        id(variable): value
        for variable, value in zip(
            model.trainable_variables, trainable_values or [], strict=False
        )
    }
    return {
        "reference weights": _hash_effective_weights(model, values),
        "configuration": _hash_configuration(model),
        "number types": _number_types(model),
    }


def computed_with(model: keras.Model) -> dict[str, Any]:
    """Hashes and settings of the computation, apart from weights, by name."""
    return {
        "configuration": _hash_configuration(model),
        "number types": _number_types(model),
        "LoRA": lora.settings(model),
    }


def _hash_effective_weights(
    model: keras.Model, values: dict[int, jax.Array]
) -> str:
    """Hash the weights, ignoring adapters that have no effect.

    The product of new LoRA adapters is zero whatever their random half holds,
    so a policy with them shares a store with the same policy without.
    """

    def arrays() -> Iterable[Any]:
        for layer in model._flatten_layers():
            idle = _idle_adapters(layer, values)
            for variable in _own_weights(layer):
                if id(variable) not in idle:
                    yield values.get(id(variable), variable.value)
            if getattr(layer, "lora_enabled", False) and not idle:
                scale = layer.lora_alpha / layer.lora_rank
                yield np.asarray(scale, "float32")

    return hash_arrays(arrays())


def _idle_adapters(
    layer: keras.layers.Layer, values: dict[int, jax.Array]
) -> set[int]:
    """Ids of a layer's LoRA adapters if their product is zero, else empty."""
    adapters = lora.adapters(layer)
    if any(not np.any(to_host(values.get(id(v), v.value))) for v in adapters):
        return {id(v) for v in adapters}
    return set()


def _own_weights(layer: keras.layers.Layer) -> list[keras.Variable]:
    """A layer's variables, without its sublayers', sorted by name.

    Enabling LoRA freezes a kernel, which moves it in Keras' own order.
    """
    own = [*layer._trainable_variables, *layer._non_trainable_variables]
    return sorted(own, key=lambda variable: variable.name)


def _hash_configuration(model: keras.Model) -> str:
    try:
        config = _computed_with(_without_names(lora.policy_config(model)))
    except NotImplementedError:
        # A subclass without get_config is identified by its class alone.
        config = f"{type(model).__module__}.{type(model).__qualname__}"
    text = json.dumps(config, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _computed_with(config: Any) -> Any:
    if isinstance(config, dict):
        return {
            key: _computed_with(value)
            for key, value in config.items()
            if key not in NOT_COMPUTED_WITH
        }
    if isinstance(config, list | tuple):
        return [_computed_with(value) for value in config]
    return config


def _without_names(config: Any) -> Any:
    """Rename layers by order, since Keras numbers names per process."""
    names: dict[str, str] = {}

    def find(part: Any) -> None:
        if isinstance(part, dict):
            for layer in part.get("layers", []):
                name = layer.get("name") or layer.get("config", {}).get("name")
                names.setdefault(name, f"layer {len(names)}")
            part = list(part.values())
        if isinstance(part, list | tuple):
            for inner in part:
                find(inner)

    def rename(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: rename(value) for key, value in part.items()}
        if isinstance(part, list | tuple):
            return [rename(value) for value in part]
        return names.get(part, part) if isinstance(part, str) else part

    find(config)
    return rename(config)


def _number_types(model: keras.Model) -> str:
    """The dtypes of all layers that own weights."""
    names = [
        lora.number_type(layer)
        for layer in model._flatten_layers()
        if _own_weights(layer)
    ]
    distinct = list(dict.fromkeys(names))
    if len(distinct) == 1:
        return distinct[0]
    digest = hashlib.blake2b(" ".join(names).encode(), digest_size=4)
    return f"{'+'.join(distinct)} ({digest.hexdigest()})"
