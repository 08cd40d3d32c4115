"""Pure training steps: (variables, batch) -> (loss, new variables).

These are the functions called by Keras' JAX trainer, free of data handling,
which `DPOModel` adds.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from keras_dpo.compat.compilation import compiler_options, steps_with_options
from keras_dpo.distribution.processes import (
    distribute_batch,
    to_host,
    whole_on_devices,
)
from keras_dpo.losses import PairLogProbs, PreferenceLoss
from keras_dpo.scoring.execution import Execution
from keras_dpo.scoring.flat_products import transposes_before
from keras_dpo.scoring.log_probs import (
    Array,
    Batch,
    completion_mask,
    completion_statistics,
)
from keras_dpo.training.metrics import OPTIONAL_METRICS, pair_statistics


class PreferenceSteps(keras.Model):
    """Stateless training, test and prediction steps on preference pairs.

    Subclasses set the attributes annotated here.
    """

    policy: keras.Model
    reference: Any
    preference_loss: PreferenceLoss
    disable_dropout: bool
    execution: Execution
    gradient_accumulation_steps: int
    _pair_metrics: list[keras.metrics.Mean]
    _optional_metrics: list[str]
    # Compiled once per loss and reference; reset to None when one changes.
    _pair_log_probs_function: Any

    # --- Variables as Keras sees them -----------------------------------

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        """The policy's variables; a reference can never become trainable."""
        return self.policy.trainable_variables

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        return self.trainable_variables

    @property
    def non_trainable_variables(self) -> list[keras.Variable]:
        trainable = {id(v) for v in self.trainable_variables}
        everything = [*self.variables, *self.preference_loss.variables]
        return [v for v in everything if id(v) not in trainable]

    @property
    def non_trainable_weights(self) -> list[keras.Variable]:
        trainable = {id(v) for v in self.trainable_variables}
        return [v for v in self.weights if id(v) not in trainable]

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        if not self.compiled:
            return []
        return [self._loss_tracker, *self._pair_metrics]

    def call(self, inputs: Any, training: bool = False) -> Any:
        if "completion_ids" in inputs:
            # Keras' predict calls the model on a batch of pairs to build
            # unbuilt layers; a preset's tokenizer is never built.
            return None
        return self.policy(inputs, training=training)

    # --- The pure core ----------------------------------------------------

    @property
    def _wanted(self) -> set[str]:
        """Fields of TokenStatistics that the loss or the metrics read."""
        wanted = {OPTIONAL_METRICS[name] for name in self._optional_metrics}
        if self.preference_loss.needs_squared_probs:
            wanted.add("log_sum_squared_probs")
        return {name for name in wanted if name is not None}

    def _forward(
        self,
        trainable: list[Array],
        non_trainable: list[Array],
        batch: Batch,
        training: bool,
        wanted: Collection[str] = (),
    ) -> tuple[PairLogProbs, PairLogProbs, Any, list[Array]]:
        """Score a batch with policy and reference, as a pure function.

        Returns:
            The policy's and the reference's `PairLogProbs`, the policy's
            `TokenStatistics`, and the updated non-trainable variables.
        """
        variables = self.non_trainable_variables
        values = [
            *zip(self.trainable_variables, trainable, strict=True),
            *zip(variables, non_trainable, strict=True),
        ]
        execution = self.execution
        if not training:
            execution = execution.without_remat()
        with keras.StatelessScope(state_mapping=values) as scope:
            statistics = completion_statistics(
                self.policy,
                batch,
                execution,
                training=training and not self.disable_dropout,
                wanted=wanted,
            )
        policy = PairLogProbs(
            statistics.log_probs,
            completion_mask(batch),
            statistics.log_sum_squared_probs,
            batch["margin"],
        )
        reference = self.reference.pair_log_probs(values, batch)
        updated = []
        for variable, value in zip(variables, non_trainable, strict=True):
            new = scope.get_current_value(variable)
            updated.append(value if new is None else new)
        return policy, reference, statistics, updated

    def pair_log_probs_of(
        self, batch: Batch
    ) -> tuple[PairLogProbs, PairLogProbs]:
        """Score a batch outside the steps of `fit`; results are on the host.

        Uses the current values of the variables, without dropout.
        """
        if self._pair_log_probs_function is None:

            def pair_log_probs(
                trainable: list[Array], frozen: list[Array], batch: Batch
            ) -> tuple[PairLogProbs, PairLogProbs]:
                policy, reference, _, _ = self._forward(
                    trainable, frozen, batch, False, self._wanted
                )
                return policy, reference

            self._pair_log_probs_function = jax.jit(
                pair_log_probs, compiler_options=self.compiler_options
            )
        found = self._pair_log_probs_function(
            [v.value for v in self.trainable_variables],
            [v.value for v in self.non_trainable_variables],
            distribute_batch(batch),
        )
        return jax.tree.map(to_host, found)

    def _loss_and_updates(
        self,
        trainable: list[Array],
        non_trainable: list[Array],
        metrics: list[Array],
        batch: Batch,
        total_weight: Array,
        training: bool,
        optimizer_variables: list[Array] | None = None,
    ) -> tuple[Array, tuple[list[Array], list[Array]]]:
        """This batch's share of the weighted mean loss, differentiable.

        `total_weight` is the sum of the pairs' weights over all
        micro-batches.
        """
        policy, reference, statistics, non_trainable = self._forward(
            trainable, non_trainable, batch, training, self._wanted
        )
        variables = self.non_trainable_variables
        with keras.StatelessScope(
            state_mapping=list(zip(variables, non_trainable, strict=True))
        ) as scope:
            per_pair = self.preference_loss.per_pair(policy, reference)
            rewards = self.preference_loss.rewards(policy, reference)
            if training:
                self.preference_loss.update_state(policy, reference)
        non_trainable = [scope.get_current_value(v) for v in variables]
        weight = batch["weight"]
        loss = jnp.sum(per_pair * weight) / total_weight
        report = pair_statistics(policy, reference, rewards, statistics, weight)
        metrics = self._update_metrics(
            metrics, {"loss": (per_pair, weight), **report}
        )
        if optimizer_variables is not None:
            mapping = zip(
                self.optimizer.variables, optimizer_variables, strict=True
            )
            with keras.StatelessScope(state_mapping=list(mapping)):
                loss = self.optimizer.scale_loss(loss)
        return loss, (non_trainable, metrics)

    def _update_metrics(
        self, values: list[Array], report: dict[str, tuple[Array, Array]]
    ) -> list[Array]:
        variables = self.metrics_variables
        report = jax.lax.stop_gradient(report)
        with keras.StatelessScope(
            state_mapping=list(zip(variables, values, strict=True))
        ) as scope:
            for metric in self.metrics:
                value, weight = report[metric.name]
                metric.update_state(value, sample_weight=weight)
        return [scope.get_current_value(v) for v in variables]

    def _logs(self, metrics: list[Array]) -> dict[str, Array]:
        mapping = zip(self.metrics_variables, metrics, strict=True)
        with keras.StatelessScope(state_mapping=list(mapping)):
            return {metric.name: metric.result() for metric in self.metrics}

    def metric_totals(self) -> dict[str, tuple[float, float]]:
        """Name -> (weighted sum, sum of weights) since the epoch began.

        Inside `fit` this reads the live step state and copies nothing else.
        """
        state = getattr(self, "_jax_state", None)
        values = (state or {}).get("metrics_variables")
        if values is None:
            values = [v.value for v in self.metrics_variables]
        numbers = iter(np.asarray(jax.device_get(values)).tolist())
        return {m.name: (next(numbers), next(numbers)) for m in self.metrics}

    # --- Steps called by Keras ----------------------------------------------

    def train_step(self, state: Any, data: Any) -> Any:
        trainable, non_trainable, optimizer_variables, metrics = state
        batch = _as_batch(data)
        total_weight = jnp.maximum(jnp.sum(batch["weight"]), 1e-9)
        differentiate = jax.value_and_grad(self._loss_and_updates, has_aux=True)

        def micro_step(carry: Any, micro_batch: Batch) -> Any:
            gradients, non_trainable, metrics = carry
            (_, (non_trainable, metrics)), new = differentiate(
                trainable,
                non_trainable,
                metrics,
                micro_batch,
                total_weight,
                True,
                optimizer_variables,
            )
            if gradients is not None:
                new = jax.tree.map(jnp.add, gradients, new)
            return (new, non_trainable, metrics), None

        steps = self.gradient_accumulation_steps
        if steps == 1:
            carry, _ = micro_step((None, non_trainable, metrics), batch)
        else:
            zeros = jax.tree.map(jnp.zeros_like, trainable)
            carry, _ = jax.lax.scan(
                micro_step,
                (zeros, non_trainable, metrics),
                _micro_batches(batch, steps),
            )
        gradients, non_trainable, metrics = carry
        trainable, optimizer_variables = self.optimizer.stateless_apply(
            optimizer_variables, gradients, trainable
        )
        state = trainable, non_trainable, optimizer_variables, metrics
        return self._logs(metrics), state

    def test_step(self, state: Any, data: Any) -> Any:
        trainable, non_trainable, metrics = state
        batch = _as_batch(data)
        total_weight = jnp.maximum(jnp.sum(batch["weight"]), 1e-9)
        _, (_, metrics) = self._loss_and_updates(
            trainable, non_trainable, metrics, batch, total_weight, False
        )
        return self._logs(metrics), (trainable, non_trainable, metrics)

    def predict_step(self, state: Any, data: Any) -> Any:
        trainable, non_trainable = state
        policy, reference, _, _ = self._forward(
            trainable, non_trainable, _as_batch(data), False
        )
        rewards = self.preference_loss.rewards(policy, reference)
        outputs = {
            "chosen_log_prob": policy.chosen,
            "rejected_log_prob": policy.rejected,
            "chosen_reward": rewards[:, 0],
            "rejected_reward": rewards[:, 1],
            "reward_margin": rewards[:, 0] - rewards[:, 1],
        }
        if self.reference.compares:
            outputs["reference_chosen_log_prob"] = reference.chosen
            outputs["reference_rejected_log_prob"] = reference.rejected
        return whole_on_devices(outputs), non_trainable

    @property
    def compiler_options(self) -> dict[str, Any]:
        """XLA options with which this model's steps are compiled."""
        narrow = self.execution.in_rows and transposes_before(
            self.policy.backbone.compute_dtype
        )
        return compiler_options("bfloat16" if narrow else "float32")

    def make_train_function(self, force: bool = False) -> None:
        with steps_with_options(self.compiler_options):
            super().make_train_function(force)

    def make_test_function(self, force: bool = False) -> None:
        with steps_with_options(self.compiler_options):
            super().make_test_function(force)

    def make_predict_function(self, force: bool = False) -> Any:
        with steps_with_options(self.compiler_options):
            return super().make_predict_function(force)

    def _purge_model_variables(self, **kwargs: Any) -> None:
        # Keras 3.15 clears the variables before a step to save memory that
        # donation saves anyway; a failing first batch would lose the weights.
        del kwargs

    def _symbolic_build(self, *args: Any, **kwargs: Any) -> None:
        # Keras would call the policy on a batch if a layer without variables
        # is not marked as built (preprocessors, some rotary embeddings);
        # `DPOModel` only accepts built policies.
        del args, kwargs


def _as_batch(data: Any) -> Batch:
    return data[0] if isinstance(data, tuple | list) else data


def _micro_batches(batch: Batch, steps: int) -> Batch:
    """Split `(pairs, ...)` into `(steps, pairs / steps, ...)`.

    The split is strided, so each device keeps its shard of the pairs and rows
    that pad a short batch stay last.
    """

    def split(array: Array) -> Array:
        rows = array.reshape(array.shape[0] // steps, steps, *array.shape[1:])
        return jnp.swapaxes(rows, 0, 1)

    return jax.tree.map(split, batch)
