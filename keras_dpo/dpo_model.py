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
from keras_dpo.log_probs import Array, can_split_head
from keras_dpo.losses import LossLike
from keras_dpo.metrics import make_metrics
from keras_dpo.preprocessor import DPOPreprocessor
from keras_dpo.reference import (
    ModelReference,
    NoReference,
    PrecomputedReference,
    Reference,
    SnapshotReference,
)
from keras_dpo.steps import PreferenceSteps


@keras.saving.register_keras_serializable(package="keras_dpo")
class DPOModel(PreferenceSteps):
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
        self.reference = None
        if isinstance(reference, keras.Model):
            self.reference = ModelReference(policy, reference)
        if preprocessor == "auto":
            preprocessor = DPOPreprocessor.from_policy(policy)
        self.preprocessor: Any = preprocessor
        self.preference_loss = losses.Sigmoid()
        self.gradient_accumulation_steps = 1
        self._pair_metrics = []
        self._optional_metrics = []
        self._fitting = False
        # Sorts after `policy` and `reference`: loaded last (see the class).
        self.stored_state = lora.StoredState(self)
        self.built = True

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
            size = validation_batch_size
            if not isinstance(validation_data, PreferenceDataset):
                size = size or batch_size or train.batch_size
            valid = make_dataset(
                validation_data,
                self.preprocessor,
                size,
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
