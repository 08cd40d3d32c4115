"""The pairs of an epoch, in their order -> batches of about one length."""

import numpy as np

from keras_dpo.data.packing import Packing, deal

# Batches whose pairs are dealt among them, so that all are about as long.
BALANCED_BATCHES = 64


def balanced_batches(
    order: np.ndarray, lengths: np.ndarray, batch_size: int, packing: Packing
) -> list[np.ndarray]:
    """Batches of about as many tokens, pairs that do not fill one last.

    Every pair is in one batch and every batch has as many pairs, so the
    expectation of a step is that of batches drawn at random.

    Args:
        order: Indices of the pairs, `(pairs,)`.
        lengths: Tokens that each pair takes in a row, by its index.
        batch_size: Pairs per batch.
        packing: The layout in rows.
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
    """Batches of one bucket; what is left of one fills up the next.

    Args:
        order: Indices of the pairs, `(pairs,)`.
        buckets: The bucket of each, in that order.
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
