"""`StepLogger` and its file: exact means of what happened between two logs."""

import json
import os
import pathlib
import time
from typing import Any

import keras
import numpy as np

from keras_dpo.checks import steps_done


class StepLogger(keras.callbacks.Callback):
    """Base class: a record every `every` steps and at the end of an epoch.

    A step record holds means over the pairs since the last one, exact under
    any weights; the running means that Keras shows begin with the epoch.

    Args:
        every: Optimizer steps between records.
    """

    # Metrics are fetched on logged steps alone.
    async_safe = True

    def __init__(self, every: int = 50) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(
                f"`every` must be at least 1 step. Received: {every!r}."
            )
        self.every = every

    def write(self, record: dict[str, Any]) -> None:
        """Keep one record; for subclasses."""
        raise NotImplementedError

    def on_train_begin(self, logs: Any = None) -> None:
        self._step = steps_done(self.model.optimizer)
        self._epoch = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch
        self._totals: dict[str, tuple[float, float]] = {}
        self._logged_step, self._time = self._step, time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._step += 1
        if self._step % self.every == 0:
            self._log_step()

    def _log_step(self) -> None:
        # Not `self.model`, which would copy the whole state.
        totals = self._model.metric_totals()
        means = {}
        for name, (total, count) in totals.items():
            before = self._totals.get(name, (0.0, 0.0))
            pairs = count - before[1]
            means[name] = (total - before[0]) / pairs if pairs else np.nan
        now = time.perf_counter()
        steps = self._step - self._logged_step
        self.write(
            {
                "step": self._step,
                "epoch": self._epoch,
                **means,
                "seconds_per_step": (now - self._time) / max(steps, 1),
            }
        )
        self._totals, self._logged_step, self._time = totals, self._step, now

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._step > self._logged_step:
            self._log_step()
        values = {name: float(value) for name, value in (logs or {}).items()}
        self.write({"step": self._step, "end_of_epoch": epoch, **values})


class MetricsFile(StepLogger):
    """Writes one JSON object a line.

    Args:
        path: The file; lines are added at its end.
        every: Optimizer steps between records.
    """

    def __init__(self, path: str | os.PathLike[str], every: int = 50) -> None:
        super().__init__(every)
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, record: dict[str, Any]) -> None:
        # JSON knows no NaN.
        plain = {
            key: None if isinstance(value, float) and value != value else value
            for key, value in record.items()
        }
        with self.path.open("a") as file:
            file.write(json.dumps(plain) + "\n")
