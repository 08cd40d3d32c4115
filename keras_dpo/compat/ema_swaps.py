"""`SwapEMAWeights` callbacks, so that backups hold what they swap away."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import keras


class EMASwaps:
    """The `SwapEMAWeights` among some callbacks (Keras 3.15).

    With `swap_on_epoch` the weights are the optimizer's average between two
    epochs. At the last epoch's end Keras gives up the weights themselves, so
    that its `finalize_variable_values` leaves the average where it is: a
    backup comes first, and `finish` does that then.

    Args:
        callbacks: Of a `fit`.

    Attributes:
        end_with_average: Whether the policy is the average when `fit` ends.
            (Where training stops early it is not: Keras swaps once more.)
    """

    def __init__(self, callbacks: Iterable[Any]) -> None:
        kind = keras.callbacks.SwapEMAWeights
        self._swaps: list[Any] = [c for c in callbacks if isinstance(c, kind)]
        self.end_with_average = True

    def begin(self) -> None:
        """Keep them from giving up the weights by themselves."""
        for swap in self._swaps:
            # The last epoch is never theirs.
            swap.set_params({**swap.params, "epochs": 0})

    def forget(self) -> None:
        """The weights have been restored, and are not swapped."""
        for swap in self._swaps:
            swap._ema_weights_in_model = False

    def finish(self, last: bool) -> None:
        """Do at an epoch's end what they would, after a backup.

        Args:
            last: Whether it is the last epoch asked for.
        """
        for swap in self._swaps:
            if swap.swap_on_epoch and swap._ema_weights_in_model:
                self.end_with_average = last
                if last:
                    swap._finalize_ema_values()

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """The weights that training goes on with, for a moment."""
        swapped = [s for s in self._swaps if s._ema_weights_in_model]
        for swap in swapped:
            swap._swap_variables()
        try:
            yield
        finally:
            for swap in swapped:
                swap._swap_variables()
