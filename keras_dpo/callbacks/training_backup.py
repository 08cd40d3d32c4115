"""`TrainingBackup`: resume a run, killed at any moment, bit for bit."""

import contextlib
import math
import os
import pathlib
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from keras_dpo.compat.ema_swaps import EMASwaps
from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.distribution.locks import LOCK_FILE, locked
from keras_dpo.distribution.processes import is_main_process, wait_for_processes
from keras_dpo.errors import UserError
from keras_dpo.training import state as training_state
from keras_dpo.training.after_step import UpdateCounter
from keras_dpo.training.backups import (
    Backup,
    EndOfRun,
    Restored,
    all_finite,
    interval,
    name_beside,
    named_variables,
    read_backup,
    steps_in,
    why_ended,
    writing,
)
from keras_dpo.training.state import Place
from keras_dpo.training.stop_after import StopAfter
from keras_dpo.utils.files import write_beside
from keras_dpo.utils.messages import say

# Marks a run as finished.
FINISHED = "finished.json"
# Steps that processes time before they agree on an interval.
PACE_STEPS = 10


class TrainingBackup(Backup):
    """Backs up the full state of a run, from which `fit` resumes.

    Holds the policy (unmerged LoRA), the reference if synced, optimizer,
    schedule, random generators, position in the data, metrics and callback
    counters. Orbax writes asynchronously and commits atomically by a rename: a
    run killed at any time, even while writing, resumes from the newest
    complete backup bit for bit. SIGTERM writes another one and exits with
    status 75; Ctrl-C writes one, too. Weights are those being trained, not the
    average that Keras assigns at the end under `use_ema`; reopening a finished
    run assigns it again.

    Args:
        directory: Directory of backups, with one subdirectory `N` for batch N
            of the run (an optimizer step, unless the optimizer itself
            accumulates); one run at a time. Must be shared by all processes.
        every: Optimizer steps between backups, or a time such as
            `"10 minutes"`, which several processes convert to steps by their
            pace.
        keep: Number of backups to keep.
        resume: `"auto"` resumes from the newest backup, if any; `"never"`
            starts over and moves existing backups aside; a path resumes from
            that backup (`directory/N`) or the newest in that directory.

    Raises:
        ValueError: An argument is invalid; or, when training begins, the
            backup is of other data, settings or another model, or unreadable.

    Example:

    ```python
    model.fit(train, epochs=3, callbacks=[
        keras_dpo.callbacks.TrainingBackup("backups", every=500)])
    ```
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        every: int | str = "10 minutes",
        keep: int = 2,
        resume: str | os.PathLike[str] = "auto",
    ) -> None:
        super().__init__()
        self.directory = pathlib.Path(directory).expanduser().absolute()
        self.every_steps, self.every_seconds = interval(every)
        if keep < 1:
            raise UserError(f"`keep` must be at least 1. Received: {keep!r}.")
        self.keep = keep
        self.resume = resume
        self._manager: Any = None
        self._lock = contextlib.ExitStack()

    # --- Called by `fit` before training ----------------------------------

    def begin(
        self,
        model: Any,
        dataset: PreferenceDataset,
        epochs: int,
        callbacks: Iterable[Any],
    ) -> Restored | None:
        self._dataset, self._epochs = dataset, epochs
        self._callbacks = list(callbacks)
        for callback in self._callbacks:
            if getattr(callback, "restore_best_weights", False):
                raise UserError(
                    "A backup does not hold the best weights of "
                    "EarlyStopping(restore_best_weights=True). Keep the best "
                    "with keras.callbacks.ModelCheckpoint instead."
                )
        # Computed once: it reads all pairs, and callbacks may change the
        # learning rate later.
        self._settings = training_state.settings(
            model, dataset, self._callbacks
        )
        # Number of the last saved batch of the run.
        self._saved = -1
        self._place = Place(0, 0)
        self._swaps = EMASwaps(self._callbacks)
        self._fixed_hashes: dict[bool, str] = {}
        self._lock.enter_context(locked(self.directory, "TrainingBackup"))
        if is_main_process() and self.resume == "never":
            self._move_aside()
        self._open()
        source = self._find_source()
        restored = None
        if source is not None:
            restored = self._restore(model, *source)
            if source[0] == self.directory:
                self._leave_later_ones(source[1])
        self._last_save = time.monotonic()
        self._begun_at: tuple[int, float] | None = None
        return restored

    def end(self) -> None:
        """Block until pending writes finish, then release the lock."""
        with self._lock:
            if self._manager is not None:
                self.close()

    @property
    def goes_on(self) -> bool:
        """Whether there is a backup to resume from."""
        return self.resume != "never" and (
            self.resume != "auto" or bool(steps_in(self.directory))
        )

    def _find_source(self) -> tuple[pathlib.Path, int] | None:
        """Directory and step of the backup to resume from."""
        if self.resume == "never":
            return None
        if self.resume == "auto":
            steps = steps_in(self.directory)
            return (self.directory, steps[-1]) if steps else None
        path = pathlib.Path(self.resume).expanduser().absolute()
        steps = steps_in(path)
        if not steps and path.name.isdigit() and path.is_dir():
            return path.parent, int(path.name)
        if not steps:
            raise UserError(
                f"There is no whole backup in {path}. Give the directory of a "
                "TrainingBackup, or resume='never' to begin anew."
            )
        return path, steps[-1]

    def _move_aside(self, after: int = -1) -> None:
        """Move backups of later steps aside to make room for this run's."""
        if not any(step > after for step in steps_in(self.directory)):
            return
        number = 1
        while (aside := name_beside(self.directory, number)).exists():
            number += 1
        aside.mkdir()
        # The directory itself is locked and cannot be moved.
        for path in self.directory.iterdir():
            stays = path.name.isdigit() and int(path.name) <= after
            if not stays and path.name != LOCK_FILE:
                os.replace(path, aside / path.name)
        say(f"Earlier backups were moved to {aside}")

    def _leave_later_ones(self, step: int) -> None:
        """Move later backups aside: resuming will write those steps again."""
        wait_for_processes("the backup is read")
        if is_main_process():
            self._move_aside(step)
        wait_for_processes("later backups are aside")
        self._manager.reload()

    def _open(self) -> None:
        import orbax.checkpoint as orbax

        probe = self.directory / f".writable-{jax.process_index()}"
        try:
            wait_for_processes("earlier backups are aside")
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            wait_for_processes("the directory is there")
            shared = len(list(self.directory.glob(".writable-*")))
            wait_for_processes("the directory is seen")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"Backups cannot be written to {self.directory}: "
                f"{error.strerror}. Choose another directory."
            ) from error
        if shared < jax.process_count():
            raise UserError(
                f"Only {shared} of {jax.process_count()} processes write to "
                f"{self.directory}. Choose a directory that all hosts share."
            )
        self._manager = orbax.CheckpointManager(
            self.directory,
            options=orbax.CheckpointManagerOptions(
                max_to_keep=self.keep,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )

    def _restore(
        self, model: Any, directory: pathlib.Path, step: int
    ) -> Restored:
        import orbax.checkpoint as orbax

        path = directory / str(step)
        manager = self._manager
        if directory != self.directory:
            manager = orbax.CheckpointManager(directory)
        info = read_backup(manager, step, path, info=orbax.args.JsonRestore())
        self._check_is_of_this_run(path, info, model)
        wanted = {
            name: jax.ShapeDtypeStruct(
                v.shape, v.dtype, sharding=v.value.sharding
            )
            for name, v in named_variables(model)
        }
        arrays = read_backup(
            manager, step, path, state=orbax.args.StandardRestore(wanted)
        )
        metrics, scalars = [], []
        for name, variable in named_variables(model):
            if name.startswith("metrics"):
                metrics.append(arrays[name])
            else:
                variable.assign(arrays[name])
                if name.startswith("optimizer") and not variable.shape:
                    scalars.append((variable, arrays[name]))
        self._swaps.forget()
        self._dataset.set_state(info["data"])
        self._place = Place(*info["place"])
        self._saved = step if directory == self.directory else -1
        restored = Restored(
            self._place, metrics, scalars, info["callbacks"], False
        )
        return self._with_end(restored, model, path)

    def _with_end(
        self, restored: Restored, model: Any, path: pathlib.Path
    ) -> Restored:
        """Mark the run as finished, or print where it resumes."""
        updates = UpdateCounter(model).updates
        end = EndOfRun.read(path.parent / FINISHED, int(path.name))
        if end is not None and end.is_final(
            self._epochs, updates, self._callbacks
        ):
            return restored._replace(
                callbacks=end.history,
                finished=True,
                end_with_average=end.end_with_average,
            )
        limits = [c for c in self._callbacks if isinstance(c, StopAfter)]
        if self._place.epoch >= self._epochs or any(
            limit.is_reached(updates) for limit in limits
        ):
            # Killed before it was marked as finished, or the limit is lower.
            return restored._replace(finished=True)
        say(
            f"Going on from {path}: epoch {self._place.epoch + 1}, "
            f"{self._place.batch} of {self._dataset.batches_per_epoch} steps "
            "done"
        )
        return restored

    def _check_is_of_this_run(
        self, path: pathlib.Path, info: dict[str, Any], model: Any
    ) -> None:
        # Once synced, the reference is part of the backup.
        model.reference.synced = info["reference_synced"]
        changed = training_state.differences(
            info["identity"], self._identity(model)
        )
        if not changed and info["fixed"] != self._hash_fixed(model):
            changed = ["the weights that are not trained differ"]
        if changed:
            raise UserError(
                f"The backup {path} is of another run: {'; '.join(changed)}. "
                + training_state.remedies(changed)
                + "Use the settings, data and model that it was written with, "
                "another directory, or resume='never' to begin anew."
            )

    def _identity(self, model: Any) -> dict[str, Any]:
        shapes = training_state.variable_shapes(model)
        return {**self._settings, "variables": shapes}

    def _hash_fixed(self, model: Any) -> str:
        synced = model.reference.synced
        if synced not in self._fixed_hashes:
            self._fixed_hashes[synced] = training_state.hash_fixed(model)
        return self._fixed_hashes[synced]

    # --- During training -----------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        self._saved_update = self.step
        self._epochs = self.params["epochs"]
        self._swaps.begin()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._place = Place(epoch, self._dataset.first_batch)

    def after_batch(self) -> None:
        self._place = Place(self._place.epoch, self._place.batch + 1)
        if self._model.stop_training:
            # Save inside the epoch: a resumed run must not see how validation
            # and callbacks reacted to its early end.
            self.save()

    def after_step(self, step: int) -> None:
        if self._due():
            self.save()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch, logs)
        if self._place.batch >= self._dataset.batches_per_epoch:
            self._place = Place(epoch + 1, 0)
        last = epoch + 1 >= self._epochs
        # After this, Keras overwrites the weights with the optimizer's average.
        if last or self._model.stop_training or self._due():
            self.save()
        self._swaps.finish(last)

    def on_train_end(self, logs: Any = None) -> None:
        self.close()
        if self._saved != self._number or not is_main_process():
            return
        ended = EndOfRun(
            self._saved,
            self._epochs,
            why_ended(self._model, self._callbacks),
            self._swaps.end_with_average,
            training_state.callback_states([self.model.history]),
        )
        write_beside(self.directory / FINISHED, ended.to_json())

    def _due(self) -> bool:
        if jax.process_count() > 1 and self.every_steps is None:
            self._agree_on_steps()
        if self.every_steps is not None:
            return self.step // self.every_steps > (
                self._saved_update // self.every_steps
            )
        return time.monotonic() - self._last_save >= self.every_seconds

    def _agree_on_steps(self) -> None:
        """Convert the interval to steps, since clocks of processes differ.

        Done once, from the pace measured by the first process.
        """
        begun = self._begun_at
        if begun is None:
            # Excludes the first step, which compiles.
            self._begun_at = self.step, time.monotonic()
            return
        steps, seconds = self.step - begun[0], time.monotonic() - begun[1]
        if steps < PACE_STEPS:
            return
        updates = self.every_seconds / (seconds / steps)
        number = np.asarray(max(1, round(updates)))
        self.every_steps = int(multihost_utils.broadcast_one_to_all(number))

    def save(self) -> None:
        """Write a backup now; a no-op if this step already has one.

        Raises:
            OSError: It cannot be written; the previous one stays intact.
        """
        import orbax.checkpoint as orbax

        step = self._number
        if step == self._saved or not self.can_save:
            return
        model = self.model  # Syncs the variables from the step state.
        if not math.isfinite(model.metric_totals()["loss"][0]):
            say(f"No backup of step {step}: the loss is not a finite number.")
            return
        callbacks = [*self._callbacks, model.history]
        info = {
            "identity": self._identity(model),
            "fixed": self._hash_fixed(model),
            "reference_synced": model.reference.synced,
            "place": list(self._place),
            "data": self._dataset.get_state(),
            "callbacks": training_state.callback_states(callbacks),
        }
        with self._swaps.undone():
            # Copied, because the next step donates the originals.
            arrays = {
                name: jax.numpy.copy(variable.value)
                for name, variable in named_variables(model)
            }
        # The loss of a step is that of the weights before its update.
        weights = [a for name, a in arrays.items() if name.startswith("train")]
        if not all_finite(weights):
            say(f"No backup of step {step}: weights are not finite numbers.")
            return
        with writing(step, self.directory):
            self._manager.save(
                step,
                args=orbax.args.Composite(
                    state=orbax.args.StandardSave(arrays),
                    info=orbax.args.JsonSave(info),
                ),
                force=True,
            )
        self._saved, self._saved_update = step, self.step
        self._last_save = time.monotonic()

    @property
    def _number(self) -> int:
        """Batches of the run so far, which number the backups."""
        place = self._place
        return place.epoch * self._dataset.batches_per_epoch + place.batch

    @property
    def can_save(self) -> bool:
        """Whether the run is not between an epoch's last step and its end.

        There validation, and how callbacks react to it, are still pending.
        """
        return self._place.batch < self._dataset.batches_per_epoch

    def close(self) -> None:
        """Block until pending writes are finished."""
        with writing(self._saved, self.directory):
            self._manager.wait_until_finished()
