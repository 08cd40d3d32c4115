"""`AfterStep`: act between two steps without slowing the others."""

import threading
from typing import Any

import keras

from keras_dpo.checks import steps_done
from keras_dpo.errors import UserError


class AfterStep(keras.callbacks.Callback):
    """Base class: `after_step` is called once for every finished step.

    A callback with an `on_train_batch_end` makes Keras wait for every step,
    or, marked `async_safe`, runs in another thread while the next step already
    deletes the state. This one acts in the training thread, at the latest
    just before the next step, validation or the end of the epoch.
    """

    # Its `on_train_batch_end` does nothing in another thread.
    async_safe = True

    def after_step(self, step: int) -> None:
        """Act on a finished step.

        Args:
            step: Steps of `fit` so far, from 1; optimizer steps unless the
                optimizer itself accumulates.
        """
        raise NotImplementedError

    def on_train_begin(self, logs: Any = None) -> None:
        optimizer = self.model.optimizer
        if self.model.steps_per_execution != 1:
            raise UserError(
                f"{type(self).__name__} needs steps_per_execution=1, so that "
                "it sees every step. Received: "
                f"{self.model.steps_per_execution}."
            )
        self.steps_per_update = optimizer.gradient_accumulation_steps or 1
        self.step = steps_done(optimizer) * self.steps_per_update
        self._pending = False
        self._thread = threading.get_ident()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._finish()
        self._pending = True

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if threading.get_ident() == self._thread:
            self._finish()

    def on_test_begin(self, logs: Any = None) -> None:
        self._finish()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._finish()

    def _finish(self) -> None:
        if getattr(self, "_pending", False):
            self._pending = False
            self.step += 1
            self.after_step(self.step)
