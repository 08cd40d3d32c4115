"""The four kinds of reference, and selecting the one a loss needs."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import keras

from keras_dpo.errors import UserError
from keras_dpo.losses import PreferenceLoss
from keras_dpo.references.base import (
    Reference,
    Untracked,
    VariableValues,
    vocabulary_size,
)
from keras_dpo.scoring.execution import Execution, can_split_head
from keras_dpo.scoring.log_probs import (
    Array,
    Batch,
    completion_statistics,
)


class SnapshotReference(Reference):
    """A snapshot of the policy's trainable variables, run in its layers.

    Exact for full fine-tuning, and for LoRA at the cost of the adapters
    alone, since frozen weights are shared.
    """

    runs_online = True
    keeps_snapshot = True

    def __init__(
        self,
        policy: keras.Model,
        initial_values: list[Array],
        execution: Execution,
        snapshot_dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._policy = Untracked(policy)
        self.execution = execution.without_remat()
        self.snapshot = [
            _snapshot(variable, value, snapshot_dtype or variable.dtype)
            for variable, value in zip(
                policy.trainable_variables, initial_values, strict=True
            )
        ]

    def load_own_variables(self, store: Any) -> None:
        # Skip a file without a snapshot, which
        # `DPOModel.restore_reference_origin` handles.
        if store.keys():
            super().load_own_variables(store)

    def token_log_probs(self, values: VariableValues, batch: Batch) -> Array:
        current = {id(variable): value for variable, value in values}
        swapped = [
            (variable, current.get(id(own), own).astype(variable.dtype))
            for own, variable in self.variable_pairs()
        ]
        with keras.StatelessScope(state_mapping=[*values, *swapped]):
            return completion_statistics(
                self._policy.value, batch, self.execution
            ).log_probs

    def variable_pairs(self) -> list[tuple[keras.Variable, keras.Variable]]:
        policy_variables = self._policy.value.trainable_variables
        return list(zip(self.snapshot, policy_variables, strict=True))

    def describe(self) -> str:
        size = sum(v.value.nbytes for v in self.snapshot)
        return (
            f"a snapshot of the policy's {len(self.snapshot)} trainable "
            f"variables ({size / 2**20:.1f} MiB, {self.snapshot[0].dtype})"
        )

    @property
    def begins_equal(self) -> bool:
        return all(
            own.dtype == variable.dtype
            for own, variable in self.variable_pairs()
        )

    @contextlib.contextmanager
    def as_model(self) -> Iterator[keras.Model | None]:
        pairs = self.variable_pairs()
        values = [variable.value for _, variable in pairs]
        try:
            for own, variable in pairs:
                variable.assign(own.value)
            yield self._policy.value
        finally:
            for value, (_, variable) in zip(values, pairs, strict=True):
                variable.assign(value)


def _snapshot(
    variable: keras.Variable, value: Any, dtype: str
) -> keras.Variable:
    start: Any = "zeros"  # For an outline, which has no values.
    if not isinstance(value, jax.ShapeDtypeStruct):
        # Copied, because an alias would be donated twice.
        start = jnp.array(value, dtype, copy=True)
    return keras.Variable(
        start,
        shape=value.shape,
        dtype=dtype,
        trainable=False,
        # The policy variable's layout, so that a mesh shards both alike.
        layout=variable._layout,
        name=f"reference_{variable.name}",
    )


class ModelReference(Reference):
    """Another, frozen Keras model as the reference."""

    runs_online = True

    def __init__(
        self, policy: keras.Model, model: keras.Model, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._policy = Untracked(policy)
        shared = {id(v) for v in policy.variables} & {
            id(v) for v in model.variables
        }
        if shared:
            raise UserError(
                "The reference must not share variables with the policy: "
                f"training would move it. Received: {len(shared)} shared "
                'variables. Use reference="initial" for the policy as it is '
                "now."
            )
        sizes = [vocabulary_size(policy), vocabulary_size(model)]
        if None not in sizes and sizes[0] != sizes[1]:
            raise UserError(
                "Policy and reference must have the same vocabulary. "
                f"Received: {sizes[0]} tokens in the policy, {sizes[1]} in "
                "the reference. Use a reference with the policy's tokenizer."
            )
        self.model = model
        self.execution = Execution(split_head=can_split_head(model))
        held = {id(v.value) for v in policy.variables}
        for variable in model.variables:
            if id(variable.value) in held:
                # One array cannot be donated to a step twice.
                variable.assign(jnp.array(variable.value, copy=True))

    def token_log_probs(self, values: VariableValues, batch: Batch) -> Array:
        with keras.StatelessScope(state_mapping=values):
            return completion_statistics(
                self.model, batch, self.execution
            ).log_probs

    def variable_pairs(self) -> list[tuple[keras.Variable, keras.Variable]]:
        theirs = self.model.weights
        ours = self._policy.value.weights
        if [tuple(v.shape) for v in theirs] != [tuple(v.shape) for v in ours]:
            raise UserError(
                "A sync needs a reference with the policy's own variables. "
                f"Received: {len(theirs)} variables in the reference, "
                f"{len(ours)} in the policy, of different shapes. Merge LoRA "
                'first, or use reference="initial".'
            )
        return list(zip(theirs, ours, strict=True))

    @property
    def models(self) -> list[keras.Model]:
        return [self.model]

    @contextlib.contextmanager
    def as_model(self) -> Iterator[keras.Model | None]:
        yield self.model

    def describe(self) -> str:
        size = sum(v.value.nbytes for v in self.model.variables)
        return f"the model {self.model.name!r}, frozen ({size / 2**20:.1f} MiB)"


class PrecomputedReference(Reference):
    """Reference log-probs read from the batch; no model is kept."""

    is_stored = True

    def token_log_probs(self, values: VariableValues, batch: Batch) -> Array:
        return batch["reference_log_probs"]

    def variable_pairs(self) -> list[tuple[keras.Variable, keras.Variable]]:
        raise UserError(
            "A precomputed reference cannot be synced: no reference is kept. "
            'Use reference="initial".'
        )

    def describe(self) -> str:
        return "precomputed log-probs; no reference is kept"


class NoReference(Reference):
    """All-zero log-probs, for losses without a reference."""

    compares = False

    def token_log_probs(self, values: VariableValues, batch: Batch) -> Array:
        return jnp.zeros(batch["completion_ids"].shape, "float32")

    def variable_pairs(self) -> list[tuple[keras.Variable, keras.Variable]]:
        raise UserError(
            "There is no reference to sync: training is reference-free."
        )

    def describe(self) -> str:
        return "none"


def make_reference(
    choice: str | None,
    loss: PreferenceLoss,
    make_snapshot: Callable[[], Reference],
) -> Reference:
    """Create the reference that a loss needs, of the chosen kind.

    Args:
        choice: `"initial"`, `"precomputed"` or None.
        loss: The compiled loss.
        make_snapshot: Returns the snapshot; called only if needed.
    """
    if choice is None or not loss.needs_reference:
        return NoReference()
    if choice == "precomputed":
        return PrecomputedReference()
    return make_snapshot()
