"""Token log-probs against the whole CausalLM, for every proven family."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from conftest import ROOT, VOCABULARY, random_pairs, tiny_policy

from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.scoring.execution import (
    PACKED_FAMILIES,
    SPLIT_FAMILIES,
    Execution,
    can_split_head,
)
from keras_dpo.scoring.log_probs import completion_mask, completion_statistics
from keras_dpo.scoring.vocabulary_head import token_statistics

COMMON = {"vocabulary_size": VOCABULARY, "num_layers": 2}
GROUPED = {
    **COMMON,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 32,
    "intermediate_dim": 48,
}
GEMMA = {**GROUPED, "head_dim": 8}
PLAIN = {
    **COMMON,
    "num_heads": 4,
    "hidden_dim": 32,
    "intermediate_dim": 48,
    "max_sequence_length": 64,
}
BLOOM = {k: v for k, v in PLAIN.items() if k != "max_sequence_length"}
MIXTRAL = {**GROUPED, "num_experts": 4, "top_k": 2}
# Case -> (family, backbone arguments)
FAMILIES = {
    "Bloom": ("Bloom", BLOOM),
    "Falcon": (
        "Falcon",
        {
            "vocabulary_size": VOCABULARY,
            "num_layers": 2,
            "num_attention_heads": 4,
            "hidden_dim": 32,
            "intermediate_dim": 128,
        },
    ),
    "Gemma": ("Gemma", {**GEMMA, "intermediate_dim": 48}),
    "Gemma2, soft caps, sliding window": (
        "Gemma",
        {
            **GEMMA,
            "query_head_dim_normalize": False,
            "use_post_ffw_norm": True,
            "use_post_attention_norm": True,
            "final_logit_soft_cap": 30.0,
            "attention_logit_soft_cap": 50.0,
            "use_sliding_window_attention": True,
            "sliding_window_size": 4,
        },
    ),
    "Gemma3, sliding window": (
        "Gemma3",
        {
            **GEMMA,
            "image_size": 16,
            "sliding_window_size": 4,
            "use_sliding_window_attention": True,
            "use_query_key_norm": True,
            "vision_encoder": None,
        },
    ),
    "GPT-2": ("GPT2", PLAIN),
    "GPT-NeoX": ("GPTNeoX", PLAIN),
    "Llama, untied": ("Llama", GROUPED),
    "Llama3, tied": ("Llama3", {**GROUPED, "tie_word_embeddings": True}),
    "Llama3, untied": ("Llama3", GROUPED),
    "Mistral, sliding window": ("Mistral", {**GROUPED, "sliding_window": 4}),
    "Mixtral": ("Mixtral", MIXTRAL),
    "OPT": ("OPT", PLAIN),
    "Phi3": ("Phi3", GROUPED),
    "Qwen2, tied": ("Qwen", {**GROUPED, "tie_word_embeddings": True}),
    "Qwen2, untied": ("Qwen", {**GROUPED, "tie_word_embeddings": False}),
    "Qwen3, tied": ("Qwen3", {**GEMMA, "tie_word_embeddings": True}),
    "Qwen3, untied": ("Qwen3", {**GEMMA, "tie_word_embeddings": False}),
    "SmolLM3": (
        "SmolLM3",
        {
            "vocabulary_size": VOCABULARY,
            "hidden_dim": 32,
            "intermediate_dim": 48,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rope_layer_enabled_list": [True, False],
            "layer_types": ["full_attention", "full_attention"],
            "mlp_bias": False,
            "layer_norm_epsilon": 1e-6,
            "max_position_embeddings": 64,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
        },
    ),
}
TABLE = ROOT / "docs" / "families.md"


def make(case):
    import keras_hub

    family, arguments = FAMILIES[case]
    models = keras_hub.models
    backbone = getattr(models, f"{family}Backbone")(**arguments)
    policy = getattr(models, f"{family}CausalLM")(
        backbone=backbone, preprocessor=None
    )
    random = np.random.default_rng(0)
    for variable in policy.trainable_variables:
        noise = 0.2 * random.standard_normal(variable.shape)
        variable.assign(np.asarray(variable) + noise)
    return policy


def one_batch(pairs=3):
    dataset = PreferenceDataset(
        random_pairs(pairs), batch_size=pairs, verbose=False, buckets=[32]
    )
    return jax.tree.map(jnp.asarray, dataset[0])


@pytest.mark.parametrize("case", list(FAMILIES))
def test_split_head_equals_the_whole_model(case):
    """Values and gradients, with two lengths of padding."""
    policy = make(case)
    assert can_split_head(policy)
    batch = one_batch()
    mask = completion_mask(batch)

    def total(values, split_head):
        mapping = zip(policy.trainable_variables, values, strict=True)
        with keras.StatelessScope(state_mapping=list(mapping)):
            log_probs = completion_statistics(
                policy, batch, Execution(split_head=split_head)
            ).log_probs
        return jnp.sum(log_probs * mask), log_probs * mask

    values = [v.value for v in policy.trainable_variables]
    run = jax.jit(jax.grad(total, has_aux=True), static_argnames="split_head")
    gradients, split = run(values, split_head=True)
    plain_gradients, plain = run(values, split_head=False)
    assert np.abs(plain).max() > 0.5
    np.testing.assert_allclose(split, plain, atol=1e-5)
    for ours, theirs in zip(gradients, plain_gradients, strict=True):
        scale = np.abs(theirs).max() + 1e-3
        np.testing.assert_allclose(ours, theirs, atol=2e-4 * scale)


def test_table_in_the_docs():
    """`docs/families.md` is written from this file; rerun to renew it."""
    rows = [
        f"| {case} | `{family}CausalLM` | "
        f"{'yes' if family in PACKED_FAMILIES else 'no'} |"
        for case, (family, _) in FAMILIES.items()
    ]
    text = "\n".join(
        [
            "# Families whose vocabulary head is split off",
            "",
            "Proven by `tests/test_log_probs.py::"
            "test_split_head_equals_the_whole_model`: completion log-probs "
            "and all gradients equal the whole CausalLM's. Any other CausalLM, "
            "or any Keras model that gives logits, takes the plain path. A "
            "mixture-of-experts model's router loss is not added.",
            "",
            "Families with a yes run in packed rows: each prompt once, no "
            "padding, attention without stored scores; proven by "
            "`tests/test_packed_backbone.py::"
            "test_rows_equal_the_plain_path`. The others run on padded "
            "sequences, and so do these where attention dropout is on and "
            "where Phi3's long-context scaling is used.",
            "",
            "| case | class | rows |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
    proven = {family for family, _ in FAMILIES.values()}
    assert proven == set(SPLIT_FAMILIES)
    assert TABLE.read_text() == text, f"write this to {TABLE}:\n{text}"


def test_any_keras_model_gives_log_probs():
    """A model from ids to logits, against a softmax written out."""
    ids = keras.Input((None,), dtype="int32", name="token_ids")
    mask = keras.Input((None,), dtype="int32", name="padding_mask")
    hidden = keras.layers.Embedding(VOCABULARY, 8)(ids)
    logits = keras.layers.Dense(VOCABULARY)(hidden)
    model = keras.Model({"token_ids": ids, "padding_mask": mask}, logits)
    assert not can_split_head(model)
    pairs = random_pairs(2)
    dataset = PreferenceDataset(
        pairs, batch_size=2, shuffle=False, verbose=False
    )
    batch = dataset[0]
    found = completion_statistics(
        model, batch, Execution(split_head=False)
    ).log_probs
    for row, pair in enumerate(pairs):
        for side, name in enumerate(("chosen_ids", "rejected_ids")):
            whole = pair["prompt_ids"] + pair[name]
            inputs = np.array([whole])
            out = np.asarray(
                model({"token_ids": inputs, "padding_mask": inputs * 0 + 1}),
                "float64",
            )[0]
            log_z = np.log(np.exp(out).sum(-1))
            start = len(pair["prompt_ids"])
            expected = [
                out[t - 1, whole[t]] - log_z[t - 1]
                for t in range(start, len(whole))
            ]
            np.testing.assert_allclose(
                found[row, side, : len(expected)], expected, atol=1e-5
            )


def test_statistics_against_float64():
    random = np.random.default_rng(0)
    logits = 3 * random.standard_normal((4, 5, 11))
    targets = random.integers(0, 11, (4, 5))
    wanted = ["entropy", "mean_logit", "top1_hit", "log_sum_squared_probs"]
    found = token_statistics(jnp.asarray(logits, "float32"), targets, wanted)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picked = np.take_along_axis(probs, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(found.log_probs, np.log(picked), atol=1e-5)
    np.testing.assert_allclose(
        found.entropy, -(probs * np.log(probs)).sum(-1), atol=1e-5
    )
    np.testing.assert_allclose(found.mean_logit, logits.mean(-1), atol=1e-5)
    np.testing.assert_allclose(found.top1_hit, logits.argmax(-1) == targets)
    np.testing.assert_allclose(
        found.log_sum_squared_probs, np.log((probs**2).sum(-1)), atol=1e-5
    )


def test_a_pad_id_inside_the_completion_is_scored():
    """Masks come from lengths: id 0, the padding value, is a token too."""
    policy = tiny_policy()
    pairs = [
        {"prompt_ids": [5, 6], "chosen_ids": [0, 0, 7], "rejected_ids": [8, 0]}
    ]
    dataset = PreferenceDataset(pairs, batch_size=1, verbose=False)
    mask = completion_mask(dataset[0])
    assert mask.sum(-1).tolist() == [[3.0, 2.0]]
    log_probs = completion_statistics(policy, dataset[0]).log_probs
    assert (np.asarray(log_probs)[0, 0, :3] < 0).all()


@pytest.mark.slow
def test_other_padding_gives_the_same_scores():
    policy = tiny_policy()
    pairs = random_pairs(4)
    sums = []
    for bucket in (32, 128):
        dataset = PreferenceDataset(
            pairs, batch_size=4, shuffle=False, buckets=[bucket], verbose=False
        )
        batch = dataset[0]
        log_probs = completion_statistics(policy, batch).log_probs
        sums.append((log_probs * completion_mask(batch)).sum(-1))
    np.testing.assert_allclose(*sums, atol=1e-4)


@pytest.mark.slow
def test_mixed_precision_scores_in_float32():
    """bfloat16 logits would be 0.1 nats off; the float32 product is not."""
    policy = tiny_policy(dtype="mixed_bfloat16")
    batch = one_batch()
    found = completion_statistics(policy, batch).log_probs
    assert found.dtype == "float32"
    exact = tiny_policy()
    expected = completion_statistics(exact, batch).log_probs
    error = np.abs((found - expected) * completion_mask(batch)).max()
    assert error < 0.15
