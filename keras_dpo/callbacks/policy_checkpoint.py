"""`PolicyCheckpoint`: presets of the policy along the way."""

import os
import pathlib
from typing import Any

import keras

from keras_dpo.checks import steps_done
from keras_dpo.presets import save_policy


class PolicyCheckpoint(keras.callbacks.Callback):
    """Saves the policy as a preset every N steps, LoRA merged.

    To go on from, not to resume: optimizer and reference are not in it.

    Args:
        directory: Presets are written to `directory/step_N`.
        every: Optimizer steps between presets.
    """

    async_safe = True

    def __init__(self, directory: str | os.PathLike[str], every: int) -> None:
        super().__init__()
        self.directory = pathlib.Path(directory)
        self.every = every

    def on_train_begin(self, logs: Any = None) -> None:
        self._step = steps_done(self.model.optimizer)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._step += 1
        if self._step % self.every == 0:
            model = self.model
            path = self.directory / f"step_{self._step}"
            save_policy(model.policy, path, model.preprocessor)
