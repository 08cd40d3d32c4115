"""`StepLogger` and `MetricsFile`: exact metric means between two logs."""

import json
import math
import os
import pathlib
import time
from typing import Any

import numpy as np

from keras_dpo.distribution.processes import is_main_process
from keras_dpo.errors import UserError
from keras_dpo.training.after_step import AfterStep
from keras_dpo.utils.files import write_beside


class StepLogger(AfterStep):
    """Base class that records metrics every `every` steps and every epoch.

    A step record holds means over the pairs since the previous one, exact
    under any weights; the running means that Keras shows start at the epoch.

    Args:
        every: Optimizer steps between records.
    """

    def __init__(self, every: int = 50) -> None:
        super().__init__()
        if every < 1:
            raise UserError(
                f"`every` must be at least 1 step. Received: {every!r}."
            )
        self.every = every

    def write(self, record: dict[str, Any]) -> None:
        """Write one record; implemented by subclasses."""
        raise NotImplementedError

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        self._epoch = 0
        self._totals: dict[str, tuple[float, float]] = {}

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch
        self._logged_step, self._time = self.step, time.perf_counter()

    def after_step(self, step: int) -> None:
        if step % self.every == 0:
            # Metrics are fetched on logged steps only.
            self._log_step()

    def on_test_begin(self, logs: Any = None) -> None:
        super().on_test_begin(logs)
        self._log_rest()

    def _log_step(self) -> None:
        # `self.model` would copy the whole state.
        totals = self._model.metric_totals()
        means = {}
        for name, (total, count) in totals.items():
            before = self._totals.get(name, (0.0, 0.0))
            pairs = count - before[1]
            means[name] = (total - before[0]) / pairs if pairs else np.nan
        now = time.perf_counter()
        steps = self.step - self._logged_step
        self.write(
            {
                "step": self.step,
                "epoch": self._epoch,
                **means,
                "seconds_per_step": (now - self._time) / max(steps, 1),
            }
        )
        self._totals, self._logged_step, self._time = totals, self.step, now

    def get_state(self) -> dict[str, Any]:
        """The state that a `TrainingBackup` saves."""
        return {"totals": self._totals, "step": self._logged_step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `get_state`."""
        self._totals = {k: tuple(v) for k, v in state["totals"].items()}
        self._logged_step = state["step"]

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch, logs)
        self._log_rest()
        self._totals = self._totals_before_the_epoch()
        values = {name: float(value) for name, value in (logs or {}).items()}
        self.write({"step": self.step, "end_of_epoch": epoch, **values})

    def _totals_before_the_epoch(self) -> dict[str, tuple[float, float]]:
        """Totals to subtract in the first record of the next epoch.

        Zero, or negative by the share of an optimizer step that only the next
        epoch completes.
        """
        totals = {}
        for name, (total, count) in self._model.metric_totals().items():
            before = self._totals.get(name, (0.0, 0.0))
            totals[name] = before[0] - total, before[1] - count
        return totals

    def _log_rest(self) -> None:
        """Log an epoch's remaining steps before validation resets metrics."""
        if self.step > self._logged_step:
            self._log_step()


class MetricsFile(StepLogger):
    """Writes metrics as JSON Lines, one object per record.

    Args:
        path: The file to append to.
        every: Optimizer steps between records.
    """

    def __init__(self, path: str | os.PathLike[str], every: int = 50) -> None:
        super().__init__(every)
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore the state; drops records of steps that will be repeated."""
        super().set_state(state)
        if not self.path.exists() or not is_main_process():
            return
        # Another run's file may be shorter; then only steps tell what to drop.
        lines = self._read_lines()[: state["lines"]]
        kept = [x for x in lines if _step_of(x) <= self.step]
        write_beside(self.path, "".join(kept).encode())
        self._num_lines = len(kept)

    def get_state(self) -> dict[str, Any]:
        return {**super().get_state(), "lines": self._num_lines}

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        self._num_lines = len(self._read_lines())

    def _read_lines(self) -> list[str]:
        if not self.path.exists():
            return []
        return self.path.read_text().splitlines(keepends=True)

    def write(self, record: dict[str, Any]) -> None:
        if not is_main_process():
            return
        # JSON has no NaN.
        plain = {
            key: None if isinstance(value, float) and value != value else value
            for key, value in record.items()
        }
        with self.path.open("a") as file:
            file.write(json.dumps(plain) + "\n")
        self._num_lines += 1


def _step_of(line: str) -> float:
    """The step of a record; infinite for a line truncated by a kill."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf
