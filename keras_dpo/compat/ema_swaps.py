"""Control of `SwapEMAWeights`, so that backups hold the raw weights."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import keras


class EMASwaps:
    """The `SwapEMAWeights` among a `fit`'s callbacks (Keras 3.15).

    With `swap_on_epoch` the model holds the optimizer's average between two
    epochs. At the end of the last epoch Keras discards the raw weights, so
    that its `finalize_variable_values` keeps the average; `finish` defers
    that until a backup is written.

    Args:
        callbacks: All callbacks of the `fit`.

    Attributes:
        end_with_average: Whether the policy holds the average when `fit` ends.
            (Not where training stops early: Keras swaps once more.)
    """

    def __init__(self, callbacks: Iterable[Any]) -> None:
        kind = keras.callbacks.SwapEMAWeights
        self._swaps: list[Any] = [c for c in callbacks if isinstance(c, kind)]
        self.end_with_average = True

    def begin(self) -> None:
        """Keep the callbacks from discarding the raw weights themselves."""
        for swap in self._swaps:
            # With 0 epochs, no epoch is their last.
            swap.set_params({**swap.params, "epochs": 0})

    def forget(self) -> None:
        """Mark the weights as not swapped, after they have been restored."""
        for swap in self._swaps:
            swap._ema_weights_in_model = False

    def finish(self, last: bool) -> None:
        """Finish the swap at an epoch's end, once the backup is written.

        Args:
            last: Whether it is the last epoch requested.
        """
        for swap in self._swaps:
            if swap.swap_on_epoch and swap._ema_weights_in_model:
                self.end_with_average = last
                if last:
                    swap._finalize_ema_values()

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Temporarily swap the raw weights back in."""
        swapped = [s for s in self._swaps if s._ema_weights_in_model]
        for swap in swapped:
            swap._swap_variables()
        try:
            yield
        finally:
            for swap in swapped:
                swap._swap_variables()
