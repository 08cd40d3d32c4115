"""`PolicyCheckpoint`: save policy presets during training."""

import os
import pathlib

from keras_dpo.policies.presets import save_policy
from keras_dpo.training.after_step import AfterStep


class PolicyCheckpoint(AfterStep):
    """Saves the policy as a preset every N steps, with LoRA merged.

    A start for further training, not for resuming: presets hold neither
    optimizer nor reference.

    Args:
        directory: Presets are written to `directory/step_N`.
        every: Optimizer steps between presets.
    """

    def __init__(self, directory: str | os.PathLike[str], every: int) -> None:
        super().__init__()
        self.directory = pathlib.Path(directory)
        self.every = every

    def after_step(self, step: int) -> None:
        if step % self.every == 0:
            model = self.model
            path = self.directory / f"step_{step}"
            save_policy(model.policy, path, model.preprocessor)
