"""The splash kernel against scores written out; without a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keras_dpo.scoring import packed_backbone
from keras_dpo.scoring.row_attention import (
    AttentionSettings,
    attend_in_sequences,
)
from keras_dpo.scoring.splash_attention import splash_attention

SEQUENCES, TOKENS, HEADS, GROUPS, HEAD = 3, 192, 4, 2, 64
LENGTHS = np.array([192, 130, 5])


def arrays():
    random = np.random.default_rng(0)
    shapes = [(SEQUENCES, TOKENS, n, HEAD) for n in (HEADS, GROUPS, GROUPS)]
    made = [random.standard_normal(shape) for shape in shapes]
    made.append(random.standard_normal(shapes[0]))
    return [jnp.asarray(array, "float32") for array in made]


def written_out(query, key, value, window, soft_cap):
    key, value = (
        jnp.repeat(array, HEADS // GROUPS, axis=2) for array in (key, value)
    )
    scores = 0.3 * jnp.einsum("bthd,bshd->bhts", query, key)
    if soft_cap:
        scores = jnp.tanh(scores / soft_cap) * soft_cap
    place = np.arange(TOKENS)
    back = place[:, None] - place
    seen = (back >= 0) & (back < (window or TOKENS))
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return jnp.einsum("bhts,bshd->bthd", weights, value)


@pytest.mark.parametrize(
    ("window", "soft_cap"), [(0, None), (100, None), (0, 2.0), (100, 2.0)]
)
def test_values_and_gradients(window, soft_cap):
    *inputs, direction = arrays()
    inside = jnp.asarray(np.arange(TOKENS) < LENGTHS[:, None])[..., None, None]

    def total(function):
        def run(*inputs):
            output = jnp.where(inside, function(*inputs), 0.0)
            return jnp.sum(output * direction), output

        return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))

    def ours(*inputs):
        return splash_attention(
            *inputs, jnp.asarray(LENGTHS), 0.3, window, soft_cap, True
        )

    (_, found), gradients = total(ours)(*inputs)
    (_, expected), wanted = total(
        lambda *inputs: written_out(*inputs, window, soft_cap)
    )(*inputs)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_it_lowers_for_a_tpu():
    """In 16 bits, both ways, and without an array of scores."""
    rows, length = 2, 2 * TOKENS
    query, key = (
        jax.ShapeDtypeStruct((rows, length, GROUPS, *rest, HEAD), "bfloat16")
        for rest in ((HEADS // GROUPS,), ())
    )

    def integers(*shape):
        return jax.ShapeDtypeStruct(shape, "int32")

    def total(query, key, value, *places):
        settings = AttentionSettings(0.3, 100, 2.0)
        output = attend_in_sequences(query, key, value, *places, settings, True)
        return jnp.sum(output.astype("float32"))

    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(
        query,
        key,
        key,
        integers(rows, 2, TOKENS),
        integers(rows, length),
        integers(rows, 2),
    )
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3
    assert f"{TOKENS}x{TOKENS}" not in text


def test_a_tpu_takes_it_where_heads_are_whole(monkeypatch):
    assert not packed_backbone._attends_by_splash()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert packed_backbone._attends_by_splash()
