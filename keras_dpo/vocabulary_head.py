"""Hidden states x output embedding -> log-probabilities of the targets."""

from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import keras

Array = jax.Array


class TokenStatistics(NamedTuple):
    """What one pass over the vocabulary says about each target token.

    All are `(..., tokens)`, float32; the optional ones are None unless asked
    for, and carry no gradient except `log_probs`.
    """

    log_probs: Array
    entropy: Array | None = None
    mean_logit: Array | None = None
    top1_hit: Array | None = None
    log_sum_squared_probs: Array | None = None


def head_logits(
    embedding: keras.layers.ReversibleEmbedding, hidden: Array
) -> Array:
    """Logits of hidden states, `(..., vocabulary)`, float32.

    The product of 16-bit inputs accumulates in float32: logits rounded to
    bfloat16 put a log-probability up to 0.2 nats off.
    """
    if embedding.quantization_mode is not None:
        return embedding(hidden, reverse=True).astype("float32")
    if embedding.tie_weights:
        kernel = jnp.transpose(
            keras.ops.convert_to_tensor(embedding.embeddings)
        )
    else:
        kernel = keras.ops.convert_to_tensor(embedding.reverse_embeddings)
    dtype = embedding.reverse_dtype or embedding.compute_dtype
    if dtype == "float16":
        # XLA has no float16 product that accumulates in float32 on CPU.
        dtype = "float32"
    logits = jnp.matmul(
        hidden.astype(dtype),
        kernel.astype(dtype),
        preferred_element_type="float32",
    )
    cap = embedding.logit_soft_cap
    return logits if cap is None else jnp.tanh(logits / cap) * cap


def token_statistics(
    logits: Array, targets: Array, wanted: Collection[str] = ()
) -> TokenStatistics:
    """Log-probabilities of `targets` under float32 `logits`, and more.

    Args:
        logits: `(..., tokens, vocabulary)`, float32.
        targets: `(..., tokens)`, int32.
        wanted: Names of further fields of `TokenStatistics` to fill.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    statistics = TokenStatistics(log_probs=target - log_z)
    fixed, fixed_z = jax.lax.stop_gradient((logits, log_z))
    if "entropy" in wanted:
        probs = jax.nn.softmax(fixed, axis=-1)
        statistics = statistics._replace(
            entropy=fixed_z - jnp.sum(probs * fixed, axis=-1)
        )
    if "mean_logit" in wanted:
        statistics = statistics._replace(mean_logit=jnp.mean(fixed, axis=-1))
    if "top1_hit" in wanted:
        hit = (jnp.argmax(fixed, axis=-1) == targets).astype("float32")
        statistics = statistics._replace(top1_hit=hit)
    if "log_sum_squared_probs" in wanted:
        squares = jax.nn.logsumexp(2.0 * fixed, axis=-1) - 2.0 * fixed_z
        statistics = statistics._replace(log_sum_squared_probs=squares)
    return statistics
