"""`StopAfter`: a run of so many optimizer steps."""

from typing import Any

from keras_dpo.training.after_step import AfterStep


class StopAfter(AfterStep):
    """Ends training after a number of optimizer steps.

    A run that goes on from a `TrainingBackup` with a higher limit, or with
    none, trains as if the lower one had never been. (The last update, if a
    `LossScaleOptimizer` skips it, is missing.)

    Args:
        steps: Optimizer steps of the whole run.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.has_stopped = False

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        self.has_stopped = False

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        super().on_train_batch_begin(batch, logs)
        if self.is_reached(self._counter.updates_with_next_batch):
            self.has_stopped = True
            # Keras looks after the step. Not `self.model`, which would copy
            # the whole state.
            self._model.stop_training = True

    def after_step(self, step: int) -> None:
        """Nothing: Keras has stopped by now."""

    def is_reached(self, step: int) -> bool:
        """Whether a run ends after this optimizer step."""
        return step >= self.steps
