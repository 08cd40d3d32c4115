"""`DPOModel`: fit, evaluate and predict around one pure loss function."""

import contextlib
import pathlib
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from keras_dpo import losses
from keras_dpo.compat.averages import separate_averages
from keras_dpo.compat.resumable_epochs import resumable_epochs
from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.data.packing import Packing
from keras_dpo.data.preprocessor import DPOPreprocessor
from keras_dpo.data.stream import make_dataset, need_an_end
from keras_dpo.distribution.processes import (
    check_processes_share_a_mesh,
    data_parallel_size,
)
from keras_dpo.errors import UserError
from keras_dpo.losses import LossLike
from keras_dpo.policies import lora
from keras_dpo.references.base import (
    Reference,
    Untracked,
    replace_reference,
)
from keras_dpo.references.initial_weights import (
    INITIAL_WEIGHTS_GONE,
    InitialWeights,
    initial_weights_kept,
)
from keras_dpo.references.kinds import (
    ModelReference,
    SnapshotReference,
    make_reference,
)
from keras_dpo.references.precompute import (
    fill_in_reference,
)
from keras_dpo.scoring.execution import Execution
from keras_dpo.scoring.packed_backbone import layer_settings
from keras_dpo.training import saving
from keras_dpo.training.checks import (
    check_differentiable,
    check_first_batch,
    check_policy,
    check_reference_options,
    check_same_ids,
    check_same_vocabulary,
    check_trainable_variables,
    report_start,
    warn_of_swapped_pairs,
)
from keras_dpo.training.fit_run import FitRun
from keras_dpo.training.memory import (
    MemoryReport,
    memory_report,
)
from keras_dpo.training.metrics import make_metrics
from keras_dpo.training.preparation import (
    in_rows,
    prepare,
    prepare_training,
    view_of,
)
from keras_dpo.training.steps import PreferenceSteps
from keras_dpo.utils.arrays import BLOCK, round_up


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
        preprocessor: A `DPOPreprocessor`; `"auto"` builds one from the
            policy's own tokenizer, if it has one.
        precompute_reference: Whether another model's log-probs are computed
            once before training, cached on disk and reused by later runs. The
            model is then released from memory and cannot be synced.
        reference_cache: Directory of that cache; defaults to
            `~/.cache/keras_dpo/reference`.
        snapshot_dtype: Dtype of the `"initial"` snapshot, such as
            `"bfloat16"` for half the memory; rewards then start near 0 rather
            than at it. Defaults to the policy's own dtype.
        disable_dropout: Whether to disable dropout in the policy during
            training. The reference never uses dropout.
        execution: The fast paths that the policy may use; see `Execution`.

    Raises:
        ValueError: The policy has nothing to train, or the reference shares
            its variables or has a different vocabulary.

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
        precompute_reference: bool = False,
        reference_cache: str | None = None,
        snapshot_dtype: str | None = None,
        disable_dropout: bool = True,
        execution: Execution | None = None,
        **kwargs: Any,
    ) -> None:
        check_policy(policy, reference)
        if isinstance(reference, keras.Model):
            check_same_vocabulary(policy, reference)
        check_reference_options(
            reference, precompute_reference, reference_cache, snapshot_dtype
        )
        if precompute_reference and reference == "initial":
            warnings.warn(
                "precompute_reference=True without a reference model is "
                'deprecated: use reference="precomputed".',
                DeprecationWarning,
                stacklevel=2,
            )
            reference = "precomputed"
        self.precompute_reference = (
            precompute_reference or reference == "precomputed"
        )
        self.reference_cache = reference_cache
        self.snapshot_dtype = snapshot_dtype
        # The policy's dtype policy, because loss scaling depends on it.
        kwargs.setdefault("dtype", policy.dtype_policy)
        super().__init__(**kwargs)
        self.policy = policy
        self.reference_choice = (
            reference if isinstance(reference, str | None) else "model"
        )
        self.disable_dropout = disable_dropout
        self._execution_choice = execution or Execution()
        others = [reference] if isinstance(reference, keras.Model) else []
        # `fit` resolves remat="auto" from the data.
        self.resolved_execution = self._execution_choice.resolve(
            policy, others, disable_dropout
        )
        self.execution = self.resolved_execution
        # None after training has replaced them.
        self._initial: InitialWeights | None = InitialWeights(policy)
        self._wrapped_variables = [v.path for v in policy.trainable_variables]
        self.reference = None
        if isinstance(reference, keras.Model):
            self.reference = ModelReference(policy, reference)
        if preprocessor == "auto":
            preprocessor = DPOPreprocessor.from_policy(policy)
            if isinstance(reference, keras.Model):
                check_same_ids(policy, reference)
        self.preprocessor: Any = preprocessor
        if getattr(preprocessor, "tokenizer", None) is not None:
            # `save_policy` saves it with the policy.
            policy._trained_with = preprocessor
        self._set_up_state()
        # Sorts after `policy` and `reference`, so it loads last (see class).
        self.stored_state = lora.StoredState(self)
        self.built = True

    def _set_up_state(self) -> None:
        """Initialize the state of an uncompiled, untrained model."""
        self.preference_loss = losses.Sigmoid()
        self.gradient_accumulation_steps = 1
        self._pair_metrics = []
        self._optional_metrics = []
        self._pair_log_probs_function = None
        self._fitting = False
        # Survives compiling a reference-free loss in between.
        self._snapshot: Untracked | None = None
        # Content hashes behind the stored log-probs; they outlive the weights
        # that the log-probs were computed from.
        self._reference_content: dict[str, str] | None = None
        self._reference_was_dropped = False
        self._attention_windows: set[int] | None = None

    # --- compile --------------------------------------------------------

    def compile(
        self,
        optimizer: Any = "adamw",
        loss: LossLike = "sigmoid",
        metrics: Collection[str] | None = None,
        gradient_accumulation_steps: int = 1,
        **kwargs: Any,
    ) -> None:
        """Configure the optimizer, the loss and the metrics.

        Args:
            optimizer: A Keras optimizer or its name.
            loss: A name, a `PreferenceLoss`, a function of (policy,
                reference), or a mapping of these to weights.
            metrics: Names of metrics beyond the default ones: chosen_logit,
                rejected_logit, entropy, token_accuracy, kl, chosen_length,
                rejected_length.
            gradient_accumulation_steps: Micro-batches per step, run one after
                the other; memory scales with the micro-batch. One step is one
                update of weights, schedule and averages.
            **kwargs: `run_eagerly`, `jit_compile`, `auto_scale_loss` of
                `keras.Model.compile`.

        Raises:
            ValueError: A trainable variable has 16 bits, an option has no
                effect, or the loss needs a reference that is gone.
        """
        for name in ("loss_weights", "weighted_metrics"):
            if kwargs.get(name) is not None:
                raise UserError(
                    f"`{name}` has no effect here. Received: "
                    f"{name}={kwargs[name]!r}. Pass loss={{loss: weight}} to "
                    "mix losses, and the names of metrics as `metrics`."
                )
        if kwargs.get("steps_per_execution") not in (None, 1):
            raise UserError(
                "`steps_per_execution` must be 1: backups, logs and syncs act "
                "between steps. Received: "
                f"{kwargs['steps_per_execution']!r}. Leave it out; steps do "
                "not wait for the host as it is."
            )
        if gradient_accumulation_steps < 1:
            raise UserError(
                "`gradient_accumulation_steps` must be at least 1. Received: "
                f"{gradient_accumulation_steps!r}."
            )
        check_trainable_variables(self.policy, self._wrapped_variables)
        self.preference_loss = losses.get(loss)
        self._optional_metrics = list(metrics or [])
        self._pair_metrics = make_metrics(self._optional_metrics)
        self._pair_log_probs_function = None
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self._build_reference()
        super().compile(optimizer=optimizer, loss=None, **kwargs)
        self.optimizer.build(self.trainable_variables)
        self._compile_arguments = {
            "metrics": self._optional_metrics,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "run_eagerly": self.run_eagerly,
            "jit_compile": self.jit_compile,
            "auto_scale_loss": kwargs.get("auto_scale_loss", True),
        }

    def get_compile_config(self) -> dict[str, Any] | None:
        if not self.compiled:
            return None
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
        """Build the reference that the loss needs, if any."""
        if self.reference_choice != "model":
            replace_reference(
                self,
                make_reference(
                    self.reference_choice,
                    self.preference_loss,
                    self._make_snapshot,
                ),
            )

    def _make_snapshot(self) -> Reference:
        """The single snapshot of the initial weights, created on first use."""
        if self._snapshot is None:
            snapshot = SnapshotReference(
                self.policy,
                self._initial_values(),
                self.execution,
                self.snapshot_dtype,
            )
            self._snapshot = Untracked(snapshot)
        return self._snapshot.value

    def _initial_values(self) -> list[jax.Array]:
        """Values of the trainable variables before any training."""
        if self._initial is None:
            raise UserError(INITIAL_WEIGHTS_GONE)
        return self._initial.trainable_values()

    @property
    def has_trained(self) -> bool:
        """Whether a training step has moved the policy."""
        return self._initial is None

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
            batch_size: Pairs per step; the dataset's own, else 16.
            epochs: Passes through the data.
            verbose: As in `keras.Model.fit`.
            callbacks: Keras callbacks.
            validation_data: Validation pairs, in any form that `x` takes.
            shuffle: Whether to reshuffle the pairs every epoch.
            initial_epoch: First epoch; it also selects the shuffling order.
            steps_per_epoch: Steps per epoch; the next one continues where it
                stops in the data.
            validation_steps: Batches of `validation_data` to use.
            validation_batch_size: Pairs per validation batch.
            validation_freq: Epochs between validations.

        Raises:
            ValueError: Invalid data, or the first batch fails its self-check.
        """
        self._assert_compile_called("fit")
        check_processes_share_a_mesh()
        check_differentiable(self.policy)
        check_trainable_variables(self.policy, self._wrapped_variables)
        train, valid = self._make_datasets(
            (x, batch_size, shuffle, steps_per_epoch),
            (validation_data, validation_batch_size, validation_steps),
        )
        train, valid = prepare_training(
            self, train, valid, epochs - initial_epoch
        )
        if verbose:
            report_start(self, train, epochs)
        run = FitRun(self, train, epochs, callbacks)
        try:
            restored = run.restore()
            if restored and restored.finished:
                return run.finished_history()
            if restored:
                initial_epoch = restored.place.epoch
            elif not self.has_trained:
                self._check_first_batch(train)
            self._fitting = True
            with (
                resumable_epochs(),
                run.stop,
                initial_weights_kept(self.policy),
            ):
                history = super().fit(
                    train,
                    epochs=epochs,
                    verbose=verbose,
                    callbacks=run.callbacks,
                    validation_data=valid,
                    shuffle=False,
                    initial_epoch=initial_epoch,
                    validation_freq=validation_freq,
                )
            separate_averages(self)
        finally:
            self._fitting = False
            self._forget_initial_weights()
            run.end()
        compares = (
            self.preference_loss.needs_reference and self.reference.compares
        )
        if valid is not None and verbose and compares:
            warn_of_swapped_pairs(history.history, valid.num_pairs)
        return history

    def _make_datasets(
        self,
        training: tuple[Any, int | None, bool, int | None],
        validation: tuple[Any, int | None, int | None],
    ) -> tuple[PreferenceDataset, PreferenceDataset | None]:
        """Build the training and validation datasets of `fit`."""
        x, batch_size, shuffle, steps = training
        train = make_dataset(x, self.preprocessor, batch_size, shuffle, steps)
        y, size, steps = validation
        if y is None:
            return train, None
        if not isinstance(y, PreferenceDataset):
            size = size or batch_size or train.batch_size
        return train, make_dataset(y, self.preprocessor, size, False, steps)

    def _check_first_batch(self, train: PreferenceDataset) -> None:
        """Raise if policy and reference differ before the first step."""
        is_own = self.reference_choice == "precomputed"
        if is_own and not (
            self._reference_was_dropped or train.reference_is_summed
        ):
            # All other references are checked by their log-probs.
            if self._initial is None or not self._initial.are_current:
                raise UserError(INITIAL_WEIGHTS_GONE)
        check_first_batch(self, train.make_batch(train.batch_indices(0)))

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
        """Compute loss and metrics on preference pairs; see `fit` for `x`."""
        self._assert_compile_called("evaluate")
        if "_use_cached_eval_dataset" not in kwargs:
            x = make_dataset(x, self.preprocessor, batch_size, False, steps)
            x = prepare(self, x)
        kwargs.pop("y", None)
        kwargs.pop("sample_weight", None)
        # Validation inside `fit` would reset the running training metrics.
        # Copied because the step donates the originals.
        saved = [jnp.copy(v.value) for v in self.metrics_variables]
        with self._weights_kept():
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
        """Compute log-probs and rewards of every pair, in input order.

        Returns:
            `(pairs,)` arrays named chosen_log_prob, rejected_log_prob,
            reference_chosen_log_prob, reference_rejected_log_prob,
            chosen_reward, rejected_reward and reward_margin, in nats. Pairs
            that the data report lists as dropped are NaN.
        """
        dataset = make_dataset(x, self.preprocessor, batch_size, False, steps)
        need_an_end(dataset, "predict gives a value for every row")
        dataset = prepare(self, dataset)
        with self._weights_kept():
            outputs = super().predict(
                dataset, verbose=verbose, callbacks=callbacks
            )
        return dataset.in_input_order(outputs)

    @contextlib.contextmanager
    def _weights_kept(self) -> Iterator[None]:
        """Keep the weights across a run that donates them unchanged."""
        if self._fitting:
            # `fit` restores its own state.
            yield
            return
        with initial_weights_kept():
            try:
                yield
            finally:
                # After an exception Keras leaves the donated arrays in place.
                self.jax_state_sync()

    def _forget_initial_weights(self) -> None:
        """Drop the initial weights if `fit` has changed the policy."""
        if self._initial is not None and not self._initial.are_current:
            self._initial = None

    def _packing(
        self, dataset: PreferenceDataset, micro_batches: int
    ) -> Packing:
        """The packing that fits the policy's and reference's attention."""
        longest = dataset.longest_sequence
        if self._attention_windows is None:
            self._attention_windows = {
                settings.window
                for model in (self.policy, *self.reference.models)
                for settings in layer_settings(model.backbone)
            }
        fused = self.execution.attention == "fused"
        return Packing(
            micro_batches=micro_batches,
            devices=data_parallel_size(),
            share_prompt=self.execution.prompt_sharing is True,
            pack=self.execution.packing is True,
            windows=tuple(
                sorted(
                    {w if w < longest else 0 for w in self._attention_windows}
                )
            ),
            sequence_length=round_up(longest, BLOCK) if fused else None,
        )

    def memory_report(
        self, x: Any, *, batch_size: int | None = None
    ) -> MemoryReport:
        """Report memory by category, and FLOPs, of a training step on `x`.

        The step is compiled but not run. See `fit` for `x`.
        """
        self._assert_compile_called("memory_report")
        dataset = make_dataset(x, self.preprocessor, batch_size, True)
        micro_batches = self.gradient_accumulation_steps
        view = view_of(self, dataset, micro_batches)
        return memory_report(self, in_rows(self, view, micro_batches))

    def precompute(
        self, x: Any, *, batch_size: int | None = None
    ) -> pathlib.Path:
        """Compute and store the reference's log-probs for the pairs of `x`.

        `fit` and `evaluate` do this automatically; an existing store is only
        read. Needs a precomputed reference. Returns the store's directory.
        """
        if not self.precompute_reference:
            raise UserError(
                'The reference runs online. Use reference="precomputed", or '
                "precompute_reference=True beside a reference model."
            )
        dataset = make_dataset(x, self.preprocessor, batch_size, False)
        (directory,) = fill_in_reference(self, [view_of(self, dataset)])
        return directory

    # --- Saving -----------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        return saving.config_of(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "DPOModel":
        return saving.model_from_config(cls, config)

    def reference_origin(self) -> dict[str, Any]:
        """Provenance of the reference, saved with the weights."""
        return saving.reference_origin(self)

    def restore_reference_origin(self, origin: dict[str, Any]) -> None:
        """Restore the `reference_origin` of the weights just loaded."""
        saving.restore_reference_origin(self, origin)

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """Print the policy, the reference and the trained parameters."""
        self.policy.summary(*args, **kwargs)
        report_start(self, print_fn=kwargs.get("print_fn", print))
