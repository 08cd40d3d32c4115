"""Products of bfloat16 as XLA's CPU backend runs them best."""

import os

import jax
import jax.numpy as jnp
import keras
import keras_hub
import numpy as np
import pytest
from conftest import random_pairs
from test_log_probs import make
from test_packed_backbone import CASES

from keras_dpo import DPOModel, Execution
from keras_dpo.compat.compilation import compiler_options
from keras_dpo.scoring.flat_products import product, transposed

# By hand: KERAS_DPO_ALL_FAMILIES=1.
FAMILIES = ["Gemma2, soft caps, sliding window"]
if os.environ.get("KERAS_DPO_ALL_FAMILIES"):
    FAMILIES = CASES


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_and_their_gradients_equal_float64(dtype):
    """Rounded once: sums are float32 of either type."""
    random = np.random.default_rng(0)
    inputs, kernel, gradient = (
        jnp.asarray(random.standard_normal(shape), dtype)
        for shape in ((64, 96), (96, 160), (64, 160))
    )

    def run(inputs, kernel, gradient):
        output, backward = jax.vjp(product, inputs, kernel)
        return output, *backward(gradient)

    options = compiler_options(dtype)
    found = jax.jit(run, compiler_options=options)(inputs, kernel, gradient)
    x, w, g = (np.asarray(a, "float64") for a in (inputs, kernel, gradient))
    tolerance = {"float32": 1e-6, "bfloat16": 2**-8}[dtype]
    for ours, expected in zip(found, (x @ w, g @ w.T, x.T @ g), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(ours, "float64"), expected, rtol=tolerance, atol=1e-4
        )


@pytest.mark.parametrize("shape", [(64, 96), (33, 5), (32, 7)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transposed(shape, dtype):
    matrix = jnp.arange(np.prod(shape), dtype=dtype).reshape(shape)
    np.testing.assert_array_equal(jax.jit(transposed)(matrix), matrix.T)


def run_family(case, dtype, **options):
    """Log-probs of pairs, then two epochs' losses."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        policy = make(case)
    finally:
        keras.config.set_dtype_policy(before)
    model = DPOModel(policy, **options)
    model.compile(keras.optimizers.SGD(1e-3))
    pairs = random_pairs(32, longest=20)
    scores = model.predict(pairs, batch_size=8, verbose=0)
    losses = model.fit(
        pairs, batch_size=8, epochs=2, verbose=0, shuffle=False
    ).history["loss"]
    log_probs = [scores[f"{x}_log_prob"] for x in ("chosen", "rejected")]
    return np.array(log_probs), np.array(losses)


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.slow
def test_rows_of_bfloat16_are_as_exact_as_the_plain_path(case):
    """And train: XLA refuses a product that it transposed too late."""
    exact, losses = run_family(case, "float32")
    errors = {}
    for name, options in (
        ("rows", {}),
        ("plain", {"execution": Execution(attention="keras")}),
    ):
        log_probs, found = run_family(case, "mixed_bfloat16", **options)
        errors[name] = np.sqrt(np.mean((log_probs - exact) ** 2))
        np.testing.assert_allclose(found, losses, atol=0.05)
    assert 0 < errors["rows"] < 1.5 * errors["plain"]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.slow
def test_sizes_that_no_tile_divides(lora):
    """Of vocabulary and hidden states, where XLA would refuse a product."""
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=67,
        num_layers=1,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=40,
        intermediate_dim=72,
        tie_word_embeddings=True,
        dtype="mixed_bfloat16",
    )
    policy = keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)
    if lora:
        backbone.enable_lora(2)
    model = DPOModel(policy)
    model.compile(keras.optimizers.SGD(1e-2))
    losses = model.fit(
        random_pairs(8), batch_size=4, epochs=2, verbose=0
    ).history["loss"]
    assert losses[1] < losses[0] < np.log(2) + 1e-3


def test_a_kernel_s_gradient_is_a_product_of_bfloat16():
    """The plain transpose becomes part of a product of float32: half as fast.

    Where it does not any more, `transposed` can go.
    """

    def dots(transpose):
        def d_kernel(inputs, gradient):
            return jnp.einsum(
                "ft,tu->fu",
                transpose(inputs),
                gradient,
                preferred_element_type="float32",
            )

        inputs, gradient = jnp.ones((64, 96), "bfloat16"), jnp.ones((64, 32))
        step = jax.jit(d_kernel, compiler_options=compiler_options("bfloat16"))
        text = step.lower(inputs, gradient.astype("bfloat16")).compile()
        return [x for x in text.as_text().splitlines() if " dot(" in x]

    if "avx512_bf16" not in open("/proc/cpuinfo").read():
        pytest.skip("this CPU has no products of bfloat16")
    (plain,), (ours,) = dots(jnp.transpose), dots(transposed)
    assert "lhs_contracting_dims={0}" in plain
    assert "lhs_contracting_dims={1}" in ours
