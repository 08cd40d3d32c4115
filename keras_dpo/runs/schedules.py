"""The learning-rate schedule of a run."""

from typing import Any

import keras
from keras import ops

from keras_dpo.errors import UserError


@keras.saving.register_keras_serializable(package="keras_dpo")
class WarmupThenDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then a constant rate or a decay to zero.

    Args:
        peak: The highest learning rate.
        steps: Total optimizer steps of the run.
        warmup_steps: Number of warm-up steps; step 0 is already above zero.
        decay: `"constant"`, `"linear"` or `"cosine"`.

    Raises:
        ValueError: `decay` is unknown.

    Example:

    >>> schedule = WarmupThenDecay(1.0, steps=4, warmup_steps=2)
    >>> [round(float(schedule(step)), 2) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """

    def __init__(
        self,
        peak: float,
        steps: int,
        warmup_steps: int = 0,
        decay: str = "linear",
    ) -> None:
        super().__init__()
        if decay not in ("constant", "linear", "cosine"):
            raise UserError(
                "`decay` must be 'constant', 'linear' or 'cosine'. Received: "
                f"{decay!r}."
            )
        self.peak = peak
        self.steps = steps
        self.warmup_steps = warmup_steps
        self.decay = decay

    def __call__(self, step: Any) -> Any:
        step = ops.cast(step, "float32")
        rest = max(self.steps - self.warmup_steps, 1)
        done = ops.clip((step - self.warmup_steps) / rest, 0.0, 1.0)
        factor = {
            "constant": ops.ones_like(done),
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + ops.cos(3.141592653589793 * done)),
        }[self.decay]
        warming = (step + 1.0) / max(self.warmup_steps, 1)
        return self.peak * ops.minimum(factor, warming)

    def get_config(self) -> dict[str, Any]:
        return {
            "peak": self.peak,
            "steps": self.steps,
            "warmup_steps": self.warmup_steps,
            "decay": self.decay,
        }
