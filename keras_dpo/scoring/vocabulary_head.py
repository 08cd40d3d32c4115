"""Log-probabilities of targets, from hidden states and output embedding."""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
from jax import lax

from keras_dpo.distribution.processes import over_rows
from keras_dpo.scoring.flat_products import transposed, transposes_before
from keras_dpo.utils.arrays import round_up

Array = jax.Array
# Limits of a chunk: its tokens, and its logits (256 MiB of float32).
CHUNK_TOKENS = 256
CHUNK_LOGITS = 2**26


class TokenStatistics(NamedTuple):
    """Statistics of each target token, from one pass over the vocabulary.

    All are `(..., tokens)`, float32. The optional ones are None unless
    requested; only `log_probs` carries a gradient.
    """

    log_probs: Array
    entropy: Array | None = None
    mean_logit: Array | None = None
    top1_hit: Array | None = None
    log_sum_squared_probs: Array | None = None


@dataclasses.dataclass(frozen=True)
class Head:
    """An output embedding's settings.

    Args:
        tied: Whether the kernel is `(vocabulary, hidden)`, else the reverse.
        dtype: Dtype of the product's inputs; it accumulates in float32.
        soft_cap: Bound on the logits, by tanh; None for none.
        trained: Whether the kernel needs a gradient.
    """

    tied: bool
    dtype: str
    soft_cap: float | None = None
    trained: bool = True

    def logits(self, hidden: Array, kernel: Array) -> Array:
        """Logits of hidden states, `(..., vocabulary)`, float32.

        Rounding them to bfloat16 would shift a log-probability by up to 0.2
        nats.
        """
        equation = "...h,vh->...v" if self.tied else "...h,hv->...v"
        return self._product(equation, hidden, kernel)

    def logits_by_word(self, hidden: Array, kernel: Array) -> Array:
        """Logits of `(tokens, hidden)`, transposed to `(vocabulary, tokens)`.

        Sums over the vocabulary then run along whole rows: on CPU the product
        is as fast, and a log-sum-exp five times as fast.
        """
        equation = "vh,th->vt" if self.tied else "hv,th->vt"
        return self._product(equation, kernel, hidden)

    def _product(self, equation: str, left: Array, right: Array) -> Array:
        logits = jnp.einsum(
            equation,
            left.astype(self.dtype),
            right.astype(self.dtype),
            preferred_element_type="float32",
        )
        if self.soft_cap is None:
            return logits
        return jnp.tanh(logits / self.soft_cap) * self.soft_cap


def read_head(
    embedding: keras.layers.ReversibleEmbedding,
) -> tuple[Head, Array]:
    """Settings and kernel of an embedding that is not quantized."""
    dtype = embedding.reverse_dtype or embedding.compute_dtype
    if dtype == "float16":
        # XLA has no float16 product that accumulates in float32 on CPU.
        dtype = "float32"
    tied = embedding.tie_weights
    kernel = embedding.embeddings if tied else embedding.reverse_embeddings
    head = Head(
        tied,
        dtype,
        embedding.logit_soft_cap,
        trained=bool(embedding.trainable_variables),
    )
    return head, keras.ops.convert_to_tensor(kernel)


def head_logits(
    embedding: keras.layers.ReversibleEmbedding, hidden: Array
) -> Array:
    """Logits of hidden states, `(..., vocabulary)`, float32."""
    if embedding.quantization_mode is not None:
        return embedding(hidden, reverse=True).astype("float32")
    head, kernel = read_head(embedding)
    return head.logits(hidden, kernel)


def token_statistics(
    logits: Array,
    targets: Array,
    wanted: Collection[str] = (),
    axis: int = -1,
) -> TokenStatistics:
    """Log-probabilities of `targets` and other statistics of `logits`.

    Args:
        logits: `(..., tokens, vocabulary)`, float32.
        targets: `(..., tokens)`, int32.
        wanted: Names of further fields of `TokenStatistics` to fill.
        axis: Axis of the vocabulary.
    """
    log_z = jax.nn.logsumexp(logits, axis=axis, keepdims=True)
    index = jnp.expand_dims(targets, axis)
    target = jnp.take_along_axis(logits, index, axis=axis)
    log_probs = jnp.squeeze(target - log_z, axis)
    statistics = TokenStatistics(log_probs=log_probs)
    fixed, fixed_z = lax.stop_gradient((logits, log_z))
    sums = functools.partial(jnp.sum, axis=axis)
    if "entropy" in wanted:
        log_p = fixed - fixed_z
        statistics = statistics._replace(entropy=-sums(jnp.exp(log_p) * log_p))
    if "mean_logit" in wanted:
        statistics = statistics._replace(mean_logit=jnp.mean(fixed, axis=axis))
    if "top1_hit" in wanted:
        hit = (jnp.argmax(fixed, axis=axis) == targets).astype("float32")
        statistics = statistics._replace(top1_hit=hit)
    if "log_sum_squared_probs" in wanted:
        squares = jnp.log(sums(jnp.exp(2.0 * (fixed - fixed_z))))
        statistics = statistics._replace(log_sum_squared_probs=squares)
    return statistics


