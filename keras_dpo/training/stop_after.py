"""`StopAfter`: limit a run to a number of optimizer steps."""

from typing import Any

from keras_dpo.training.after_step import AfterStep


class StopAfter(AfterStep):
    """Ends training after a number of optimizer steps.

    A run resumed from a `TrainingBackup` with a higher limit, or none, trains
    as if the lower limit had never been set. (If a `LossScaleOptimizer` skips
    the last update, the run ends one short.)

    Args:
        steps: Total optimizer steps of the run.
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
            # Keras checks this after the step. `self.model` would copy the
            # whole state.
            self._model.stop_training = True

    def after_step(self, step: int) -> None:
        """No-op: Keras has stopped by now."""

    def is_reached(self, step: int) -> bool:
        """Whether the run ends after this optimizer step."""
        return step >= self.steps
