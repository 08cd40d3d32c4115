"""Stop between two steps on a signal, with consistent state."""

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from keras_dpo.training.after_step import AfterStep
from keras_dpo.training.backups import Backup
from keras_dpo.utils.messages import say

# EX_TEMPFAIL ("try again later") of sysexits.h: preempted, can be resumed.
PREEMPTED = 75


class StopBetweenSteps(AfterStep):
    """Ends training after the step in which Ctrl-C or SIGTERM arrives.

    Interrupting a step would lose the weights that were donated to it. Ctrl-C
    raises `KeyboardInterrupt`, a second one immediately; SIGTERM is handled
    only if there is a backup to write, and exits with status 75. With several
    processes, signalling one ends all of them that way.

    Args:
        backup: Backup to write before the end, if any.
    """

    def __init__(self, backup: Backup | None = None) -> None:
        super().__init__()
        self.backup = backup
        self._signal: int | None = None
        self._interrupted: int | None = None
        self._before: dict[int, Any] = {}
        self._batches = 0

    @property
    def _several(self) -> bool:
        """Whether several processes must agree on the last step.

        JAX then handles SIGTERM itself, and picks a step that none of them
        has passed.
        """
        return self.backup is not None and jax.process_count() > 1

    def __enter__(self) -> "StopBetweenSteps":
        if threading.current_thread() is threading.main_thread():
            signals = [signal.SIGINT]
            if self.backup is not None and not self._several:
                signals.append(signal.SIGTERM)
            for number in signals:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            # The signal arrived after training had ended; do not drop it.
            self._raise()

    def _receive(self, number: int, _: Any) -> None:
        if number == self._interrupted == signal.SIGINT:
            raise KeyboardInterrupt
        self._interrupted = number
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._signal = number
        again = "; Ctrl-C again: now" if number == signal.SIGINT else ""
        text = (
            f"\n{signal.Signals(number).name}: ending after this step{again}\n"
        )
        # `print` is not reentrant, and may be what was interrupted.
        os.write(2, text.encode())

    def after_step(self, step: int) -> None:
        """No-op: stopping need not wait for a whole accumulation."""

    def after_batch(self) -> None:
        self._batches += 1
        if self._several and multihost_utils.reached_preemption_sync_point(
            self._batches
        ):
            self._signal = signal.SIGTERM
        if self.backup is None or self.backup.can_save:
            self._stop()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch, logs)
        self._stop()

    def _stop(self) -> None:
        if self._signal is None:
            return
        if self.backup is not None:
            self.backup.save()
            self.backup.close()
            say(f"A backup is in {self.backup.directory}")
        self._raise()

    def _raise(self) -> None:
        if self._signal == signal.SIGTERM:
            raise SystemExit(PREEMPTED)
        if self._signal is not None:
            raise KeyboardInterrupt
