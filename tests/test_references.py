"""References: snapshot, model, stored, none; and the sync."""

import keras
import numpy as np
import pytest
from conftest import random_pairs, tiny_policy, values_of
from test_packed_backbone import batches, gradient_of

from keras_dpo import DPOModel, PreferenceDataset
from keras_dpo.callbacks import ReferenceSync
from keras_dpo.references.kinds import NoReference, SnapshotReference


def data(pairs=None, batch_size=4, **options):
    return PreferenceDataset(
        pairs or random_pairs(8),
        batch_size=batch_size,
        verbose=False,
        buckets=[32],
        **options,
    )


def lora_policy(rank=2, trained=False, biases=False):
    policy = tiny_policy()
    policy.backbone.enable_lora(rank)
    if trained:
        random = np.random.default_rng(3)
        for variable in policy.trainable_variables:
            variable.assign(0.1 * random.standard_normal(variable.shape))
    return policy


def fitted(
    policy,
    reference="initial",
    epochs=2,
    callbacks=(),
    rate=0.5,
    pairs=None,
    **options,
):
    model = DPOModel(policy, reference=reference)
    model.compile(optimizer=keras.optimizers.SGD(rate), **options)
    model.fit(
        data(pairs, shuffle=False),
        epochs=epochs,
        verbose=0,
        callbacks=list(callbacks),
    )
    return model


