"""Serialization of a `DPOModel` beyond its variables."""

import copy
from typing import Any

import jax.numpy as jnp
import keras

from keras_dpo.data.preprocessor import DPOPreprocessor
from keras_dpo.errors import UserError
from keras_dpo.policies import lora
from keras_dpo.references.base import replace_reference
from keras_dpo.references.initial_weights import InitialWeights
from keras_dpo.scoring.execution import Execution


def config_of(model: Any) -> dict[str, Any]:
    """The configuration from which `model_from_config` rebuilds a model."""
    config: dict[str, Any] = {
        "name": model.name,
        "policy": lora.policy_config(model.policy),
        "trained_parts": lora.trained_parts(model.policy),
        "reference": model.reference_choice,
        "disable_dropout": model.disable_dropout,
        "precompute_reference": model.precompute_reference,
        "reference_cache": model.reference_cache,
        "snapshot_dtype": model.snapshot_dtype,
        "keeps_snapshot": _keeps_snapshot(model),
        "execution": model._execution_choice.get_config(),
    }
    if model.reference_choice == "model":
        config["reference_model"] = lora.policy_config(model.reference.model)
    if isinstance(model.preprocessor, DPOPreprocessor):
        model.preprocessor.check_can_be_saved(model.policy)
        config["preprocessor"] = model.preprocessor.get_config()
    return config


def model_from_config(cls: Any, config: dict[str, Any]) -> Any:
    """Build a `DPOModel` from its configuration, without its weights."""
    # Keras modifies the policy's config in place while reading it.
    config = copy.deepcopy(config)
    policy = keras.saving.deserialize_keras_object(config.pop("policy"))
    lora.restore_trained_parts(policy, config.pop("trained_parts"))
    reference_model = config.pop("reference_model", None)
    if reference_model is not None:
        config["reference"] = keras.saving.deserialize_keras_object(
            reference_model
        )
    config["execution"] = Execution(**config["execution"])
    preprocessor = config.pop("preprocessor", None)
    if preprocessor is not None:
        preprocessor = DPOPreprocessor.from_config(preprocessor, policy)
    keeps_snapshot = config.pop("keeps_snapshot")
    model = cls(policy, preprocessor=preprocessor, **config)
    if keeps_snapshot:
        # Its values are loaded later, with the weights.
        replace_reference(model, model._make_snapshot())
    return model


def reference_origin(model: Any) -> dict[str, Any]:
    """Provenance of the reference, saved with the weights."""
    return {
        "has_trained": model.has_trained,
        "has_snapshot": _keeps_snapshot(model),
        "content": model._reference_content,
        "was_dropped": model._reference_was_dropped,
    }


def restore_reference_origin(model: Any, origin: dict[str, Any]) -> None:
    """Restore the `reference_origin` of the weights just loaded.

    Raises:
        UserError: The weights include a snapshot that this model has no place
            for, or lack one that it needs.
    """
    has_snapshot = _keeps_snapshot(model)
    if origin["has_snapshot"] and not has_snapshot:
        raise UserError(
            "The file holds a snapshot of the initial weights, and the "
            "model has no place for it yet. Compile the model, with a loss "
            "that needs a reference, before load_weights."
        )
    model._reference_content = origin["content"]
    model._reference_was_dropped = origin["was_dropped"]
    model._initial = None
    if not origin["has_trained"]:
        model._initial = InitialWeights(model.policy)
    if not has_snapshot:
        # A snapshot kept for a later loss is of other weights.
        model._snapshot = None
    if has_snapshot and not origin["has_snapshot"]:
        # Raises if the initial weights are not those of the file.
        values = model._initial_values()
        for variable, value in zip(
            model.reference.snapshot, values, strict=True
        ):
            variable.assign(jnp.array(value, variable.dtype, copy=True))


def _keeps_snapshot(model: Any) -> bool:
    """Whether the model has a snapshot; uncompiled it has no reference yet."""
    return model.reference is not None and model.reference.keeps_snapshot
