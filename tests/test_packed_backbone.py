"""Packed rows through Keras-Hub's layers equal the plain path, by family."""

import inspect

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from conftest import ROOT, random_pairs, tiny_policy
from test_log_probs import FAMILIES, make

from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.data.packing import Packing
from keras_dpo.scoring.execution import PACKED_FAMILIES, Execution
from keras_dpo.scoring.log_probs import completion_mask, completion_statistics
from keras_dpo.scoring.packed_backbone import layer_settings

CASES = [case for case in FAMILIES if FAMILIES[case][0] in PACKED_FAMILIES]
LAYOUTS = {
    "rows": {},
    "prompts apart": {"share_prompt": False},
    "a row per pair": {"pack": False},
    "whole sequences": {"sequence_length": 64},
}


def batches(policy, layout, pairs=5):
    """The same pairs padded, and in rows."""
    dataset = PreferenceDataset(
        random_pairs(pairs, longest=25),
        batch_size=pairs,
        verbose=False,
        shuffle=False,
        buckets=[64],
    )
    longest = dataset.longest_sequence
    windows = {s.window for s in layer_settings(policy.backbone)}
    packing = Packing(
        windows=tuple(sorted({w if w < longest else 0 for w in windows})),
        **layout,
    )
    packed = dataset.packed(packing)
    order = packed.batch_indices(0)
    return dataset.make_batch(order), packed.make_batch(order)


def gradient_of(policy, split_head=True, remat="none"):
    values = [v.value for v in policy.trainable_variables]

    def total(values, batch):
        mapping = zip(policy.trainable_variables, values, strict=True)
        with keras.StatelessScope(state_mapping=list(mapping)):
            log_probs = completion_statistics(
                policy, batch, Execution(split_head=split_head, remat=remat)
            ).log_probs
        log_probs = log_probs * completion_mask(
            jax.tree.map(jnp.asarray, batch)
        )
        weights = jnp.cos(jnp.arange(log_probs.size)).reshape(log_probs.shape)
        return jnp.sum(log_probs * weights), log_probs

    run = jax.jit(jax.grad(total, has_aux=True))
    return lambda batch: run(values, batch)


def assert_same(found, expected):
    gradients, log_probs = found
    plain_gradients, plain = expected
    assert np.abs(plain).max() > 0.5
    np.testing.assert_allclose(log_probs, plain, atol=1e-5)
    largest = max(np.abs(g).max() for g in plain_gradients)
    for ours, theirs in zip(gradients, plain_gradients, strict=True):
        # A key's bias has no gradient: its noise is not compared to itself.
        scale = max(np.abs(theirs).max(), 0.1 * largest)
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale)


@pytest.mark.parametrize("case", CASES)
def test_rows_equal_the_plain_path(case):
    """Log-probs and all gradients, to 1e-5 of the largest."""
    policy = make(case)
    plain, rows = batches(policy, {})
    expected = gradient_of(policy, split_head=False)(plain)
    assert_same(gradient_of(policy)(rows), expected)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(
    "case",
    ["Llama3, tied", "Gemma2, soft caps, sliding window", "SmolLM3"],
)
@pytest.mark.slow
def test_every_layout_equals_the_plain_path(case, layout):
    policy = make(case)
    plain, rows = batches(policy, LAYOUTS[layout])
    expected = gradient_of(policy, split_head=False)(plain)
    assert_same(gradient_of(policy)(rows), expected)


@pytest.mark.parametrize("in_rows", [True, False])
@pytest.mark.slow
def test_layers_computed_again_give_the_same(in_rows):
    policy = tiny_policy()
    batch = batches(policy, {})[in_rows]
    assert_same(
        gradient_of(policy, remat="layers")(batch), gradient_of(policy)(batch)
    )


def test_rope_scaling_is_right_in_rows():
    """Llama 3.1's frequencies, at positions where they differ."""
    import keras_hub

    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=64,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=32,
        intermediate_dim=48,
        rope_frequency_adjustment_factor=8.0,
        rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0,
        rope_pretraining_sequence_length=16,
    )
    policy = keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)
    plain, rows = batches(policy, {})
    expected = gradient_of(policy, split_head=False)(plain)
    assert_same(gradient_of(policy)(rows), expected)


def test_every_layer_s_attention_is_ours():
    """As many calls as layers, with the family's own settings."""
    settings = layer_settings(
        make("Gemma2, soft caps, sliding window").backbone
    )
    assert len(settings) == 2
    assert {s.soft_cap for s in settings} == {50.0}
    # Gemma 2 slides in every other layer.
    assert sorted(s.window for s in settings) == [0, 4]


def test_what_we_reach_into_is_there():
    """Tells when Keras-Hub's way in, or what is patched, changes."""
    from keras_hub.src.models.phi3.phi3_attention import Phi3Attention
    from keras_hub.src.models.smollm3.smollm3_layers import SmolLM3Attention
    from keras_hub.src.vllm import attention, context

    assert list(
        inspect.signature(attention.vllm_paged_attention).parameters
    ) == [
        "query",
        "key",
        "value",
        "scale",
        "num_kv_heads",
        "sliding_window",
        "soft_cap",
    ]
    assert list(inspect.signature(context.vllm_context_scope).parameters)[
        :2
    ] == ["paged_attention_func", "positions"]
    for layer in (Phi3Attention, SmolLM3Attention):
        source = inspect.getsource(layer.call)
        assert "self._compute_attention" in source
        # The day these read the context, the patch can go.
        assert "vllm" not in inspect.getsource(layer)


def test_table_in_the_docs():
    """`docs/families.md` says which families run in rows."""
    text = (ROOT / "docs" / "families.md").read_text()
    for case in FAMILIES:
        line = next(x for x in text.splitlines() if x.startswith(f"| {case} |"))
        assert line.endswith("| yes |") == (case in CASES), case
