"""Attention within rows of packed pairs, without stored scores.

Two implementations of one pattern: `attend_in_blocks` loops over the key blocks
that a block of tokens sees, and recomputes scores in the backward pass;
`attend_in_sequences` unpacks whole sequences and calls JAX' fused attention.
Neither repeats keys and values for grouped queries.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from keras_dpo.scoring.splash_attention import splash_attention
from keras_dpo.utils.arrays import BLOCK, SEGMENTS

Array = jax.Array
MASKED = -1e30
# Key blocks per iteration of the inner loop; the fastest on CPU.
KEY_BLOCKS = 2


@dataclasses.dataclass(frozen=True)
class AttentionSettings:
    """A layer's attention settings.

    Args:
        scale: Factor on the scores.
        window: Size of the sliding window, in tokens; 0 for none.
        soft_cap: Bound on the scores, by tanh; None for none.
    """

    scale: float
    window: int = 0
    soft_cap: float | None = None


class Row(NamedTuple):
    """Integers that encode what a row's tokens see; see `data.packing`."""

    segments: Array
    positions: Array
    blocks: Array
    counts: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_in_blocks(
    query: Array,
    key: Array,
    value: Array,
    row: Row,
    settings: AttentionSettings,
) -> Array:
    """Attention of one row, `(groups, queries, length, head)`.

    Online softmax over blocks of keys (FlashAttention-2,
    [Dao, 2023](https://arxiv.org/abs/2307.08691), algorithms 1 and 2), in
    loops over the visible blocks only.

    Args:
        query: `(groups, queries, length, head)`: the heads that share a key
            head are a group.
        key: `(groups, length, head)`.
        value: `(groups, length, head)`.
        row: The row's pattern.
        settings: The layer's scale, window and soft cap.
    """
    return _forward(query, key, value, row, settings)[0]


def _forward(
    query: Array,
    key: Array,
    value: Array,
    row: Row,
    settings: AttentionSettings,
) -> tuple[Array, Any]:
    groups, queries, length, head = query.shape
    shape = (groups, queries * BLOCK)

    def token_block(i: Array, carry: Any) -> Any:
        output, log_sums = carry
        block = _block(query, i, 2).reshape(*shape, head)
        visible = _visible_keys(row, i, settings.window)

        def key_blocks(n: Array, carry: Any) -> Any:
            largest, total, sums = carry
            places = _places(row, i, n)
            keys = _blocks(key, places, 1)
            scores, _ = _scores(
                block, keys, _visible_in_iteration(visible, n), settings
            )
            new = jnp.maximum(largest, _reduced(jnp.maximum, jnp.max, scores))
            weights = jnp.exp(scores - new[..., None])
            kept = jnp.exp(largest - new)
            total = total * kept + _reduced(jnp.add, jnp.sum, weights)
            sums = sums * kept[..., None] + _dot(
                "gqk,gkh->gqh", weights, _blocks(value, places, 1)
            )
            return new, total, sums

        largest, total, sums = lax.fori_loop(
            0,
            _num_iterations(row, i),
            key_blocks,
            (
                # Above `MASKED`, so that tokens that see nothing give zero.
                jnp.full(shape, 0.1 * MASKED, "float32"),
                jnp.zeros(shape, "float32"),
                jnp.zeros(block.shape, "float32"),
            ),
        )
        total = jnp.maximum(total, 1e-30)
        split = (groups, queries, BLOCK)
        result = (sums / total[..., None]).reshape(*split, head)
        log_sum = (largest + jnp.log(total)).reshape(split)
        return _put(output, result, i, 2), _put(log_sums, log_sum, i, 2)

    output, log_sums = lax.fori_loop(
        0,
        length // BLOCK,
        token_block,
        (
            jnp.zeros_like(query),
            jnp.zeros((groups, queries, length), "float32"),
        ),
    )
    return output, (query, key, value, row, output, log_sums)