# --- Chunks of tokens: no array of tokens x vocabulary beyond one chunk ----


def chunked_statistics(
    embedding: keras.layers.ReversibleEmbedding,
    hidden: Array,
    targets: Array,
    counts: Array,
    wanted: Collection[str] = (),
) -> TokenStatistics:
    """`token_statistics` of rows of hidden states, a chunk at a time.

    Only chunks that hold tokens are computed; statistics beyond them are 0.

    Args:
        embedding: The output embedding.
        hidden: `(rows, tokens, hidden)`.
        targets: `(rows, tokens)`, int32.
        counts: `(rows,)`, number of leading tokens of each row that count.
        wanted: Names of further fields of `TokenStatistics` to fill.
    """
    fields = tuple(name for name in TokenStatistics._fields if name in wanted)
    if embedding.quantization_mode is not None:
        return _rematerialized_statistics(embedding, hidden, targets, fields)
    head, kernel = read_head(embedding)

    def rows(kernel: Array, *inputs: Array) -> tuple[Array, ...]:
        def one(inputs: Any) -> tuple[Array, ...]:
            return _chunked(kernel, *inputs, head, fields)

        if inputs[0].shape[0] == 1:
            found = one([x[0] for x in inputs])
            return tuple(x[None] for x in found)
        return lax.map(one, inputs)

    found = over_rows(rows, num_shared=1)(kernel, hidden, targets, counts)
    names = ("log_probs", *fields)
    return TokenStatistics(**dict(zip(names, found, strict=True)))


