"""The chunked head against the whole product."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from keras_dpo.scoring import vocabulary_head
from keras_dpo.scoring.vocabulary_head import (
    chunked_statistics,
    head_logits,
    token_statistics,
)

VOCABULARY, HIDDEN, TOKENS = 50, 8, 40
FIELDS = ("entropy", "mean_logit", "top1_hit", "log_sum_squared_probs")


def embedding(tied=True, cap=None, trainable=True, dtype="float32"):
    keras.utils.set_random_seed(3)
    layer = keras.layers.ReversibleEmbedding(
        VOCABULARY,
        HIDDEN,
        tie_weights=tied,
        logit_soft_cap=cap,
        dtype=dtype,
        embeddings_initializer="normal",
    )
    layer.build()
    random = np.random.default_rng(0)
    for v in layer.variables:
        v.assign(random.standard_normal(v.shape))
    layer.trainable = trainable
    return layer


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(vocabulary_head, "CHUNK_TOKENS", 16)


def inputs(rows=2, dtype="float32"):
    random = np.random.default_rng(1)
    hidden = random.standard_normal((rows, TOKENS, HIDDEN))
    targets = random.integers(0, VOCABULARY, (rows, TOKENS))
    counts = np.array([TOKENS - 7, 17][:rows], "int32")
    return jnp.asarray(hidden, dtype), jnp.asarray(targets), counts


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("trainable", [True, False])
def test_values_and_gradients(small_chunks, tied, cap, trainable):
    """Of hidden states and kernel, with counts inside a chunk."""
    layer = embedding(tied, cap, trainable)
    hidden, targets, counts = inputs()
    counted = np.arange(TOKENS) < counts[:, None]
    weights = jnp.asarray(np.sin(np.arange(2 * TOKENS)).reshape(2, -1))
    values = [v.value for v in layer.variables]

    def chunked(values, hidden):
        mapping = list(zip(layer.variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            found = chunked_statistics(layer, hidden, targets, counts, FIELDS)
        return jnp.sum(found.log_probs * weights * counted), found

    def whole(values, hidden):
        mapping = list(zip(layer.variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            found = token_statistics(
                head_logits(layer, hidden), targets, FIELDS
            )
        return jnp.sum(found.log_probs * weights * counted), found

    run = [
        jax.jit(jax.grad(f, (0, 1), has_aux=True))(values, hidden)
        for f in (chunked, whole)
    ]
    for name in ("log_probs", *FIELDS):
        ours, theirs = (getattr(r[1], name) for r in run)
        np.testing.assert_allclose(
            ours * counted, theirs * counted, atol=2e-5, err_msg=name
        )
    (ours, our_hidden), (theirs, their_hidden) = run[0][0], run[1][0]
    np.testing.assert_allclose(our_hidden, their_hidden, atol=2e-5)
    if trainable:
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=5e-5)


def test_sixteen_bit_inputs_accumulate_in_float32(small_chunks):
    layer = embedding(dtype="mixed_bfloat16")
    hidden, targets, counts = inputs(dtype="bfloat16")
    found = chunked_statistics(layer, hidden, targets, counts).log_probs
    kernel = np.asarray(layer.embeddings.value.astype("bfloat16"), "float64")
    logits = np.asarray(hidden, "float64") @ kernel.T
    log_z = np.log(np.exp(logits).sum(-1))
    expected = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)
    expected = expected[..., 0] - log_z
    for row, count in enumerate(counts):
        np.testing.assert_allclose(
            found[row, :count], expected[row, :count], atol=1e-4
        )


@pytest.mark.slow
def test_a_quantized_embedding_goes_through_its_layer(small_chunks):
    layer = embedding(trainable=False)
    layer.quantize("int8")
    hidden, targets, counts = inputs()
    found = chunked_statistics(layer, hidden, targets, counts, FIELDS)
    expected = token_statistics(head_logits(layer, hidden), targets, FIELDS)
    for name in ("log_probs", *FIELDS):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), atol=2e-5
        )


@pytest.mark.parametrize("trainable", [True, False])
def test_nothing_is_as_large_as_tokens_times_vocabulary(trainable):
    """Gemma3-270M's head at 8 x 1024 tokens: compiled, not run.

    Peak memory beyond the kernel and its gradient is some chunks, where the
    logits alone would be 8 GiB.
    """
    vocabulary, hidden, tokens = 262_144, 640, 8 * 1024
    layer = keras.layers.ReversibleEmbedding(16, 4)
    layer.build()
    layer.trainable = trainable
    head = vocabulary_head.read_head(layer)[0]

    def loss(kernel, states, targets, count):
        log_probs = vocabulary_head._chunked(
            kernel, states, targets, count, head, ()
        )[0]
        return jnp.sum(log_probs)

    specs = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((vocabulary, hidden), "float32"),
            ((tokens, hidden), "float32"),
            ((tokens,), "int32"),
            ((), "int32"),
        )
    ]
    wanted = (0, 1) if trainable else 1
    step = jax.jit(jax.grad(loss, wanted)).lower(*specs).compile()
    temporary = step.memory_analysis().temp_size_in_bytes
    chunk = 4 * vocabulary * vocabulary_head.chunk_size(tokens, vocabulary)
    gradient = 4 * vocabulary * hidden
    assert temporary < 3 * chunk + 2 * gradient * trainable + 2**28
    assert temporary < 4 * vocabulary * tokens / 3