def _backward(settings: AttentionSettings, kept: Any, gradient: Array) -> Any:
    query, key, value, row, output, log_sums = kept
    groups, queries, length, head = query.shape
    shape = (groups, queries * BLOCK)
    along = jnp.sum(
        output.astype("float32") * gradient.astype("float32"), axis=-1
    )

    def token_block(i: Array, carry: Any) -> Any:
        d_query, d_key, d_value = carry
        block = _block(query, i, 2).reshape(*shape, head)
        d_output = _block(gradient, i, 2).reshape(*shape, head)
        log_sum = _block(log_sums, i, 2).reshape(*shape, 1)
        mean = _block(along, i, 2).reshape(*shape, 1)
        visible = _visible_keys(row, i, settings.window)

        def key_blocks(n: Array, carry: Any) -> Any:
            d_block, d_key, d_value = carry
            places = _places(row, i, n)
            keys, values = (_blocks(a, places, 1) for a in (key, value))
            scores, slope = _scores(
                block, keys, _visible_in_iteration(visible, n), settings
            )
            weights = jnp.exp(scores - log_sum)
            d_weights = _dot("gqh,gkh->gqk", d_output, values)
            d_scores = weights * (d_weights - mean) * slope * settings.scale
            d_value = _add(
                d_value, _dot("gqk,gqh->gkh", weights, d_output), places
            )
            d_key = _add(d_key, _dot("gqk,gqh->gkh", d_scores, block), places)
            d_block = d_block + _dot("gqk,gkh->gqh", d_scores, keys)
            return d_block, d_key, d_value

        d_block, d_key, d_value = lax.fori_loop(
            0,
            _num_iterations(row, i),
            key_blocks,
            (jnp.zeros((*shape, head), "float32"), d_key, d_value),
        )
        d_block = d_block.reshape(groups, queries, BLOCK, head)
        return _put(d_query, d_block, i, 2), d_key, d_value

    d_query, d_key, d_value = lax.fori_loop(
        0,
        length // BLOCK,
        token_block,
        (
            jnp.zeros_like(query),
            jnp.zeros(key.shape, "float32"),
            jnp.zeros(value.shape, "float32"),
        ),
    )
    return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype), None


attend_in_blocks.defvjp(_forward, _backward)


