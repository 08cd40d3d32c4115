"""`DPOModel`: fit, evaluate and predict around one pure loss function."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from keras_dpo import lora, losses
from keras_dpo.checks import (
    FirstBatchCheck,
    check_policy,
    check_trainable_variables,
    report_start,
    steps_done,
)
from keras_dpo.data.dataset import PreferenceDataset, make_dataset
from keras_dpo.log_probs import (
    Array,
    Batch,
    can_split_head,
    completion_mask,
    completion_statistics,
)
from keras_dpo.losses import LossLike, PairLogProbs, PreferenceLoss
from keras_dpo.metrics import OPTIONAL_METRICS, make_metrics, pair_statistics
from keras_dpo.preprocessor import DPOPreprocessor
from keras_dpo.reference import (
    ModelReference,
    NoReference,
    PrecomputedReference,
    Reference,
    SnapshotReference,
)


@keras.saving.register_keras_serializable(package="keras_dpo")
class DPOModel(keras.Model):
    """Trains a policy on preference pairs against a frozen reference.

    Args:
        policy: A `keras_hub.models.CausalLM`, or a Keras model from
            `{"token_ids", "padding_mask"}` to logits `(rows, length,
            vocabulary)`. It stays an ordinary model throughout.
        reference: `"initial"`, a snapshot of the policy's trainable variables
            as they are now; another Keras model; `"precomputed"`, log-probs
            from the data or computed once before training; or `None`.
        preprocessor: A `DPOPreprocessor`; `"auto"` makes one from the
            policy's own tokenizer, if it has one.
        disable_dropout: Whether dropout is off in the policy while it trains.
            The reference never has dropout.
        split_head: `"auto"` computes logits of completion tokens alone where
            the family is proven; False takes them from the whole output.

    Raises:
        ValueError: The policy has nothing to train, or the reference shares
            its variables or has another vocabulary.

    Example:

    ```python
    model = keras_dpo.DPOModel(policy)
    model.compile(optimizer=keras.optimizers.AdamW(1e-6), loss="sigmoid")
    model.fit(train, validation_data=valid, epochs=3)
    ```

    Reference: [Rafailov et al., 2023](https://arxiv.org/abs/2305.18290).
    """

    def __init__(
        self,
        policy: keras.Model,
        reference: keras.Model | str | None = "initial",
        preprocessor: DPOPreprocessor | str | None = "auto",
        disable_dropout: bool = True,
        split_head: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        check_policy(policy, reference)
        # The policy's dtype policy: loss scaling follows it.
        kwargs.setdefault("dtype", policy.dtype_policy)
        super().__init__(**kwargs)
        _mark_preprocessor_built(policy)
        self.policy = policy
        self.reference_choice = (
            reference if isinstance(reference, str | None) else "model"
        )
        self.disable_dropout = disable_dropout
        self.split_head_choice = split_head
        if split_head is True and not can_split_head(policy):
            raise ValueError(
                "split_head=True needs a family whose head is proven to split. "
                f"Received: {type(policy).__name__}. Use split_head='auto'."
            )
        self.split_head = can_split_head(policy) and split_head is not False
        # JAX arrays never change, so keeping them is a snapshot that costs
        # nothing until training replaces them.
        self._initial_values = [v.value for v in policy.trainable_variables]
        self._wrapped_variables = [v.path for v in policy.trainable_variables]
        self.reference: Any = None
        if isinstance(reference, keras.Model):
            self.reference = ModelReference(policy, reference)
        if preprocessor == "auto":
            preprocessor = DPOPreprocessor.from_policy(policy)
        self.preprocessor: Any = preprocessor
        self.preference_loss: PreferenceLoss = losses.Sigmoid()
        self.gradient_accumulation_steps = 1
        self._pair_metrics: list[keras.metrics.Mean] = []
        self._optional_metrics: list[str] = []
        self._fitting = False
        # Sorts after `policy` and `reference`: loaded last (see the class).
        self.stored_state = lora.StoredState(self)
        self.built = True

    # --- What Keras sees of the variables -------------------------------

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        """The policy's; a reference can never become trainable."""
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
        return self.policy(inputs, training=training)

    # --- compile --------------------------------------------------------

    def compile(
        self,
        optimizer: Any = "adamw",
        loss: LossLike = "sigmoid",
        metrics: Collection[str] | None = None,
        gradient_accumulation_steps: int = 1,
        **kwargs: Any,
    ) -> None:
        """Choose the optimizer, the loss and what to report.

        Args:
            optimizer: A Keras optimizer or its name.
            loss: A name, a `PreferenceLoss`, a function of (policy,
                reference), or a mapping of these to weights.
            metrics: Names of metrics beyond the usual ones: chosen_logit,
                rejected_logit, entropy, token_accuracy, kl, chosen_length,
                rejected_length.
            gradient_accumulation_steps: Micro-batches that one step goes
                through, one after the other; memory follows the micro-batch.
                One step is one update of weights, schedule and averages.
            **kwargs: `run_eagerly`, `jit_compile`, `steps_per_execution`,
                `auto_scale_loss` of `keras.Model.compile`.

        Raises:
            ValueError: A trainable variable has 16 bits, an option does
                nothing, or the loss needs what the reference cannot give.
        """
        for name in ("loss_weights", "weighted_metrics"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"`{name}` has no effect here. Received: "
                    f"{name}={kwargs[name]!r}. Pass loss={{loss: weight}} to "
                    "mix losses, and the names of metrics as `metrics`."
                )
        if gradient_accumulation_steps < 1:
            raise ValueError(
                "`gradient_accumulation_steps` must be at least 1. Received: "
                f"{gradient_accumulation_steps!r}."
            )
        check_trainable_variables(self.policy, self._wrapped_variables)
        self.preference_loss = losses.get(loss)
        self._optional_metrics = list(metrics or [])
        self._pair_metrics = make_metrics(self._optional_metrics)
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self._build_reference()
        super().compile(optimizer=optimizer, loss=None, **kwargs)
        self.optimizer.build(self.trainable_variables)
        self._compile_arguments = {
            "metrics": self._optional_metrics,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "run_eagerly": self.run_eagerly,
            "steps_per_execution": self.steps_per_execution,
            "jit_compile": self.jit_compile,
        }

    def get_compile_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        return {
            "optimizer": serialize(self.optimizer),
            "loss": serialize(self.preference_loss),
            **self._compile_arguments,
        }

    def compile_from_config(self, config: dict[str, Any]) -> None:
        config = dict(config)
        for name in ("optimizer", "loss"):
            config[name] = keras.saving.deserialize_keras_object(config[name])
        self.compile(**config)

    def _build_reference(self) -> None:
        """Make the reference that the loss needs, or none."""
        choice, loss = self.reference_choice, self.preference_loss
        if choice == "model":
            return
        if choice is None or not loss.needs_reference:
            self.reference = NoReference()
        elif choice == "precomputed":
            self.reference = PrecomputedReference()
        elif not isinstance(self.reference, SnapshotReference):
            if any(value.is_deleted() for value in self._initial_values):
                raise ValueError(
                    "The policy was trained since DPOModel(policy) was made, "
                    "so its initial weights are gone. Make a new DPOModel."
                )
            self.reference = SnapshotReference(
                self.policy, self._initial_values, self.split_head
            )
        if choice == "initial" and not isinstance(self.reference, NoReference):
            self._initial_values = []

    def _ensure_reference(self) -> Reference:
        if self.reference is None:
            self._build_reference()
        return self.reference

    # --- The pure core ----------------------------------------------------

    @property
    def _wanted(self) -> set[str]:
        """Fields of TokenStatistics that the loss or a metric reads."""
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
        """Policy and reference on a batch, as a pure function.

        Returns:
            The policy's and the reference's `PairLogProbs`, the policy's
            `TokenStatistics`, and new values of the non-trainable variables.
        """
        variables = self.non_trainable_variables
        values = [
            *zip(self.trainable_variables, trainable, strict=True),
            *zip(variables, non_trainable, strict=True),
        ]
        with keras.StatelessScope(state_mapping=values) as scope:
            statistics = completion_statistics(
                self.policy,
                batch,
                training=training and not self.disable_dropout,
                wanted=wanted,
                split_head=self.split_head,
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

        Inside `fit` it reads the step's own state and copies nothing else.
        """
        state = getattr(self, "_jax_state", None)
        values = (state or {}).get("metrics_variables")
        if values is None:
            values = [v.value for v in self.metrics_variables]
        numbers = iter(np.asarray(jax.device_get(values)).tolist())
        return {m.name: (next(numbers), next(numbers)) for m in self.metrics}

    # --- The steps that Keras calls -----------------------------------------

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
        if not isinstance(self.reference, NoReference):
            outputs["reference_chosen_log_prob"] = reference.chosen
            outputs["reference_rejected_log_prob"] = reference.rejected
        return outputs, non_trainable

    def _purge_model_variables(self, **kwargs: Any) -> None:
        # Keras 3.15 empties the variables before a step to save memory that
        # donation saves anyway; a first batch that fails would lose them.
        del kwargs

    # --- fit, evaluate, predict -------------------------------------------

    def fit(
        self,
        x: Any,
        *,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: int | str = "auto",
        callbacks: Any = None,
        validation_data: Any = None,
        shuffle: bool = True,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: Any = 1,
    ) -> keras.callbacks.History:
        """Train on preference pairs.

        Args:
            x: A list of records, a path, a `datasets.Dataset`, a `tf.data` or
                grain dataset, or a `PreferenceDataset`.
            batch_size: Pairs per step; 16 unless the dataset says otherwise.
            epochs: Passes through the data.
            verbose: As in `keras.Model.fit`.
            callbacks: Keras callbacks.
            validation_data: Like `x`.
            shuffle: Whether the order changes from epoch to epoch.
            initial_epoch: Where to begin counting epochs; it also chooses
                the order.
            steps_per_epoch: Steps of an epoch; it walks on through the data.
            validation_steps: Batches of `validation_data` to use.
            validation_batch_size: Pairs per validation batch.
            validation_freq: Epochs between validations.

        Raises:
            ValueError: The data, or the first batch's self-check, is wrong.
        """
        self._assert_compile_called("fit")
        check_trainable_variables(self.policy, self._wrapped_variables)
        train = make_dataset(
            x, self.preprocessor, batch_size, shuffle, steps_per_epoch
        )
        valid = None
        if validation_data is not None:
            valid = make_dataset(
                validation_data,
                self.preprocessor,
                validation_batch_size or batch_size or train.batch_size,
                False,
                validation_steps,
            )
        datasets = [train] if valid is None else [train, valid]
        self._prepare(datasets, self.gradient_accumulation_steps)
        if verbose:
            report_start(self)
        own = [_EpochOfDataset(train)]
        if self._at_step_zero():
            FirstBatchCheck(self).run(train[0])
        self._fitting = True
        try:
            return super().fit(
                train,
                epochs=epochs,
                verbose=verbose,
                callbacks=_add_callbacks(callbacks, own),
                validation_data=valid,
                shuffle=False,
                initial_epoch=initial_epoch,
                validation_freq=validation_freq,
            )
        finally:
            self._fitting = False

    def evaluate(
        self,
        x: Any,
        *,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        steps: int | None = None,
        callbacks: Any = None,
        return_dict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The loss and the metrics on preference pairs; see `fit` for `x`."""
        self._assert_compile_called("evaluate")
        if "_use_cached_eval_dataset" not in kwargs:
            x = make_dataset(x, self.preprocessor, batch_size, False, steps)
            self._prepare([x])
        kwargs.pop("y", None)
        kwargs.pop("sample_weight", None)
        # Inside `fit` the running training metrics would be lost. Copies: the
        # step donates the originals.
        saved = [jnp.copy(v.value) for v in self.metrics_variables]
        results = super().evaluate(
            x,
            verbose=verbose,
            callbacks=callbacks,
            return_dict=return_dict,
            **kwargs,
        )
        if self._fitting:
            for variable, value in zip(
                self.metrics_variables, saved, strict=True
            ):
                variable.assign(value)
        return results

    def predict(
        self,
        x: Any,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> dict[str, np.ndarray]:
        """Log-probs and rewards of every pair, in the order of the input.

        Returns:
            `(pairs,)` arrays under the names chosen_log_prob,
            rejected_log_prob, reference_chosen_log_prob,
            reference_rejected_log_prob, chosen_reward, rejected_reward and
            reward_margin, in nats. A pair that the data report dropped is NaN.
        """
        dataset = make_dataset(x, self.preprocessor, batch_size, False, steps)
        self._prepare([dataset])
        outputs = super().predict(dataset, verbose=verbose, callbacks=callbacks)
        return dataset.in_input_order(outputs)

    def _prepare(
        self, datasets: list[PreferenceDataset], micro_batches: int = 1
    ) -> None:
        """Check that the datasets fit the model, loss and reference."""
        self._ensure_reference()
        for dataset in datasets:
            dataset.check_fits(self, micro_batches)
        if isinstance(self.reference, PrecomputedReference):
            missing = [d for d in datasets if not d.has_reference]
            if missing:
                self._precompute(missing)

    def _precompute(self, datasets: list[PreferenceDataset]) -> None:
        """Fill in reference log-probs with the policy as it still is."""
        if not self._at_step_zero():
            raise ValueError(
                'reference="precomputed" needs reference_chosen_log_prob and '
                "reference_rejected_log_prob in the data, or a policy that has "
                f"not been trained. Received: {steps_done(self.optimizer)}"
                " steps of training. Fill in the log-probs before `fit`, with "
                "a PreferenceDataset made beforehand."
            )
        trainable = [v.value for v in self.trainable_variables]
        non_trainable = [v.value for v in self.non_trainable_variables]

        def run(batch: dict[str, Any]) -> Array:
            placeholder = jnp.zeros(batch["completion_ids"].shape, "float32")
            batch = {**batch, "reference_log_probs": placeholder}
            policy, *_ = self._forward(trainable, non_trainable, batch, False)
            return policy.log_probs * policy.mask

        run = jax.jit(run)
        for dataset in datasets:
            dataset.fill_reference(lambda batch: np.asarray(run(batch)))

    def _at_step_zero(self) -> bool:
        if getattr(self, "optimizer", None) is None:
            return True
        return steps_done(self.optimizer) == 0

    # --- Saving -----------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "name": self.name,
            "policy": lora.policy_config(self.policy),
            "trained_parts": lora.trained_parts(self.policy),
            "reference": self.reference_choice,
            "disable_dropout": self.disable_dropout,
            "split_head": self.split_head_choice,
        }
        if self.reference_choice == "model":
            config["reference_model"] = lora.policy_config(self.reference.model)
        if isinstance(self.preprocessor, DPOPreprocessor):
            config["preprocessor"] = self.preprocessor.get_config()
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "DPOModel":
        config = dict(config)
        policy = keras.saving.deserialize_keras_object(config.pop("policy"))
        lora.restore_trained_parts(policy, config.pop("trained_parts"))
        reference_model = config.pop("reference_model", None)
        if reference_model is not None:
            config["reference"] = keras.saving.deserialize_keras_object(
                reference_model
            )
        preprocessor = config.pop("preprocessor", None)
        if preprocessor is not None:
            preprocessor = DPOPreprocessor.from_config(preprocessor, policy)
        return cls(policy, preprocessor=preprocessor, **config)

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """Print the policy, the reference and what is trained."""
        self.policy.summary(*args, **kwargs)
        report_start(self, kwargs.get("print_fn", print))


class _EpochOfDataset(keras.callbacks.Callback):
    """Tells the dataset which epoch runs; Keras' own signal miscounts."""

    async_safe = True

    def __init__(self, dataset: PreferenceDataset) -> None:
        super().__init__()
        self.dataset = dataset

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.dataset.epoch = epoch


def _mark_preprocessor_built(policy: keras.Model) -> None:
    """Keras would run a model with an unbuilt layer once, on a batch."""
    preprocessor = getattr(policy, "preprocessor", None)
    if preprocessor is None:
        return
    if not preprocessor.built:
        preprocessor.build(None)
    for layer in preprocessor._flatten_layers(include_self=False):
        if not layer.built:
            layer.build(None)


def _add_callbacks(callbacks: Any, own: list[keras.callbacks.Callback]) -> Any:
    if isinstance(callbacks, keras.callbacks.CallbackList):
        for callback in own:
            callbacks.append(callback)
        return callbacks
    if callbacks is None:
        callbacks = []
    elif isinstance(callbacks, keras.callbacks.Callback):
        callbacks = [callbacks]
    return [*own, *callbacks]


def _as_batch(data: Any) -> Batch:
    return data[0] if isinstance(data, tuple | list) else data


def _micro_batches(batch: Batch, steps: int) -> Batch:
    """`(pairs, ...)` -> `(steps, pairs / steps, ...)`.

    Strided, so that a device's share of the pairs stays on the device and the
    rows that fill up a short batch stay last.
    """

    def split(array: Array) -> Array:
        rows = array.reshape(array.shape[0] // steps, steps, *array.shape[1:])
        return jnp.swapaxes(rows, 0, 1)

    return jax.tree.map(split, batch)
