"""Resuming mid-epoch, which Keras' trainer does not support.

Keras 3.15 counts the batches of an epoch once, before training.
`tests/test_training_backup.py` tells when that changes.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from keras_dpo.compat.patching import current, patched


@contextlib.contextmanager
def resumable_epochs() -> Iterator[None]:
    """Make Keras count a `PreferenceDataset`'s batches anew every epoch."""
    trainer: Any = keras.src.backend.jax.trainer
    original: Any = current(trainer, "JAXEpochIterator")

    class ResumableEpochIterator(original):
        def _enumerate_iterator(self) -> Iterator[Any]:
            dataset = getattr(self.data_adapter, "py_dataset", None)
            first = getattr(dataset, "first_batch", 0)
            self._num_batches = self.data_adapter.num_batches
            for begin, end, batches in super()._enumerate_iterator():
                yield first + begin, first + end, batches

    with patched(trainer, "JAXEpochIterator", ResumableEpochIterator):
        yield
