"""Attention of whole sequences by JAX' splash kernel, for TPU.

It stores no scores, and supports sliding windows and soft caps. Without a TPU
it is tested in Pallas' interpreter, and lowered for one.
"""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
# The kernel needs tokens and head sizes in multiples of it.
LANES = 128


def splash_attention(
    query: Array,
    key: Array,
    value: Array,
    lengths: Array,
    scale: float,
    window: int = 0,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> Array:
    """Causal attention, `(sequences, tokens, heads, head)`.

    Args:
        query: `(sequences, tokens, heads, head)`.
        key: `(sequences, tokens, groups, head)`.
        value: `(sequences, tokens, groups, head)`.
        lengths: `(sequences,)`, tokens of each.
        scale: Factor on the scores.
        window: Size of the sliding window, in tokens; 0 for none.
        soft_cap: Bound on the scores, by tanh.
        interpret: Whether to run in Pallas' interpreter: slow, needs no TPU.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    sequences, tokens, heads, head = query.shape
    groups = key.shape[2]
    length = -(-tokens // LANES) * LANES

    def prepare(array: Array) -> Array:
        # Zeros add nothing to scores, and are sliced off the output.
        padding = [(0, 0), (0, length - tokens), (0, 0), (0, -head % LANES)]
        return jnp.transpose(jnp.pad(array, padding), (0, 2, 1, 3))

    mask: Any = splash.CausalMask((length, length))
    if window:
        mask = splash.LocalMask((length, length), (window - 1, 0), 0)
    kernel = splash.make_splash_mqa_single_device(
        mask=splash.MultiHeadMask([mask] * (heads // groups)),
        attn_logits_soft_cap=soft_cap,
        interpret=interpret,
    )
    # Padding attends to padding, so that no token attends to nothing.
    is_padding = jnp.arange(length) >= lengths[:, None]
    kinds = splash.SegmentIds(*[is_padding.astype("int32")] * 2)
    query = prepare(query * scale)
    query = query.reshape(sequences, groups, heads // groups, *query.shape[2:])
    over_groups = jax.vmap(kernel, (0, 0, 0, None))
    output = jax.vmap(over_groups)(query, prepare(key), prepare(value), kinds)
    output = output.reshape(sequences, heads, length, -1)
    return jnp.transpose(output, (0, 2, 1, 3))[:, :tokens, :, :head]