def chunk_size(tokens: int, vocabulary: int) -> int:
    """Tokens per chunk."""
    return min(tokens, CHUNK_TOKENS, max(CHUNK_LOGITS // vocabulary, 64))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(
    kernel: Array,
    hidden: Array,
    targets: Array,
    count: Array,
    head: Head,
    fields: tuple[str, ...],
) -> tuple[Array, ...]:
    """Log-probs of one row's targets, then `fields`; each `(tokens,)`."""
    inputs = kernel, hidden, targets, count
    return _over_chunks(*inputs, head, fields, with_slopes=False)[0]


def _over_chunks(
    kernel: Array,
    hidden: Array,
    targets: Array,
    count: Array,
    head: Head,
    fields: tuple[str, ...],
    with_slopes: bool,
) -> tuple[tuple[Array, ...], Array]:
    """Statistics, and d log_prob / d hidden `(tokens, hidden)` if requested."""
    tokens = hidden.shape[0]
    size = chunk_size(tokens, kernel.shape[0 if head.tied else 1])
    padded = round_up(tokens, size)
    hidden = jnp.pad(hidden, ((0, padded - tokens), (0, 0)))
    targets = jnp.pad(targets, (0, padded - tokens))
    names = ("log_probs", *fields)
    kernel = kernel.astype(head.dtype)
    turned = _laid_out(head, kernel) if with_slopes else kernel

    def chunk(n: Array, carry: Any) -> Any:
        outputs, slopes = carry
        wanted = _chunk(targets, n, size)
        logits = head.logits_by_word(_chunk(hidden, n, size), kernel)
        found = token_statistics(logits, wanted, fields, axis=0)
        outputs = tuple(
            _put(output, getattr(found, name), n, size)
            for name, output in zip(names, outputs, strict=True)
        )
        if with_slopes:
            d_logits = _d_logits(head, logits, wanted, found.log_probs)
            slopes = _put(slopes, _d_states(head, d_logits, turned), n, size)
        return outputs, slopes

    outputs, slopes = lax.fori_loop(
        0,
        -(-count // size),
        chunk,
        (
            tuple(jnp.zeros(padded, "float32") for _ in names),
            jnp.zeros(hidden.shape if with_slopes else 0, hidden.dtype),
        ),
    )
    return tuple(output[:tokens] for output in outputs), slopes[:tokens]


def _chunked_forward(
    kernel: Array,
    hidden: Array,
    targets: Array,
    count: Array,
    head: Head,
    fields: tuple[str, ...],
) -> tuple[tuple[Array, ...], Any]:
    # A frozen kernel needs no second pass over the vocabulary: the slope of
    # every log-prob is known before the loss is.
    inputs = kernel, hidden, targets, count
    outputs, slopes = _over_chunks(
        *inputs, head, fields, with_slopes=not head.trained
    )
    if not head.trained:
        inputs = kernel, slopes, targets, count
    return outputs, (*inputs, outputs[0])


def _chunked_backward(
    head: Head, fields: tuple[str, ...], kept: Any, gradients: Any
) -> Any:
    """Gradient of the log-probs, from recomputed logits."""
    del fields
    kernel, hidden, targets, count, log_probs = kept
    gradient = gradients[0]
    if not head.trained:
        d_hidden = (gradient[:, None] * hidden).astype(hidden.dtype)
        return jnp.zeros_like(kernel), d_hidden, None, None
    tokens = len(gradient)
    size = chunk_size(tokens, kernel.shape[0 if head.tied else 1])
    end = round_up(tokens, size) - tokens
    hidden = jnp.pad(hidden, ((0, end), (0, 0)))
    targets, log_probs, gradient = (
        jnp.pad(array, (0, end)) for array in (targets, log_probs, gradient)
    )

    # Cast once, before the loop over chunks.
    operand = kernel.astype(head.dtype)
    turned = _laid_out(head, operand)

    def chunk(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_hidden, d_kernel = carry
        states = _chunk(hidden, n, size)
        logits = head.logits_by_word(states, operand)
        d_logits = _d_logits(
            head, logits, _chunk(targets, n, size), _chunk(log_probs, n, size)
        )
        d_logits = _chunk(gradient, n, size) * d_logits
        d_kernel = d_kernel + jnp.einsum(
            "vt,th->vh" if head.tied else "vt,th->hv",
            d_logits.astype(head.dtype),
            states.astype(head.dtype),
            preferred_element_type="float32",
        )
        d_states = _d_states(head, d_logits, turned)
        return _put(d_hidden, d_states, n, size), d_kernel

    d_hidden, d_kernel = lax.fori_loop(
        0,
        -(-count // size),
        chunk,
        (jnp.zeros_like(hidden), jnp.zeros(kernel.shape, "float32")),
    )
    return d_kernel.astype(kernel.dtype), d_hidden[:tokens], None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _d_logits(
    head: Head, logits: Array, targets: Array, log_probs: Array
) -> Array:
    """d log_prob / d logits = onehot(target) - softmax, `(vocab, tokens)`."""
    places = jnp.arange(len(targets))
    log_z = logits[targets, places] - log_probs
    slope = -jnp.exp(logits - log_z)
    slope = slope.at[targets, places].add(1.0)
    if head.soft_cap is not None:
        slope = slope * (1.0 - (logits / head.soft_cap) ** 2)
    return slope


def _laid_out(head: Head, kernel: Array) -> Array:
    """The kernel in the layout that `_d_states` reads."""
    return transposed(kernel) if _is_transposed_first(head) else kernel


def _is_transposed_first(head: Head) -> bool:
    return head.tied and transposes_before(head.dtype)


def _d_states(head: Head, d_logits: Array, kernel: Array) -> Array:
    """Gradient of the states, `(tokens, hidden)`, in the head's dtype."""
    # Otherwise a tied kernel is read in place, vocabulary first.
    first = head.tied and not _is_transposed_first(head)
    found = jnp.einsum(
        "vh,vt->ht" if first else "hv,vt->ht",
        kernel,
        d_logits.astype(head.dtype),
        preferred_element_type="float32",
    )
    return transposed(found.astype(head.dtype))


def _chunk(array: Array, n: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(array, n * size, size)


def _put(array: Array, chunk: Array, n: Array, size: int) -> Array:
    chunk = chunk.astype(array.dtype)
    return lax.dynamic_update_slice_in_dim(array, chunk, n * size, 0)


def _rematerialized_statistics(
    embedding: keras.layers.ReversibleEmbedding,
    hidden: Array,
    targets: Array,
    fields: tuple[str, ...],
) -> TokenStatistics:
    """Statistics with a quantized embedding, through the layer itself."""
    rows, tokens, width = hidden.shape
    size = chunk_size(rows * tokens, embedding.input_dim)
    padded = round_up(rows * tokens, size) - rows * tokens
    hidden = jnp.pad(hidden.reshape(-1, width), ((0, padded), (0, 0)))
    targets = jnp.pad(targets.reshape(-1), (0, padded))

    @jax.checkpoint
    def chunk(inputs: tuple[Array, Array]) -> TokenStatistics:
        logits = head_logits(embedding, inputs[0])
        return token_statistics(logits, inputs[1], fields)

    found = lax.map(
        chunk,
        (hidden.reshape(-1, size, width), targets.reshape(-1, size)),
    )
    return jax.tree.map(
        lambda a: a.reshape(-1)[: rows * tokens].reshape(rows, tokens), found
    )
