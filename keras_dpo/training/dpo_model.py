"""`DPOModel`: fit, evaluate and predict around one pure loss function."""

import contextlib
import copy
import dataclasses
import functools
import pathlib
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from keras_dpo import losses
from keras_dpo.compat.resumable_epochs import resumable_epochs
from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.data.packing import Packing
from keras_dpo.data.preprocessor import DPOPreprocessor
from keras_dpo.data.stream import make_dataset, need_an_end
from keras_dpo.distribution.processes import (
    check_processes_agree,
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
    drop_reference_model,
    fill_in_reference,
)
from keras_dpo.scoring.execution import Execution
from keras_dpo.scoring.packed_backbone import layer_settings
from keras_dpo.training.checks import (
    check_dataset,
    check_differentiable,
    check_first_batch,
    check_one_reference,
    check_policy,
    check_same_ids,
    check_same_vocabulary,
    check_trainable_variables,
    report_start,
    warn_of_swapped_pairs,
)
from keras_dpo.training.fit_run import FitRun
from keras_dpo.training.memory import (
    MemoryReport,
    layers_must_be_rematerialized,
    memory_report,
)
from keras_dpo.training.metrics import make_metrics
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
        preprocessor: A `DPOPreprocessor`; `"auto"` makes one from the
            policy's own tokenizer, if it has one.
        precompute_reference: Whether the reference's log-probs are computed
            once, before training, kept on disk and read again by the next run.
            The reference then leaves memory, and cannot be synced. With the
            initial policy as reference the same as `"precomputed"`.
        reference_cache: The directory for them; `~/.cache/keras_dpo/reference`
            if left out.
        snapshot_dtype: Number type of the snapshot that `"initial"` keeps, such
            as `"bfloat16"` for half the memory; rewards then begin near 0, not
            at it. None: the policy's own.
        disable_dropout: Whether dropout is off in the policy while it trains.
            The reference never has dropout.
        execution: Which fast paths the policy runs on; see `Execution`.

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
        if precompute_reference and reference is None:
            raise UserError(
                "precompute_reference=True needs a reference. Received: "
                "reference=None. Leave one of them out."
            )
        if precompute_reference and reference == "initial":
            reference = "precomputed"
        self.precompute_reference = (
            precompute_reference or reference == "precomputed"
        )
        if reference_cache is not None and not self.precompute_reference:
            raise UserError(
                "`reference_cache` has no effect on a reference that runs "
                f"online. Received: {reference_cache!r}. Set "
                "precompute_reference=True or leave it out."
            )
        self.reference_cache = reference_cache
        if snapshot_dtype is not None and reference != "initial":
            raise UserError(
                "`snapshot_dtype` has no effect without a snapshot. Received: "
                f"snapshot_dtype={snapshot_dtype!r} with a reference that is "
                "not 'initial'. Leave it out."
            )
        self.snapshot_dtype = snapshot_dtype
        # The policy's dtype policy: loss scaling follows it.
        kwargs.setdefault("dtype", policy.dtype_policy)
        super().__init__(**kwargs)
        self.policy = policy
        self.reference_choice = (
            reference if isinstance(reference, str | None) else "model"
        )
        self.disable_dropout = disable_dropout
        self._execution_choice = execution or Execution()
        others = [reference] if isinstance(reference, keras.Model) else []
        # `fit` decides on remat="auto" by the data.
        self._resolved_execution = self._execution_choice.resolve(
            policy, others, disable_dropout
        )
        self.execution = self._resolved_execution
        # None once training has replaced them.
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
            # `save_policy` keeps it with the policy.
            policy._trained_with = preprocessor
        self.preference_loss = losses.Sigmoid()
        self.gradient_accumulation_steps = 1
        self._pair_metrics = []
        self._optional_metrics = []
        self._pair_log_probs_function = None
        self._fitting = False
        # Kept while a loss without a reference is compiled in between.
        self._snapshot: Untracked | None = None
        # What the stored log-probs were computed from, once the weights that
        # they came from are gone.
        self._reference_content: dict[str, str] | None = None
        self._reference_was_dropped = False
        self._attention_windows: set[int] | None = None
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
            **kwargs: `run_eagerly`, `jit_compile`, `auto_scale_loss` of
                `keras.Model.compile`.

        Raises:
            ValueError: A trainable variable has 16 bits, an option does
                nothing, or the loss needs what the reference cannot give.
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
        """Make the reference that the loss needs, or none."""
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
        """The one snapshot of the initial weights, made when first needed."""
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
        """The trainable variables' values before any training."""
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
        check_processes_share_a_mesh()
        check_differentiable(self.policy)
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
        train, valid = self._prepare_training(
            train, valid, epochs - initial_epoch
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

    def _prepare_training(
        self,
        train: PreferenceDataset,
        valid: PreferenceDataset | None,
        epochs: int,
    ) -> tuple[PreferenceDataset, PreferenceDataset | None]:
        """The model's views of both datasets, and what follows from them."""
        micro_batches = self.gradient_accumulation_steps
        train = self._view_of(train, micro_batches)
        if valid is not None:
            valid = self._view_of(valid)
        self._fill_in_reference(*(x for x in (train, valid) if x is not None))
        train = self._in_rows(train, micro_batches, epochs)
        if valid is not None:
            valid = self._in_rows(valid)
        if jax.process_count() > 1:
            check_processes_agree(
                {
                    "steps of an epoch": train.batches_per_epoch,
                    "the training pairs": train.pairs.hash_token_ids(),
                    "the order's seed": train.seed,
                }
            )
        if self.precompute_reference:
            drop_reference_model(self)
        if self._resolved_execution.remat == "auto":
            must = layers_must_be_rematerialized(self, train)
            self.execution = dataclasses.replace(
                self._resolved_execution, remat="layers" if must else "none"
            )
        if train.preprocessor.tokenizer is not None:
            # What it is trained on, `save_policy` keeps.
            self.policy._trained_with = train.preprocessor
        return train, valid

    def _check_first_batch(self, train: PreferenceDataset) -> None:
        """Raise where policy and reference do not begin as one."""
        is_own = self.reference_choice == "precomputed"
        if is_own and not (
            self._reference_was_dropped or train.reference_is_summed
        ):
            # The other references are compared by their log-probs.
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
        """The loss and the metrics on preference pairs; see `fit` for `x`."""
        self._assert_compile_called("evaluate")
        if "_use_cached_eval_dataset" not in kwargs:
            x = make_dataset(x, self.preprocessor, batch_size, False, steps)
            x = self._prepare(x)
        kwargs.pop("y", None)
        kwargs.pop("sample_weight", None)
        # Inside `fit` the running training metrics would be lost. Copies: the
        # step donates the originals.
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
        """Log-probs and rewards of every pair, in the order of the input.

        Returns:
            `(pairs,)` arrays under the names chosen_log_prob,
            rejected_log_prob, reference_chosen_log_prob,
            reference_rejected_log_prob, chosen_reward, rejected_reward and
            reward_margin, in nats. A pair that the data report dropped is NaN.
        """
        dataset = make_dataset(x, self.preprocessor, batch_size, False, steps)
        need_an_end(dataset, "predict gives a value for every row")
        dataset = self._prepare(dataset)
        with self._weights_kept():
            outputs = super().predict(
                dataset, verbose=verbose, callbacks=callbacks
            )
        return dataset.in_input_order(outputs)

    @contextlib.contextmanager
    def _weights_kept(self) -> Iterator[None]:
        """For runs that donate the weights, and change none of them."""
        if self._fitting:
            # `fit` brings its own state back.
            yield
            return
        with initial_weights_kept():
            try:
                yield
            finally:
                # After an exception Keras leaves the donated ones.
                self.jax_state_sync()

    def _forget_initial_weights(self) -> None:
        """After `fit`: they are the policy's own only if no step was taken."""
        if self._initial is not None and not self._initial.are_current:
            self._initial = None

    def _prepare(self, dataset: PreferenceDataset) -> PreferenceDataset:
        """The model's own view of a dataset, ready to be scored."""
        dataset = self._view_of(dataset)
        self._fill_in_reference(dataset)
        return self._in_rows(dataset)

    def _view_of(
        self, dataset: PreferenceDataset, micro_batches: int = 1
    ) -> PreferenceDataset:
        """The model's own view of a dataset, checked against the model."""
        self._ensure_reference()
        view = dataset.view()
        view.check(
            functools.partial(check_dataset, self, micro_batches=micro_batches)
        )
        check_one_reference(self, view)
        return view

    def _fill_in_reference(self, *views: PreferenceDataset) -> None:
        """Give views their stored reference log-probs, if it is precomputed."""
        missing = [view for view in views if not view.has_reference]
        if missing and self.precompute_reference and self.reference.compares:
            fill_in_reference(self, missing)

    def _in_rows(
        self, view: PreferenceDataset, micro_batches: int = 1, epochs: int = 1
    ) -> PreferenceDataset:
        """A view in packed rows, where the policy runs on them."""
        if not self.execution.in_rows:
            return view
        return view.packed(self._packing(view, micro_batches), epochs)

    def _packing(
        self, dataset: PreferenceDataset, micro_batches: int
    ) -> Packing:
        """Rows for the attention that the policy and reference run."""
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
        """What a training step on `x` takes: bytes by what holds them, FLOPs.

        The step is compiled, and not run. See `fit` for `x`.
        """
        self._assert_compile_called("memory_report")
        dataset = make_dataset(x, self.preprocessor, batch_size, True)
        micro_batches = self.gradient_accumulation_steps
        view = self._view_of(dataset, micro_batches)
        return memory_report(self, self._in_rows(view, micro_batches))

    def precompute(
        self, x: Any, *, batch_size: int | None = None
    ) -> pathlib.Path:
        """Compute and store the reference's log-probs of the pairs of `x`.

        `fit` and `evaluate` do so by themselves; a store that is there is
        only read. Needs `precompute_reference=True`. Returns its directory.
        """
        if not self.precompute_reference:
            raise UserError(
                "The reference runs online. Make the model with "
                "precompute_reference=True."
            )
        dataset = make_dataset(x, self.preprocessor, batch_size, False)
        (directory,) = fill_in_reference(self, [self._view_of(dataset)])
        return directory

    # --- Saving -----------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "name": self.name,
            "policy": lora.policy_config(self.policy),
            "trained_parts": lora.trained_parts(self.policy),
            "reference": self.reference_choice,
            "disable_dropout": self.disable_dropout,
            "precompute_reference": self.precompute_reference,
            "reference_cache": self.reference_cache,
            "snapshot_dtype": self.snapshot_dtype,
            "keeps_snapshot": self.reference is not None
            and self.reference.keeps_snapshot,
            "execution": self._execution_choice.get_config(),
        }
        if self.reference_choice == "model":
            config["reference_model"] = lora.policy_config(self.reference.model)
        if isinstance(self.preprocessor, DPOPreprocessor):
            self.preprocessor.check_can_be_saved(self.policy)
            config["preprocessor"] = self.preprocessor.get_config()
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "DPOModel":
        # Keras takes the policy's config apart as it reads it.
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
            # Its values are loaded into it.
            replace_reference(model, model._make_snapshot())
        return model

    def reference_origin(self) -> dict[str, Any]:
        """What the reference is made of; it is kept with the weights."""
        return {
            "has_trained": self.has_trained,
            "has_snapshot": self.reference is not None
            and self.reference.keeps_snapshot,
            "content": self._reference_content,
            "was_dropped": self._reference_was_dropped,
        }

    def restore_reference_origin(self, origin: dict[str, Any]) -> None:
        """Take `reference_origin` of the weights that were just loaded.

        Raises:
            UserError: They came with a snapshot that this model has no place
                for, or without one that it needs.
        """
        has_snapshot = (
            self.reference is not None and self.reference.keeps_snapshot
        )
        if origin["has_snapshot"] and not has_snapshot:
            raise UserError(
                "The file holds a snapshot of the initial weights, and the "
                "model has no place for it yet. Compile the model, with a loss "
                "that needs a reference, before load_weights."
            )
        self._reference_content = origin["content"]
        self._reference_was_dropped = origin["was_dropped"]
        self._initial = None
        if not origin["has_trained"]:
            self._initial = InitialWeights(self.policy)
        if not has_snapshot:
            # One that waits for its loss is of other weights.
            self._snapshot = None
        if has_snapshot and not origin["has_snapshot"]:
            # Raises where the initial weights are not those of the file.
            values = self._initial_values()
            for variable, value in zip(
                self.reference.snapshot, values, strict=True
            ):
                variable.assign(jnp.array(value, variable.dtype, copy=True))

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """Print the policy, the reference and what is trained."""
        self.policy.summary(*args, **kwargs)
        report_start(self, print_fn=kwargs.get("print_fn", print))
