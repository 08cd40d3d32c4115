"""`NaNGuard`: stop at the first non-finite loss, and explain it."""

import json
import math
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import keras
import numpy as np

from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.training.after_step import AfterStep
from keras_dpo.utils.files import write_beside

# Implausible size of a weight, a margin or a stored log-prob, in nats.
EXTREME = 1e6


class NaNGuard(AfterStep):
    """Ends training when the loss is NaN or infinite.

    It never blocks a step: losses are read while later steps run, so training
    ends a step or two after the bad loss. The error names the batch, its rows
    and the likely cause; the rows' token ids are saved.

    Args:
        directory: Directory that `nonfinite-step-N.json` is written to.

    Raises:
        FloatingPointError: In `fit`, when the loss is not finite.
    """

    def __init__(self, directory: str | os.PathLike[str] = ".") -> None:
        super().__init__()
        self.directory = pathlib.Path(directory)
        self._dataset: PreferenceDataset | None = None
        self._begin_epoch(0)

    def before_fit(self, dataset: PreferenceDataset) -> None:
        """Remember the training pairs, to report rows."""
        self._dataset = dataset

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._begin_epoch(epoch)

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._first_batch: int | None = None
        self._finite: set[int] = set()
        self._not_finite: set[int] = set()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._first_batch is None:
            self._first_batch = batch
        super().on_train_batch_begin(batch, logs)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # May run in Keras' other threads, where it can block on the step and
        # calls come in any order.
        loss = float((logs or {}).get("loss", 0.0))
        (self._finite if math.isfinite(loss) else self._not_finite).add(batch)
        super().on_train_batch_end(batch, logs)

    def after_step(self, step: int) -> None:
        """No-op: the check need not wait for a whole accumulation."""

    def after_batch(self) -> None:
        if self._not_finite:
            batch = min(tuple(self._not_finite))
            if self._finite.issuperset(range(self._first_batch or 0, batch)):
                self._raise(batch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch, logs)
        if self._not_finite:
            self._raise(min(self._not_finite))

    def _raise(self, batch: int) -> None:
        cause = likely_cause(self.model)
        where = f"epoch {self._epoch + 1}, batch {batch + 1}"
        text = f"The loss is not a finite number at {where}."
        if self._dataset is not None:
            dataset = self._dataset
            batches = self._epoch * dataset.batches_per_epoch + batch
            number = batches // self._counter.batches_per_update + 1
            indices = dataset.batch_indices(batch)
            rows = [int(dataset.report.rows[i]) for i in indices]
            cause = _extreme_value(dataset, indices) or cause
            path = self.directory / f"nonfinite-step-{number}.json"
            self.directory.mkdir(parents=True, exist_ok=True)
            pairs = [dataset.pairs[i] for i in indices]
            content = [
                {
                    "row": row,
                    "prompt_ids": list(pair.prompt_ids),
                    "chosen_ids": list(pair.chosen_ids),
                    "rejected_ids": list(pair.rejected_ids),
                }
                for row, pair in zip(rows, pairs, strict=True)
            ]
            write_beside(path, json.dumps(content).encode())
            shown = ", ".join(map(str, rows[:8])) + ", ..." * (len(rows) > 8)
            text += f" Rows {shown}; their token ids are in {path}."
        raise FloatingPointError(f"{text} Likely cause: {cause}")


def likely_cause(model: Any) -> str:
    """Explain a non-finite loss from the current values of the variables."""
    reference = _nonfinite(model.reference.variables)
    trained = {id(v) for v in model.trainable_variables}
    frozen = _nonfinite(v for v in model.policy.weights if id(v) not in trained)
    for kind, found in (("reference", reference), ("frozen", frozen)):
        if found:
            return (
                f"the {kind} weights hold NaN or infinity ({found[0]}): the "
                "preset or checkpoint itself is broken."
            )
    policy = _nonfinite(model.trainable_variables)
    if not policy:
        return (
            "the weights are finite, so the step's own numbers overflowed. "
            "Score the saved rows with model.predict."
        )
    if "float16" == str(model.policy.compute_dtype):
        return "float16 overflows above 65,504. Use dtype mixed_bfloat16."
    rate = float(np.asarray(model.optimizer.learning_rate))
    clipped = model.optimizer.global_clipnorm or model.optimizer.clipnorm
    advice = "" if clipped else ", or clip gradients (clip_norm 1.0)"
    return (
        f"an update made {len(policy)} of {len(trained)} trained variables NaN "
        f"(such as {policy[0]}): training diverged at learning rate "
        f"{rate:.3g}. Lower it{advice}."
    )


def _extreme_value(dataset: PreferenceDataset, indices: Any) -> str | None:
    for i in indices:
        for name, value in dataset.pairs[i].extras.items():
            if abs(value) > EXTREME:
                return (
                    f"row {dataset.report.rows[i]} has {name} = {value:.3g}. "
                    "Correct or remove it."
                )
    return None


def _nonfinite(variables: Any) -> list[str]:
    return [
        variable.path
        for variable in variables
        if keras.backend.is_float_dtype(variable.dtype)
        and not bool(jnp.isfinite(variable.value).all())
    ]
