"""Batches of similar length from the ordered pairs of an epoch."""

import numpy as np

from keras_dpo.data.packing import Packing, deal

# Batches of a window; pairs are dealt among them to balance their lengths.
BALANCED_BATCHES = 64


def balanced_batches(
    order: np.ndarray, lengths: np.ndarray, batch_size: int, packing: Packing
) -> list[np.ndarray]:
    """Batches with about equal numbers of tokens; a short one comes last.

    Every pair is in one batch and all full batches have as many pairs, so the
    expectation of a step is that of batches drawn at random.

    Args:
        order: Indices of the pairs, `(pairs,)`.
        lengths: Tokens that each pair takes in a row, by its index.
        batch_size: Pairs per batch.
        packing: The row layout.
    """
    full = len(order) // batch_size
    batches = []
    for first in range(0, full, BALANCED_BATCHES):
        last = min(first + BALANCED_BATCHES, full)
        window = order[first * batch_size : last * batch_size]
        batches += [
            window[part] for part in deal(lengths[window], last - first)
        ]
    batches = [batch[packing.order(lengths[batch])] for batch in batches]
    rest = order[full * batch_size :]
    return [*batches, rest] if len(rest) else batches


def batches_of_buckets(
    order: np.ndarray, buckets: np.ndarray, batch_size: int
) -> list[np.ndarray]:
    """Batches of one bucket each; leftovers fill up the next bucket.

    Args:
        order: Indices of the pairs, `(pairs,)`.
        buckets: The bucket of each pair, in the same order.
        batch_size: Pairs per batch.
    """
    batches: list[np.ndarray] = []
    left = np.zeros(0, int)
    for bucket in np.unique(buckets):
        members = np.concatenate([left, order[buckets == bucket]])
        full = len(members) // batch_size * batch_size
        batches += np.split(members[:full], full // batch_size or 1)
        left = members[full:]
    return [batch for batch in (*batches, left) if len(batch)]