def test_snapshot_equals_a_frozen_copy():
    """Training against the snapshot is training against another model with
    the same weights."""
    weights = [
        values_of(fitted(tiny_policy(), reference).trainable_variables)
        for reference in ("initial", tiny_policy())
    ]
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_lora_snapshot_equals_a_frozen_copy(trained):
    """Also where LoRA starts from trained adapters: the reference is the
    policy as it was, not its base."""
    weights = [
        values_of(
            fitted(lora_policy(trained=trained), reference).trainable_variables
        )
        for reference in ("initial", lora_policy(trained=trained))
    ]
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_lora_with_trainable_biases():
    """GPT-2's LoRA leaves query and value biases trainable."""
    import keras_hub

    def gpt2():
        keras.utils.set_random_seed(0)
        backbone = keras_hub.models.GPT2Backbone(
            vocabulary_size=64,
            num_layers=1,
            num_heads=2,
            hidden_dim=16,
            intermediate_dim=32,
            max_sequence_length=64,
            dropout=0.0,
        )
        backbone.enable_lora(2)
        return keras_hub.models.GPT2CausalLM(
            backbone=backbone, preprocessor=None
        )

    policy = gpt2()
    assert any("bias" in v.path for v in policy.trainable_variables)
    models = [fitted(policy), fitted(gpt2(), gpt2())]
    for a, b in zip(
        *(values_of(m.trainable_variables) for m in models), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_lora_snapshot_holds_the_adapters_alone():
    model = fitted(lora_policy(), epochs=1)
    snapshot = sum(v.value.nbytes for v in model.reference.snapshot)
    adapters = sum(v.value.nbytes for v in model.trainable_variables)
    base = sum(v.value.nbytes for v in model.policy.weights)
    assert snapshot == adapters < 0.1 * base
    assert f"{snapshot / 2**20:.1f} MiB" in model.reference.describe()


def test_reference_model_stays_to_the_bit_whatever_is_set_trainable():
    reference = tiny_policy(seed=5)
    before = values_of(reference.weights)
    model = DPOModel(tiny_policy(), reference=reference)
    model.trainable = True
    model.compile(optimizer=keras.optimizers.SGD(0.5))
    model.fit(data(), verbose=0)
    for a, b in zip(before, values_of(reference.weights), strict=True):
        np.testing.assert_array_equal(a, b)


def test_precomputed_equals_online():
    """Stored log-probs of the same reference give the same weights."""
    pairs = random_pairs(8)
    model = DPOModel(tiny_policy())
    scores = model.predict(data(pairs, shuffle=False), verbose=0)
    stored = [
        {
            **pair,
            "reference_chosen_log_prob": float(chosen),
            "reference_rejected_log_prob": float(rejected),
        }
        for pair, chosen, rejected in zip(
            pairs,
            scores["reference_chosen_log_prob"],
            scores["reference_rejected_log_prob"],
            strict=True,
        )
    ]
    runs = [
        fitted(tiny_policy(), "initial", pairs=pairs),
        fitted(tiny_policy(), "precomputed", pairs=stored),
        fitted(tiny_policy(), "precomputed", pairs=pairs),  # by itself
    ]
    for other in runs[1:]:
        assert not other.reference.variables
        for a, b in zip(
            values_of(runs[0].trainable_variables),
            values_of(other.trainable_variables),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_precomputing_with_a_trained_policy_is_refused():
    model = fitted(tiny_policy(), "precomputed", epochs=1)
    with pytest.raises(ValueError, match="has not been trained|not been"):
        model.fit(data(random_pairs(4, seed=9)), verbose=0)


def test_stored_sums_and_ld_alpha():
    pairs = [
        {
            **p,
            "reference_chosen_log_prob": -1.0,
            "reference_rejected_log_prob": -2.0,
        }
        for p in random_pairs(4)
    ]
    from keras_dpo import losses

    with pytest.raises(ValueError, match="every token"):
        fitted(
            tiny_policy(),
            "precomputed",
            pairs=pairs,
            loss=losses.Sigmoid(ld_alpha=0.5),
        )
    pairs[1].pop("reference_chosen_log_prob")
    with pytest.raises(ValueError, match="Row 1, field 'reference_chosen_log"):
        data(pairs)
    pairs[1].pop("reference_rejected_log_prob")
    with pytest.raises(ValueError, match="none for row 1"):
        data(pairs)


def test_reference_free_builds_and_runs_nothing():
    """No reference variable, and one forward pass in the compiled step."""
    import jax

    def calls(reference, loss):
        model = DPOModel(tiny_policy(), reference=reference)
        model.compile(loss=loss)
        batch = data()[0]
        count = []
        plain = model.policy.backbone.call

        def counted(*args, **kwargs):
            count.append(1)
            return plain(*args, **kwargs)

        model.policy.backbone.call = counted
        state = model._get_jax_state(True, True, True, True)
        jax.eval_shape(model.train_step, state, batch)
        assert bool(model.reference.variables) == (
            isinstance(model.reference, SnapshotReference)
        )
        return len(count), model

    assert calls("initial", "sigmoid")[0] == 2
    for reference, loss in ((None, "sigmoid"), ("initial", "simpo")):
        number, model = calls(reference, loss)
        assert number == 1
        assert isinstance(model.reference, NoReference)


@pytest.mark.slow
def test_no_reference_rewards_are_the_policy_s_own():
    model = fitted(tiny_policy(), None, epochs=1)
    scores = model.predict(data(), verbose=0)
    np.testing.assert_allclose(
        scores["chosen_reward"], 0.1 * scores["chosen_log_prob"], rtol=1e-5
    )
    assert "reference_chosen_log_prob" not in scores


# --- Sync -------------------------------------------------------------------


class Trace(keras.callbacks.Callback):
    """Policy and reference after every step."""

    def __init__(self):
        super().__init__()
        self.states = []

    def on_train_batch_end(self, batch, logs=None):
        model = self.model
        self.states.append(
            (
                values_of(model.trainable_variables),
                values_of(model.reference.snapshot),
            )
        )


@pytest.mark.parametrize("make", [tiny_policy, lora_policy])
def test_sync_mixes_after_every_n_steps(make):
    """6 steps, every 3, alpha 0.6: unchanged but after steps 3 and 6."""
    trace = Trace()
    policy = make()
    start = values_of(policy.trainable_variables)
    fitted(
        policy, epochs=3, callbacks=[ReferenceSync(every=3, alpha=0.6), trace]
    )
    expected = start
    assert len(trace.states) == 6
    for step, (policy_values, reference_values) in enumerate(trace.states, 1):
        if step % 3 == 0:
            expected = [
                0.6 * p + 0.4 * r
                for p, r in zip(policy_values, expected, strict=True)
            ]
        for a, b in zip(reference_values, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_sync_of_a_reference_model():
    reference = tiny_policy(seed=5)
    model = fitted(
        tiny_policy(),
        reference,
        epochs=1,
        callbacks=[ReferenceSync(every=2, alpha=1.0)],
    )
    for a, b in zip(
        values_of(reference.weights),
        values_of(model.policy.weights),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_sync_counts_updates_under_keras_accumulation():
    policy = tiny_policy()
    model = DPOModel(policy)
    model.compile(
        optimizer=keras.optimizers.SGD(0.5, gradient_accumulation_steps=2)
    )
    trace = Trace()
    model.fit(
        data(shuffle=False),
        epochs=2,
        verbose=0,
        callbacks=[ReferenceSync(every=2, alpha=1.0), trace],
    )
    moved = [
        any(
            (a != b).any()
            for a, b in zip(state[1], trace.states[0][1], strict=True)
        )
        for state in trace.states
    ]
    assert moved == [False, False, False, True]


def test_sync_mistakes():
    for reference in ("precomputed", None):
        with pytest.raises(ValueError, match="synced|sync"):
            fitted(tiny_policy(), reference, callbacks=[ReferenceSync()])
    with pytest.raises(ValueError, match="alpha"):
        ReferenceSync(alpha=0.0)
    with pytest.raises(ValueError, match="every"):
        ReferenceSync(every=0)


def test_reference_mistakes():
    policy = tiny_policy()
    with pytest.raises(ValueError, match="not be the policy itself"):
        DPOModel(policy, reference=policy)
    import keras_hub

    sharing = keras_hub.models.Llama3CausalLM(policy.backbone, None)
    with pytest.raises(ValueError, match="share variables"):
        DPOModel(policy, reference=sharing)
    small = keras_hub.models.Llama3CausalLM(
        keras_hub.models.Llama3Backbone(
            vocabulary_size=32,
            num_layers=1,
            num_query_heads=2,
            num_key_value_heads=1,
            hidden_dim=8,
            intermediate_dim=8,
        ),
        None,
    )
    with pytest.raises(ValueError, match="same vocabulary"):
        DPOModel(policy, reference=small)
    with pytest.raises(ValueError, match="must be 'initial'"):
        DPOModel(policy, reference="frozen")


def test_initial_snapshot_after_training_elsewhere_is_refused():
    policy = tiny_policy()
    model = DPOModel(policy)
    other = DPOModel(policy)
    other.compile(optimizer=keras.optimizers.SGD(0.1))
    other.fit(data(), verbose=0)
    with pytest.raises(ValueError, match="initial weights are gone"):
        model.compile()


@pytest.mark.slow
def test_a_sixteen_bit_snapshot_is_half_the_memory():
    """And its log-probs are those of the rounded weights."""
    exact, halved = (
        DPOModel(tiny_policy(), snapshot_dtype=dtype)
        for dtype in (None, "bfloat16")
    )
    records = random_pairs(6)
    scores = []
    for model in (exact, halved):
        model.compile()
        scores.append(model.predict(records, batch_size=3, verbose=0))
    sizes = [
        sum(v.value.nbytes for v in model.reference.snapshot)
        for model in (exact, halved)
    ]
    assert sizes[1] * 2 == sizes[0]
    rounded = tiny_policy()
    for v in rounded.trainable_variables:
        v.assign(np.asarray(v.value.astype("bfloat16"), "float32"))
    model = DPOModel(rounded)
    model.compile()
    expected = model.predict(records, batch_size=3, verbose=0)
    np.testing.assert_allclose(
        scores[1]["reference_chosen_log_prob"],
        expected["reference_chosen_log_prob"],
        atol=1e-4,
    )
    assert np.abs(scores[1]["chosen_reward"]).max() > 0
    with pytest.raises(ValueError, match="snapshot_dtype"):
        DPOModel(tiny_policy(), reference=None, snapshot_dtype="bfloat16")


@pytest.mark.slow
def test_an_int8_base_is_scored_and_not_trained():
    """Log-probs are close; gradients point elsewhere, in Keras' own path too.

    The day the cosine is near 1, Keras is mended and the refusal can go.
    """
    gradients, scores = [], []
    for quantized in (False, True):
        policy = tiny_policy()
        if quantized:
            policy.backbone.quantize("int8")
        policy.backbone.enable_lora(4)
        random = np.random.default_rng(5)
        for v in policy.trainable_variables:
            v.assign(0.1 * random.standard_normal(v.shape))
        padded, rows = batches(policy, {})
        found, log_probs = gradient_of(policy)(rows)
        gradients.append(np.concatenate([np.ravel(g) for g in found]))
        scores.append(log_probs)
    np.testing.assert_allclose(scores[1], scores[0], atol=0.1)
    exact, rounded = gradients
    cosine = exact @ rounded / np.linalg.norm(exact) / np.linalg.norm(rounded)
    assert cosine < 0.5
    plain, _ = gradient_of(policy)(padded)
    plain = np.concatenate([np.ravel(g) for g in plain])
    np.testing.assert_allclose(rounded, plain, atol=1e-3)
    model = DPOModel(policy)
    model.compile()
    assert np.isfinite(model.evaluate(random_pairs(4), verbose=0)[0])
    with pytest.raises(ValueError, match="quantized to int8"):
        model.fit(random_pairs(4), verbose=0)
