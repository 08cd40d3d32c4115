"""`AfterStep`: act between two steps without slowing the others."""

import threading
from typing import Any

import keras

from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.distribution.processes import to_host
from keras_dpo.errors import UserError


class AfterStep(keras.callbacks.Callback):
    """Base class: `after_step` is called once for every optimizer step.

    A callback with an `on_train_batch_end` makes Keras wait for every step,
    or, marked `async_safe`, runs in another thread while the next step already
    deletes the state. This one acts in the training thread, at the latest
    just before the next step, validation or the end of the epoch.

    The count is the optimizer's own: where it accumulates gradients over
    several batches, they are one step, and updates that a
    `LossScaleOptimizer` skips are none (for that the count is read after each
    batch, which waits for it).

    Attributes:
        step: Optimizer steps so far.
    """

    # Its `on_train_batch_end` does nothing in another thread.
    async_safe = True

    def before_fit(self, dataset: PreferenceDataset) -> None:
        """Called once by `fit`, before training.

        Args:
            dataset: The pairs that `fit` trains on, as it runs them.
        """

    def resume_settings(self) -> Any:
        """What must be the same when a run resumes, as JSON; None: nothing."""
        return None

    def after_step(self, step: int) -> None:
        """Act on a finished optimizer step.

        Args:
            step: Optimizer steps so far, from 1.
        """
        raise NotImplementedError

    def after_batch(self) -> None:
        """Act on a finished batch, whether or not it ended a step.

        `self.step` counts it already; `after_step` follows.
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
        """Act on the batch that has ended, unless that was done."""
        if not getattr(self, "_pending", False):
            return
        self._pending = False
        self._counter.count_batch()
        before, self.step = self.step, self._counter.updates
        self.after_batch()
        if self.step > before:
            self.after_step(self.step)


class UpdateCounter:
    """Updates that an optimizer has made, without waiting for the device.

    Args:
        model: A compiled model, its state in its variables.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        # Of a LossScaleOptimizer.
        inner = getattr(model.optimizer, "inner_optimizer", None)
        self._may_skip = inner is not None
        optimizer = inner or model.optimizer
        # Of a MultiOptimizer.
        parts = getattr(optimizer, "optimizers", [optimizer])
        self.batches_per_update = min(
            part.gradient_accumulation_steps or 1 for part in parts
        )
        # Keras (3.15) counts batches here, and divides what it shows.
        self._variable = optimizer._iterations
        self._batches = int(to_host(self._variable.value))

    @property
    def updates(self) -> int:
        """Updates of all batches counted so far."""
        return self._batches // self.batches_per_update

    @property
    def updates_with_next_batch(self) -> int:
        """Updates when one more batch is done, unless it is skipped."""
        return (self._batches + 1) // self.batches_per_update

    def count_batch(self) -> None:
        """Count a finished batch."""
        if self._may_skip:
            self._batches = int(to_host(self._value_now()))
        else:
            self._batches += 1

    def _value_now(self) -> Any:
        """The optimizer's count, in the state of the step if it is there."""
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