def _num_iterations(row: Row, i: Array) -> Array:
    """Iterations of the inner loop for token block i."""
    return -(-row.counts[i] // KEY_BLOCKS)


def _places(row: Row, i: Array, n: Array) -> list[Array]:
    """Key blocks of iteration n; those that do not exist are masked."""
    last = row.blocks.shape[1] - 1
    turns = [n * KEY_BLOCKS + k for k in range(KEY_BLOCKS)]
    return [row.blocks[i, jnp.minimum(turn, last)] for turn in turns]


def _scores(
    block: Array, keys: Array, visible: Array, settings: AttentionSettings
) -> tuple[Array, Array | float]:
    """Scores of a token block and some key blocks, and the soft cap's slope.

    `(groups, queries * BLOCK, keys)`; `MASKED` where nothing is visible.
    """
    scores = _dot("gqh,gkh->gqk", block, keys) * settings.scale
    slope: Array | float = 1.0
    if settings.soft_cap is not None:
        bent = jnp.tanh(scores / settings.soft_cap)
        scores, slope = bent * settings.soft_cap, 1.0 - bent * bent
    queries = block.shape[1] // BLOCK
    return jnp.where(jnp.tile(visible, (queries, 1)), scores, MASKED), slope


def _visible_keys(row: Row, i: Array, window: int) -> Array:
    """Mask of the keys that token block i sees, `(BLOCK, blocks * BLOCK)`.

    Tokens see those before them in their own segment and in their prompt.
    Computed once, outside the inner loop, where XLA would fuse it, slowly,
    with the scores.
    """
    inside = jnp.arange(BLOCK)
    blocks = row.blocks[i]
    exist = jnp.arange(len(blocks)) < row.counts[i]
    key_place = (blocks[:, None] * BLOCK + inside).reshape(-1)
    key_segment = row.segments[key_place]
    segment = _block(row.segments, i, 0)[:, None]
    visible = (key_segment == segment) | (
        key_segment == segment // SEGMENTS * SEGMENTS
    )
    visible = visible & (segment >= 0) & jnp.repeat(exist, BLOCK)
    visible = visible & ((i * BLOCK + inside)[:, None] >= key_place)
    if window:
        position = _block(row.positions, i, 0)[:, None]
        visible = visible & (position - row.positions[key_place] < window)
    return jnp.pad(visible, ((0, 0), (0, -len(blocks) % KEY_BLOCKS * BLOCK)))


def _visible_in_iteration(visible: Array, n: Array) -> Array:
    """Iteration n's part of the mask from `_visible_keys`."""
    width = KEY_BLOCKS * BLOCK
    return lax.dynamic_slice_in_dim(visible, n * width, width, 1)


def _reduced(combine: Any, reduce: Any, array: Array) -> Array:
    """`reduce` over the last axis, halved to 16 first.

    XLA vectorizes the halves, but rewrites a longer reduction to windows of
    32, which are slower.
    """
    while array.shape[-1] > 16:
        array = combine(*jnp.split(array, 2, axis=-1))
    return reduce(array, axis=-1)


def _dot(equation: str, left: Array, right: Array) -> Array:
    """Einsum in the narrower of the two dtypes, with a float32 result."""
    dtype = min(left.dtype, right.dtype, key=lambda d: d.itemsize)
    return jnp.einsum(
        equation,
        left.astype(dtype),
        right.astype(dtype),
        preferred_element_type="float32",
    )


def _block(array: Array, i: Array, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(array, i * BLOCK, BLOCK, axis)


def _put(array: Array, block: Array, i: Array, axis: int) -> Array:
    block = block.astype(array.dtype)
    return lax.dynamic_update_slice_in_dim(array, block, i * BLOCK, axis)


def _blocks(array: Array, places: list[Array], axis: int) -> Array:
    return jnp.concatenate([_block(array, j, axis) for j in places], axis=axis)


def _add(array: Array, blocks: Array, places: list[Array]) -> Array:
    """Scatter-add blocks into `array` at their places.

    Blocks that do not exist are all zeros, wherever they are added.
    """
    parts = jnp.split(blocks, len(places), axis=1)
    for j, part in zip(places, parts, strict=True):
        array = _put(array, _block(array, j, 1) + part, j, 1)
    return array


def attend_in_sequences(
    query: Array,
    key: Array,
    value: Array,
    sequence_slots: Array,
    row_slots: Array,
    lengths: Array,
    settings: AttentionSettings,
    splash: bool = False,
) -> Array:
    """Attention of rows on whole sequences, by a fused kernel of JAX.

    The attention of a shared prompt is computed once per completion, unlike
    the rest of the model.

    Args:
        query: `(rows, length, groups, queries, head)`.
        key: `(rows, length, groups, head)`.
        value: `(rows, length, groups, head)`.
        sequence_slots: `(rows, sequences, sequence)`, positions in the row.
        row_slots: `(rows, length)`, positions in the flat sequences.
        lengths: `(rows, sequences)`, tokens of each sequence.
        settings: The layer's scale, window and soft cap.
        splash: Whether to use TPU's splash kernel instead of
            `jax.nn.dot_product_attention`.
    """
    rows, length, groups, queries, head = query.shape
    _, sequences, tokens = sequence_slots.shape

    def spread(array: Array) -> Array:
        flat = sequence_slots.reshape(rows, sequences * tokens, 1, 1)
        array = jnp.take_along_axis(array, flat, axis=1)
        return array.reshape(rows * sequences, tokens, *array.shape[2:])

    query = query.reshape(rows, length, groups * queries, head)
    inputs = spread(query), spread(key), spread(value)
    lengths = lengths.reshape(-1)
    if splash:
        output = splash_attention(
            *inputs,
            lengths,
            settings.scale,
            settings.window,
            settings.soft_cap,
        )
    elif settings.soft_cap is None:
        output = _fused_attention(*inputs, lengths, settings)
    else:
        output = _capped_attention(
            *inputs, lengths, settings, settings.soft_cap
        )
    output = output.reshape(rows, sequences * tokens, groups * queries, head)
    output = jnp.take_along_axis(output, row_slots[..., None, None], axis=1)
    return output.reshape(rows, length, groups, queries, head)


def _fused_attention(
    query: Array,
    key: Array,
    value: Array,
    lengths: Array,
    settings: AttentionSettings,
) -> Array:
    short = query.dtype in (jnp.bfloat16, jnp.float16)
    on_gpu = jax.default_backend() == "gpu"
    window = settings.window
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=settings.scale,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=(window - 1, 0) if window else None,
        # cuDNN supports 16-bit inputs only.
        implementation="cudnn" if on_gpu and short else "xla",
    )


def _capped_attention(
    query: Array,
    key: Array,
    value: Array,
    lengths: Array,
    settings: AttentionSettings,
    cap: float,
) -> Array:
    """Attention with a soft cap, which `dot_product_attention` lacks."""
    rows, tokens, heads, head = query.shape
    groups = key.shape[2]
    query = query.reshape(rows, tokens, groups, heads // groups, head)
    scores = _dot("btgqh,bsgh->bgqts", query, key) * settings.scale
    scores = jnp.tanh(scores / cap) * cap
    place = jnp.arange(tokens)
    back = place[:, None] - place
    visible = back >= 0
    if settings.window:
        visible = visible & (back < settings.window)
    visible = visible & (place < lengths[:, None, None])
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    output = _dot("bgqts,bsgh->btgqh", weights, value)
    return output.astype(value.dtype).reshape(rows, tokens, heads, head)
