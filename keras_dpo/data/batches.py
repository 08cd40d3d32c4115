"""Arrays of static shapes from pairs; `data.packing` makes packed rows."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from keras_dpo.data.pairs import TokenizedPairs
from keras_dpo.data.tokenized import Tokenized
from keras_dpo.errors import UserError
from keras_dpo.utils.arrays import round_up

DEFAULT_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
SUM_FIELDS = ("reference_chosen_log_prob", "reference_rejected_log_prob")


def padded_ids(
    pairs: Sequence[Tokenized], size: int, length: int
) -> dict[str, np.ndarray]:
    """`token_ids` `(size, 2, length)`: each prompt with its completions."""
    token_ids = np.zeros((size, 2, length), "int32")
    for row, pair in enumerate(pairs):
        for side, ids, _ in _sides(pair):
            whole = [*pair.prompt_ids, *ids]
            token_ids[row, side, : len(whole)] = whole
    return {"token_ids": token_ids}


def completion_arrays(
    pairs: Sequence[Tokenized], size: int, tokens: int
) -> dict[str, np.ndarray]:
    """Arrays that every batch holds, whether its tokens are padded or packed.

    Args:
        pairs: The batch's pairs.
        size: Rows of the arrays; those beyond the pairs have weight 0.
        tokens: Length of the completions' axis.

    Returns:
        `completion_ids` and `completion_mask` `(size, 2, tokens)`,
        `prompt_lengths` and `completion_lengths` `(size, 2)`, all int32;
        `weight` and `margin` `(size,)`.
    """
    batch = {
        "completion_ids": np.zeros((size, 2, tokens), "int32"),
        "completion_mask": np.zeros((size, 2, tokens), "int32"),
        # Empty rows have one prompt token, so that none is all padding.
        "prompt_lengths": np.ones((size, 2), "int32"),
        "completion_lengths": np.zeros((size, 2), "int32"),
        "weight": np.zeros(size, "float32"),
        "margin": np.zeros(size, "float32"),
    }
    for row, pair in enumerate(pairs):
        batch["weight"][row] = pair.extras.get("weight", 1.0)
        batch["margin"][row] = pair.extras.get("margin", 0.0)
        batch["prompt_lengths"][row] = len(pair.prompt_ids)
        for side, ids, scored in _sides(pair):
            batch["completion_ids"][row, side, : len(ids)] = ids
            batch["completion_lengths"][row, side] = len(ids)
            flags = 1 if scored is None else scored
            batch["completion_mask"][row, side, : len(ids)] = flags
    return batch


def stored_arrays(
    stored: Sequence[np.ndarray], size: int, tokens: int
) -> np.ndarray:
    """Reference log-probs of pairs, `(size, 2, tokens)`, padded with 0."""
    log_probs = np.zeros((size, 2, tokens), "float32")
    for row, values in enumerate(stored):
        log_probs[row, :, : values.shape[1]] = values
    return log_probs


def _sides(pair: Tokenized) -> Iterator[tuple[int, list[int], Any]]:
    """(index, ids, scored) of a pair's completions."""
    yield 0, pair.chosen_ids, pair.chosen_scored
    yield 1, pair.rejected_ids, pair.rejected_scored


class SummedReference:
    """Log-probs of whole completions, placed at their first scored token."""

    def __init__(self, pairs: TokenizedPairs) -> None:
        self._pairs = pairs

    def __getitem__(self, index: int) -> np.ndarray:
        """Log-probs of a pair, `(2, tokens)`; only the sums are meaningful."""
        pair = self._pairs[index]
        width = max(len(pair.chosen_ids), len(pair.rejected_ids))
        stored = np.zeros((2, width), "float32")
        for side, _, scored in _sides(pair):
            first = 0 if scored is None else scored.index(True)
            stored[side, first] = pair.extras[SUM_FIELDS[side]]
        return stored


def choose_shapes(
    pairs: TokenizedPairs, buckets: Sequence[int] | None
) -> list[tuple[int, int]]:
    """Shapes (length, tokens) of the buckets in use, ascending in both."""
    lengths, completions = pairs.sequence_lengths, pairs.completion_lengths
    longest = int(lengths.max())
    if buckets is None:
        buckets = [b for b in DEFAULT_BUCKETS if b < longest]
        # Past the last power of two, the next multiple of 64.
        rounded = round_up(longest, 64)
        larger = [b for b in DEFAULT_BUCKETS if b >= longest]
        buckets = [*buckets, min([rounded, *larger])]
    buckets = sorted(buckets)
    if longest > buckets[-1]:
        raise UserError(
            "The longest bucket must hold the longest pair. Received: "
            f"buckets={list(buckets)}, longest pair={longest} tokens. Add a "
            "bucket or lower max_length."
        )
    shapes: list[tuple[int, int]] = []
    lower = 0
    for bucket in buckets:
        inside = completions[(lower < lengths) & (lengths <= bucket)]
        lower = bucket
        if len(inside):
            tokens = min(round_up(inside.max(), 32), bucket)
            # Leftovers of a shorter bucket must fit, too.
            tokens = max([tokens, *(shape[1] for shape in shapes)])
            shapes.append((bucket, tokens))
    return shapes
