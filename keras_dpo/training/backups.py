"""On-disk backups: their contents, reading them, and how a run ended."""

import contextlib
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import keras
import numpy as np

from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.errors import UserError
from keras_dpo.training import state as training_state
from keras_dpo.training.after_step import AfterStep
from keras_dpo.training.state import Place
from keras_dpo.training.stop_after import StopAfter
from keras_dpo.utils.messages import say


class Restored(NamedTuple):
    """The part of a backup that is not assigned to variables immediately."""

    place: Place
    metrics: list[jax.Array]
    # For example the learning rate, which callbacks change.
    scalars: list[tuple[keras.Variable, jax.Array]]
    callbacks: list[list[Any]]
    finished: bool
    # Whether a finished run leaves the optimizer's average in the policy.
    end_with_average: bool = True


class Backup(AfterStep):
    """Base class that saves a run's state and restores it in a later `fit`.

    `fit` calls `begin` before training and `end` after it, even on failure; a
    signal that stops training calls `save` and `close` first. It runs last in
    every step, so it sees what the other callbacks did.

    Attributes:
        directory: The directory that backups are written to.
    """

    directory: pathlib.Path

    def begin(
        self,
        model: Any,
        dataset: PreferenceDataset,
        epochs: int,
        callbacks: Iterable[Any],
    ) -> Restored | None:
        """Restore variables from the newest backup; return the rest of it.

        Args:
            model: A compiled `DPOModel` whose reference is set.
            dataset: The training pairs as prepared for `fit`.
            epochs: `epochs` of `fit`.
            callbacks: The other callbacks, whose counters are saved.

        Returns:
            The state left to restore, or None for a new run.
        """
        raise NotImplementedError

    def end(self) -> None:
        """Finish writing and release the directory."""
        raise NotImplementedError

    @property
    def can_save(self) -> bool:
        """Whether the run's state is complete at this point."""
        raise NotImplementedError

    def save(self) -> None:
        """Write a backup now; a no-op if this step already has one."""
        raise NotImplementedError

    def close(self) -> None:
        """Block until the last backup is written."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class EndOfRun:
    """Record of how a run ended, stored next to its backups.

    Args:
        step: Step of the final backup.
        epochs: Number of epochs that were requested.
        ended_by: `"epochs"`, `"limit"` (`StopAfter`) or `"callback"`, such as
            EarlyStopping.
        end_with_average: Whether `use_ema` put the average in the weights.
        history: The History returned by `fit`, as
            `training_state.callback_states`; the backup lacks that of an epoch
            that ended early.
    """

    step: int
    epochs: int
    ended_by: str
    end_with_average: bool
    history: list[list[Any]]

    @classmethod
    def read(cls, path: pathlib.Path, step: int) -> "EndOfRun | None":
        """The record at `path`, or None if it is not for this step."""
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        return cls(**found) if found["step"] == step else None

    def to_json(self) -> bytes:
        """The record serialized as JSON bytes."""
        return json.dumps(dataclasses.asdict(self)).encode()

    def is_final(
        self, epochs: int, updates: int, callbacks: Iterable[Any]
    ) -> bool:
        """Whether a run with the current settings would end here, too.

        Args:
            epochs: Number of epochs requested now.
            updates: Optimizer steps done so far.
            callbacks: The current callbacks.
        """
        if self.ended_by == "limit":
            limits = (c for c in callbacks if isinstance(c, StopAfter))
            return any(limit.is_reached(updates) for limit in limits)
        if self.ended_by == "callback":
            say(
                "A callback, such as EarlyStopping, ended that run. Remove "
                "finished.json beside its backups to go on from the last one."
            )
            return True
        return self.epochs >= epochs


def why_ended(model: Any, callbacks: Iterable[Any]) -> str:
    """The reason a run ended: `"epochs"`, `"limit"` or `"callback"`."""
    callbacks = list(callbacks)
    if not model.stop_training:
        return "epochs"
    by_limit = any(c.has_stopped for c in callbacks if isinstance(c, StopAfter))
    # EarlyStopping may have stopped it at the end of the same epoch.
    stopped = any(getattr(c, "stopped_epoch", 0) for c in callbacks)
    return "limit" if by_limit and not stopped else "callback"


@jax.jit
def all_finite(arrays: list[jax.Array]) -> jax.Array:
    """Whether every element of every array is finite."""
    flags = [jax.numpy.isfinite(array).all() for array in arrays]
    return jax.numpy.stack(flags).all()


@contextlib.contextmanager
def writing(step: int, directory: pathlib.Path) -> Iterator[None]:
    """Turn any failure to write a backup into a clear `OSError`."""
    try:
        yield
    except Exception as error:
        raise OSError(
            f"The backup of step {step} cannot be written to {directory}: "
            f"{_first_line(error)}. The one before is whole: make room, and "
            "start again to go on from it."
        ) from error


def read_backup(
    manager: Any, step: int, path: pathlib.Path, **wanted: Any
) -> dict[str, Any]:
    """Read one named item of a backup."""
    import orbax.checkpoint as orbax

    (name,) = wanted
    try:
        return manager.restore(step, args=orbax.args.Composite(**wanted))[name]
    except Exception as error:
        raise UserError(
            f"The backup {path} cannot be read: {_first_line(error)}. Remove "
            f"{path} to go on from the backup before it, or use "
            "resume='never' to begin anew."
        ) from error


def named_variables(model: Any) -> Iterator[tuple[str, Any]]:
    """The variables in a backup, named by group and position."""
    groups = training_state.changing_variables(model)
    for group, variables in groups.items():
        for index, variable in enumerate(variables):
            yield f"{group}_{index:05d}", variable


def steps_in(directory: pathlib.Path) -> list[int]:
    """Steps of the complete backups in a directory, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def name_beside(directory: pathlib.Path, number: int) -> pathlib.Path:
    """The path that earlier backups are moved to."""
    return directory.with_name(f"{directory.name}.earlier-{number}")


def interval(every: int | str) -> tuple[int | None, float]:
    """Interval between backups as (steps or None, seconds)."""
    if isinstance(every, int) and every >= 1:
        return every, np.inf
    text = str(every).strip()
    if text.isdigit() and int(text) >= 1:
        return int(text), np.inf
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?m(?:in(?:ute)?s?)?", text)
    if not found or not float(found[1]) > 0:
        raise UserError(
            "`every` must be a number of steps above 0, or a time such as "
            f"'10 minutes'. Received: {every!r}."
        )
    return None, 60 * float(found[1])


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
