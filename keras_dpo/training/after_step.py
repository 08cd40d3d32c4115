"""`AfterStep`: callbacks that act between steps without stalling the rest."""

import threading
from typing import Any

import keras

from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.distribution.processes import to_host
from keras_dpo.errors import UserError


class AfterStep(keras.callbacks.Callback):
    """Base class whose `after_step` is called once per optimizer step.

    A callback with an `on_train_batch_end` makes Keras block on every step
    or, if marked `async_safe`, runs in another thread while the next step is
    already deleting the state. This one runs in the training thread, at the
    latest just before the next step, validation or the end of the epoch.

    Steps are counted by the optimizer: batches whose gradients it accumulates
    count as one step, and updates that a `LossScaleOptimizer` skips do not
    count (its counter is read after each batch, which blocks on that batch).

    Attributes:
        step: Optimizer steps so far.
    """

    # In another thread `on_train_batch_end` is a no-op.
    async_safe = True

    def before_fit(self, dataset: PreferenceDataset) -> None:
        """Called once by `fit`, before training.

        Args:
            dataset: The training pairs as prepared for `fit`.
        """

    def resume_settings(self) -> Any:
        """JSON settings that must match when a run resumes; None if none."""
        return None

    def after_step(self, step: int) -> None:
        """Act on a finished optimizer step.

        Args:
            step: Optimizer steps so far, from 1.
        """
        raise NotImplementedError

    def after_batch(self) -> None:
        """Act on a finished batch, whether or not it completed a step.

        `self.step` is already updated; `after_step` is called next.
        """

    def on_train_begin(self, logs: Any = None) -> None:
        if self.model.steps_per_execution != 1:
            raise UserError(
                f"{type(self).__name__} needs steps_per_execution=1, so that "
                "it sees every step. Received: "
                f"{self.model.steps_per_execution}."
            )
        self._counter = UpdateCounter(self.model)
        self.step = self._counter.updates
        self._pending = False
        self._thread = threading.get_ident()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.finish()
        self._pending = True

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if threading.get_ident() == self._thread:
            self.finish()

    def on_test_begin(self, logs: Any = None) -> None:
        self.finish()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.finish()

    def finish(self) -> None:
        """Process the finished batch; a no-op if that was already done."""
        if not getattr(self, "_pending", False):
            return
        self._pending = False
        self._counter.count_batch()
        before, self.step = self.step, self._counter.updates
        self.after_batch()
        if self.step > before:
            self.after_step(self.step)


class UpdateCounter:
    """Counts an optimizer's updates without blocking on the device.

    Args:
        model: A compiled model whose state is in its variables.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        # Only a LossScaleOptimizer has one.
        inner = getattr(model.optimizer, "inner_optimizer", None)
        self._may_skip = inner is not None
        optimizer = inner or model.optimizer
        # Only a MultiOptimizer has several.
        parts = getattr(optimizer, "optimizers", [optimizer])
        self.batches_per_update = min(
            part.gradient_accumulation_steps or 1 for part in parts
        )
        # Keras 3.15 counts batches here and divides in the public property.
        self._variable = optimizer._iterations
        self._batches = int(to_host(self._variable.value))

    @property
    def updates(self) -> int:
        """Updates made by the batches counted so far."""
        return self._batches // self.batches_per_update

    @property
    def updates_with_next_batch(self) -> int:
        """Updates after one more batch, provided that it is not skipped."""
        return (self._batches + 1) // self.batches_per_update

    def count_batch(self) -> None:
        """Count a finished batch."""
        if self._may_skip:
            self._batches = int(to_host(self._value_now()))
        else:
            self._batches += 1

    def _value_now(self) -> Any:
        """The optimizer's counter, read from the live step state if any."""
        state = getattr(self._model, "_jax_state", None) or {}
        values = state.get("optimizer_variables")
        if values is None or self._model._jax_state_synced:
            return self._variable.value
        variables = self._model.optimizer.variables
        return next(
            value
            for variable, value in zip(variables, values, strict=True)
            if variable is self._variable
        )
