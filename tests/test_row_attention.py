"""Attention in blocks against scores written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keras_dpo.data.packing import Packing, pack_batch, visible_blocks
from keras_dpo.data.tokenized import Tokenized
from keras_dpo.scoring.row_attention import (
    AttentionSettings,
    Row,
    attend_in_blocks,
)
from keras_dpo.utils.arrays import BLOCK

GROUPS, QUERIES, HEAD = 2, 3, 8


def a_row(window=0, seed=0, share=True):
    random = np.random.default_rng(seed)
    pairs = [
        Tokenized(*(random.integers(1, 9, n).tolist() for n in lengths))
        for lengths in ((70, 40, 90), (3, 130, 1), (50, 20, 64))
    ]
    packing = Packing(windows=(window,), share_prompt=share)
    batch = pack_batch(packing, pairs, 3, 160)
    names = (
        "row_segments",
        "row_positions",
        f"blocks_{window}",
        f"block_counts_{window}",
    )
    return Row(*(jnp.asarray(batch[name][0]) for name in names))


def seen_by(row, window):
    """Straight from the definition: token t sees its sequence up to t."""
    segments, positions = np.asarray(row.segments), np.asarray(row.positions)
    length = len(segments)
    seen = np.zeros((length, length), bool)
    for t in range(length):
        for k in range(length):
            pair = segments[t] // 3 == segments[k] // 3
            side = segments[k] % 3 in (0, segments[t] % 3)
            back = positions[t] - positions[k]
            inside = 0 <= back < (window or length)
            seen[t, k] = segments[t] >= 0 and pair and side and inside
    return seen


def written_out(query, key, value, seen, settings):
    scores = np.einsum("gqth,gkh->gqtk", query, key) * settings.scale
    if settings.soft_cap:
        scores = np.tanh(scores / settings.soft_cap) * settings.soft_cap
    weights = np.exp(scores) * seen
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    return np.einsum("gqtk,gkh->gqth", weights, value)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("window", [0, 25, 100])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_values_and_gradients(window, soft_cap, share):
    row = a_row(window, share=share)
    settings = AttentionSettings(0.4, window, soft_cap)
    random = np.random.default_rng(1)
    length = len(row.segments)
    query = random.standard_normal((GROUPS, QUERIES, length, HEAD))
    key, value = random.standard_normal((2, GROUPS, length, HEAD))
    seen = seen_by(row, window)
    expected = written_out(query, key, value, seen, settings)
    inputs = [jnp.asarray(x, "float32") for x in (query, key, value)]
    found = jax.jit(lambda *x: attend_in_blocks(*x, row, settings))(*inputs)
    np.testing.assert_allclose(found, expected, atol=2e-6)

    direction = jnp.asarray(random.standard_normal(query.shape), "float32")

    def plain(query, key, value):
        scores = jnp.einsum("gqth,gkh->gqtk", query, key) * settings.scale
        if soft_cap:
            scores = jnp.tanh(scores / soft_cap) * soft_cap
        # A token that sees nothing would give NaN; it is no part of the sum.
        alone = ~seen.any(-1)
        scores = jnp.where(seen | alone[:, None], scores, -jnp.inf)
        output = jnp.einsum("gqtk,gkh->gqth", jax.nn.softmax(scores), value)
        return jnp.sum(jnp.where(alone[:, None], 0.0, output) * direction)

    def ours(*inputs):
        return jnp.sum(attend_in_blocks(*inputs, row, settings) * direction)

    for a, b in zip(
        jax.jit(jax.grad(ours, (0, 1, 2)))(*inputs),
        jax.jit(jax.grad(plain, (0, 1, 2)))(*inputs),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_blocks_are_those_that_are_seen_and_no_more():
    """A shared prompt and a window skip what the mask forbids."""
    for window in (0, 25):
        row = a_row(window)
        seen = seen_by(row, window)
        blocks = len(row.segments) // BLOCK
        by_block = seen.reshape(blocks, BLOCK, blocks, BLOCK).any((1, 3))
        for i in range(blocks):
            listed = set(np.asarray(row.blocks[i, : row.counts[i]]).tolist())
            assert set(np.flatnonzero(by_block[i])) <= listed
        extra = int(row.counts.sum()) - by_block.sum()
        assert extra <= 1, extra
    assert a_row(25).counts.sum() < a_row(0).counts.sum()
    assert visible_blocks([], BLOCK) == [[]]


def test_scores_are_not_kept():
    """No array of tokens x tokens, forward or backward."""
    row, settings = a_row(), AttentionSettings(1.0)
    length = len(row.segments)
    inputs = [
        jnp.ones((GROUPS, QUERIES, length, HEAD)),
        *jnp.ones((2, GROUPS, length, HEAD)),
    ]
    text = (
        jax.jit(
            jax.grad(
                lambda *x: attend_in_blocks(*x, row, settings).sum(), (0, 1, 2)
            )
        )
        .lower(*inputs)
        .as_text()
    )
    assert f"{length}x{length}x" not in text
    # Keys are not repeated for the heads that share them.
    assert f"{GROUPS * QUERIES}x{length}x{HEAD}" not in text
