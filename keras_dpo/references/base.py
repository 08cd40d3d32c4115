"""`Reference`: the interface of all sources of reference log-probs."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import keras

from keras_dpo.errors import UserError
from keras_dpo.losses import PairLogProbs
from keras_dpo.scoring.log_probs import (
    Array,
    Batch,
    completion_mask,
)

VariableValues = list[tuple[keras.Variable, Array]]


class Reference(keras.layers.Layer):
    """Base class of frozen sources of log-probabilities.

    A Keras layer, so that its variables are saved, sharded and donated with
    the model's non-trainable state.
    """

    # Whether a sync has changed it since creation.
    synced = False
    # Whether it provides log-probs to compare the policy with.
    compares = True
    # Whether it computes its log-probs in every step.
    runs_online = False
    # Whether its log-probs come with the batch.
    is_stored = False
    # Whether it stores values of the policy's trainable variables.
    keeps_snapshot = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(trainable=False, **kwargs)
        self.built = True

    def token_log_probs(self, values: VariableValues, batch: Batch) -> Array:
        """Log-probs of the completion tokens, `(pairs, 2, tokens)`, nats.

        Args:
            values: All variables of the model with their current values.
            batch: See `log_probs.completion_statistics`.
        """
        raise NotImplementedError

    def pair_log_probs(
        self, values: VariableValues, batch: Batch
    ) -> PairLogProbs:
        """`token_log_probs` with the mask, excluded from the gradient."""
        log_probs = self.token_log_probs(values, batch)
        return jax.lax.stop_gradient(
            PairLogProbs(log_probs, completion_mask(batch))
        )

    @property
    def models(self) -> list[keras.Model]:
        """The models it runs, other than the policy."""
        return []

    @property
    def begins_equal(self) -> bool:
        """Whether it equals the policy exactly until the first step."""
        return False

    @contextlib.contextmanager
    def as_model(self) -> Iterator[keras.Model | None]:
        """Context that yields a model equivalent to the reference.

        This may be the policy with swapped values, which are restored on exit.
        Yields None if no reference is kept.
        """
        yield None

    def variable_pairs(self) -> list[tuple[keras.Variable, keras.Variable]]:
        """(reference variable, policy variable) pairs that a sync mixes."""
        raise UserError(f"{self.describe()} cannot be synced.")

    def describe(self) -> str:
        """One-line description for the start-up message."""
        raise NotImplementedError


class Untracked:
    """Hides a layer from Keras' attribute tracking."""

    def __init__(self, value: Any) -> None:
        self.value = value


def replace_reference(model: Any, reference: Reference) -> None:
    """Replace a `DPOModel`'s reference, and untrack the previous one.

    Keras 3.15 keeps tracking a layer whose attribute is replaced or deleted,
    and keeps a list of all layers from when the model was compiled.
    """
    before = model.reference
    if before is reference:
        return
    if before is not None:
        dropped = {id(layer) for layer in before._flatten_layers()}
        model._tracker.untrack(before)
        state: Any = model.__dict__.get("_compiled_trainable_state", {})
        model._compiled_trainable_state = {
            layer: trainable
            for layer, trainable in state.items()
            if id(layer) not in dropped
        }
    model.reference = reference
    model._pair_log_probs_function = None


def vocabulary_size(model: keras.Model) -> int | None:
    """Vocabulary size of the model in tokens; None if unknown."""
    backbone = getattr(model, "backbone", None)
    size = getattr(backbone, "vocabulary_size", None)
    if size is None:
        shape = getattr(model, "output_shape", None)
        size = shape[-1] if isinstance(shape, tuple) else None
    return size
