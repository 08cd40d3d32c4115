"""One call of `fit`: callback order and restoring from a backup."""

from typing import Any

import keras

from keras_dpo.compat.averages import separate_averages
from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.training.after_step import AfterStep
from keras_dpo.training.backups import Backup, Restored
from keras_dpo.training.state import restore_callbacks
from keras_dpo.training.stopping import StopBetweenSteps
from keras_dpo.utils.messages import say


class FitRun:
    """The callbacks of one `fit`, and the state it resumes from.

    Args:
        model: A compiled `DPOModel` whose reference is set.
        dataset: The training pairs as prepared for `fit`.
        epochs: `epochs` of `fit`.
        callbacks: `callbacks` of `fit`.

    Attributes:
        stop: Context that ends training between two steps on a signal.
        callbacks: All callbacks, in the order in which they act.
    """

    def __init__(
        self,
        model: Any,
        dataset: PreferenceDataset,
        epochs: int,
        callbacks: Any,
    ) -> None:
        self._model, self._dataset, self._epochs = model, dataset, epochs
        given = _as_list(callbacks)
        for callback in given:
            if isinstance(callback, AfterStep):
                callback.before_fit(dataset)
        self._backup = next((x for x in given if isinstance(x, Backup)), None)
        self._others = [x for x in given if x is not self._backup]
        self.stop = StopBetweenSteps(self._backup)
        # A backup is written after all other callbacks have handled the step;
        # Keras would append its own History after it.
        last: list[Any] = [self.stop]
        if self._backup is not None:
            last.insert(0, self._backup)
        if not any(
            isinstance(x, keras.callbacks.History) for x in self._others
        ):
            last.insert(0, keras.callbacks.History())
        self._position = _Position(dataset, self._others, last)
        self.callbacks = [self._position, *self._others, *last]

    def restore(self) -> Restored | None:
        """Restore from the backup; returns None for a new run."""
        if self._backup is not None:
            self._position.restored = self._backup.begin(
                self._model, self._dataset, self._epochs, self._others
            )
        return self._position.restored

    def finished_history(self) -> keras.callbacks.History:
        """Restore the end of a finished run; returns the history of `fit`."""
        say("Training already finished; nothing to resume.")
        model, restored = self._model, self._position.restored
        _assign(model.metrics_variables, restored.metrics)
        model.history = keras.callbacks.History()
        # The other callbacks are not called again.
        restore_callbacks([model.history], restored.callbacks)
        if restored.end_with_average:
            # Keras does this at the end of `fit` under `use_ema`.
            model.optimizer.finalize_variable_values(model.trainable_variables)
            separate_averages(model)
        return model.history

    def end(self) -> None:
        """Finish writing the backup, however training ended."""
        if self._backup is not None:
            self._backup.end()


class _Position(keras.callbacks.Callback):
    """Positions the dataset and restores a backup's state.

    Keras' own end-of-epoch signal miscounts. This is the first callback, so it
    acts before all others.

    Args:
        dataset: The training pairs.
        callbacks: The user's callbacks, whose state a backup restores.
        last: Callbacks that run after those.
    """

    async_safe = True

    def __init__(
        self,
        dataset: PreferenceDataset,
        callbacks: list[Any],
        last: list[Any],
    ) -> None:
        super().__init__()
        self.dataset = dataset
        # State from a backup, if any, until it has been restored.
        self.restored: Any = None
        self.callbacks = callbacks
        self.after_steps = [
            x for x in (*callbacks, *last) if isinstance(x, AfterStep)
        ]

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.dataset.epoch = epoch
        self.dataset.first_batch = 0
        if self.restored is not None:
            self.dataset.first_batch = self.restored.place.batch
            if not self.restored.place.batch:
                # The other callbacks start this epoch with restored counters.
                self._restore()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Restore mid-epoch, after the others' `on_epoch_begin`."""
        if self.restored is not None:
            self._restore()

    def on_test_begin(self, logs: Any = None) -> None:
        self._finish_step()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._finish_step()

    def _finish_step(self) -> None:
        """Finish the step before any callback swaps in averaged weights."""
        for callback in self.after_steps:
            callback.finish()

    def _restore(self) -> None:
        """Restore the state of metrics and callbacks, once."""
        restored, self.restored = self.restored, None
        model: Any = self._model
        if restored.place.batch:
            _assign(model.metrics_variables, restored.metrics)
        for variable, value in restored.scalars:
            variable.assign(value)
        callbacks = [*self.callbacks, model.history]
        restore_callbacks(callbacks, restored.callbacks)


def _assign(variables: list[keras.Variable], values: list[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _as_list(callbacks: Any) -> list[keras.callbacks.Callback]:
    if callbacks is None:
        return []
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return list(callbacks.callbacks)
    if isinstance(callbacks, keras.callbacks.Callback):
        return [callbacks]
    return list(callbacks)
