"""DPOModel: steps, accumulation, failure, dropout, self-check."""

import json
import os

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from chat_tokenizer import make_chat_tokenizer
from conftest import ORACLE, ROOT, random_pairs, tiny_policy, values_of

import keras_dpo
from keras_dpo import DPOModel, Execution, PreferenceDataset, losses
from keras_dpo.training.checks import check_first_batch, steps_done
from keras_dpo.training.preparation import prepare

LN2 = float(np.log(2))


def dataset(count=8, batch_size=4, **options):
    options.setdefault("buckets", [32])
    return PreferenceDataset(
        random_pairs(count), batch_size=batch_size, verbose=False, **options
    )


def compiled(
    policy=None, loss="sigmoid", rate=0.1, attention="auto", **options
):
    execution = Execution(attention=attention)
    model = DPOModel(policy or tiny_policy(), execution=execution)
    model.compile(optimizer=keras.optimizers.SGD(rate), loss=loss, **options)
    return model


class Recorder(keras.callbacks.Callback):
    """The logs of every step."""

    def __init__(self):
        super().__init__()
        self.logs = []

    def on_train_batch_end(self, batch, logs=None):
        self.logs.append({k: float(v) for k, v in logs.items()})


# --- Against TRL ------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle_models():
    import keras_hub

    return [
        keras_hub.models.CausalLM.from_preset(
            str(ORACLE / name), dtype="float32", preprocessor=None
        )
        for name in ("tiny_llama", "tiny_llama_ref")
    ]


def test_log_probs_and_metrics_equal_trl(oracle_models, batch_oracle):
    policy, reference = oracle_models
    model = DPOModel(policy, reference=reference)
    wanted = ["entropy", "chosen_logit", "rejected_logit", "token_accuracy"]
    model.compile(loss=losses.Sigmoid(beta=0.1), metrics=wanted)
    data = PreferenceDataset(
        batch_oracle["pairs"], batch_size=3, verbose=False, shuffle=False
    )
    scores = model.predict(data, verbose=0)
    for name in (
        "chosen_log_prob",
        "rejected_log_prob",
        "reference_chosen_log_prob",
        "reference_rejected_log_prob",
    ):
        np.testing.assert_allclose(
            scores[name], batch_oracle[name], rtol=1e-5, err_msg=name
        )
    found = model.evaluate(data, return_dict=True, verbose=0)
    theirs = batch_oracle["sigmoid_beta_0.1"]
    assert found["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    metrics = theirs["metrics"]
    for name, key in {
        "chosen_reward": "rewards/chosen",
        "rejected_reward": "rewards/rejected",
        "reward_accuracy": "rewards/accuracies",
        "reward_margin": "rewards/margins",
        "chosen_log_prob": "logps/chosen",
        "rejected_log_prob": "logps/rejected",
        "chosen_logit": "logits/chosen",
        "rejected_logit": "logits/rejected",
        "entropy": "entropy",
        "token_accuracy": "mean_token_accuracy",
    }.items():
        assert found[name] == pytest.approx(metrics[key], rel=1e-3, abs=3e-6)


FIVE_STEPS = json.loads(
    (ROOT / "tests" / "trl" / "five_steps.json").read_text()
)["cases"]


@pytest.mark.parametrize("name", list(FIVE_STEPS))
def test_five_sgd_steps_equal_trl(name, batch_oracle):
    """Same weights, pairs and rate: the same five losses to 1e-4."""
    import keras_hub

    case = dict(FIVE_STEPS[name])
    expected, rate = case.pop("losses"), case.pop("rate")
    policy, reference = (
        keras_hub.models.CausalLM.from_preset(
            str(ORACLE / x), dtype="float32", preprocessor=None
        )
        for x in ("tiny_llama", "tiny_llama_ref")
    )
    model = DPOModel(policy, reference=reference)
    model.compile(
        optimizer=keras.optimizers.SGD(rate),
        loss=losses.get(name, beta=0.1, **case),
    )
    data = PreferenceDataset(batch_oracle["pairs"], batch_size=8, verbose=False)
    found = model.fit(data, epochs=5, verbose=0).history["loss"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    if name == "sigmoid":
        theirs = batch_oracle["sgd_0.5_five_steps_loss"]
        np.testing.assert_allclose(found, theirs, rtol=1e-4)


def test_gradient_norm_equals_trl(oracle_models, batch_oracle):
    """One SGD step of rate 1 moves the weights by the gradient."""
    policy, reference = oracle_models
    start = values_of(policy.trainable_variables)
    model = DPOModel(policy, reference=reference)
    model.compile(optimizer=keras.optimizers.SGD(1.0))
    data = PreferenceDataset(batch_oracle["pairs"], batch_size=8, verbose=False)
    model.fit(data, verbose=0)
    moved = values_of(policy.trainable_variables)
    norm = np.sqrt(
        sum(((a - b) ** 2).sum() for a, b in zip(start, moved, strict=True))
    )
    assert norm == pytest.approx(
        batch_oracle["sigmoid_beta_0.1"]["grad_norm"], rel=1e-4
    )
    for variable, value in zip(policy.trainable_variables, start, strict=True):
        variable.assign(value)


# --- Steps ------------------------------------------------------------------


def test_step_zero_is_ln_2_and_rewards_are_zero():
    model = compiled()
    found = model.evaluate(dataset(), return_dict=True, verbose=0)
    assert found["loss"] == pytest.approx(LN2, abs=1e-6)
    assert found["reward_margin"] == 0.0
    assert found["reward_accuracy"] == 0.5


def test_fit_lowers_the_loss_and_the_reference_stays_to_the_bit():
    model = compiled(rate=1.0)
    before = values_of(model.reference.snapshot)
    history = model.fit(dataset(), epochs=5, verbose=0).history
    assert history["loss"][-1] < 0.5 < history["loss"][0]
    assert history["reward_accuracy"][-1] == 1.0
    for a, b in zip(before, model.reference.snapshot, strict=True):
        np.testing.assert_array_equal(a, np.array(b.value))


# By hand: KERAS_DPO_ALL_LOSSES=1.
ACCUMULATED = ["sigmoid", "ipo", "bco_pair", "sigmoid_norm", "orpo"]
if os.environ.get("KERAS_DPO_ALL_LOSSES"):
    ACCUMULATED = [
        n for n in losses.LOSSES if not losses.LOSSES[n].couples_pairs
    ]


@pytest.mark.parametrize("loss", ACCUMULATED)
def test_accumulation_equals_the_large_batch(loss):
    """4 micro-batches of 2 equal one batch of 8, weights included.

    On padded sequences, which compile sooner; rows: test_fast_paths.py.
    """
    pairs = random_pairs(7)  # one row fills up the batch
    pairs[2]["weight"], pairs[5]["weight"] = 0.5, 3.0
    results = []
    for steps in (1, 4):
        model = compiled(
            tiny_policy(layers=1),
            loss,
            rate=1e-2,
            attention="keras",
            gradient_accumulation_steps=steps,
        )
        data = PreferenceDataset(
            pairs, batch_size=8, verbose=False, buckets=[32]
        )
        logs = model.fit(data, epochs=1, verbose=0).history
        assert int(model.optimizer.iterations.value) == 1
        results.append((values_of(model.trainable_variables), logs))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 + 1e-5 * np.abs(a).max())
    for name, value in results[0][1].items():
        assert results[1][1][name] == pytest.approx(value, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_accumulation_memory_follows_the_micro_batch():
    """Temporary memory of the compiled step, as XLA plans it."""

    def temporary(steps):
        model = compiled(gradient_accumulation_steps=steps)
        batch = jax.tree.map(jnp.asarray, dataset(64, 64, buckets=[64])[0])
        state = model._get_jax_state(True, True, True, True)
        step = jax.jit(model.train_step).lower(state, batch).compile()
        return step.memory_analysis().temp_size_in_bytes

    assert temporary(8) < 0.35 * temporary(1)


def test_schedule_counts_updates_not_micro_batches():
    schedule = keras_dpo.runs.schedules.WarmupThenDecay(1e-2, 4)
    model = DPOModel(tiny_policy())
    model.compile(
        optimizer=keras.optimizers.SGD(schedule), gradient_accumulation_steps=4
    )
    model.fit(dataset(16, 8), epochs=2, verbose=0)
    assert int(model.optimizer.iterations.value) == 4
    assert float(model.optimizer.learning_rate) == pytest.approx(0.0, abs=1e-8)


@pytest.mark.slow
def test_metrics_of_a_short_last_batch():
    """7 pairs in batches of 4 give the means of all 7."""
    model = compiled(rate=0.5)
    model.fit(dataset(), epochs=2, verbose=0)
    pairs = random_pairs(7, seed=5)
    means = []
    for size in (4, 7):
        data = PreferenceDataset(
            pairs, batch_size=size, verbose=False, buckets=[32]
        )
        means.append(model.evaluate(data, return_dict=True, verbose=0))
    assert means[0] == pytest.approx(means[1], rel=1e-4, abs=1e-6)
    scores = model.predict(data, verbose=0)
    assert means[0]["reward_margin"] == pytest.approx(
        scores["reward_margin"].mean(), rel=1e-4
    )


@pytest.mark.parametrize("name", ["beta_dpo", "bco_pair"])
def test_a_running_mean_over_micro_batches_equals_float64(name):
    """Micro-batches of a short batch that hold no pair do not move it.

    10 pairs in batches of 8 and micro-batches of 2: those of the second batch
    are strided, {8}, {9}, {} and {}. (Padded sequences keep the data's order.)
    """
    ema = {"delta": "ema"} if name == "bco_pair" else {}
    model = DPOModel(
        tiny_policy(),
        reference=tiny_policy(seed=1),
        execution=Execution(attention="keras"),
    )
    loss = losses.get(name, beta=0.7, momentum=0.8, **ema)
    model.compile(
        keras.optimizers.SGD(0.0), loss, gradient_accumulation_steps=4
    )
    data = dataset(10, 8, shuffle=False)
    scores = model.predict(data, verbose=0)
    chosen, rejected = (
        np.asarray(scores[f"{side}_reward"], "float64")
        for side in ("chosen", "rejected")
    )
    values = chosen - rejected
    if name == "bco_pair":
        values = (chosen + rejected) / 2
    mean = 0.0
    for micro_batch in [[0, 4], [1, 5], [2, 6], [3, 7], [8], [9]]:
        mean = 0.8 * mean + 0.2 * values[micro_batch].mean()
    model.fit(data, verbose=0)
    assert float(loss.running_mean.value) == pytest.approx(mean, rel=1e-4)


def test_validation_set_with_its_own_batch_size():
    """6 pairs in batches of 2: as `predict` scores them, one by one."""
    model = compiled()
    history = model.fit(
        random_pairs(8),
        batch_size=4,
        validation_data=dataset(6, 2),
        verbose=0,
    ).history
    margins = model.predict(random_pairs(6), batch_size=4, verbose=0)[
        "reward_margin"
    ]
    assert np.abs(margins).min() > 1e-6
    assert history["val_reward_accuracy"] == [
        pytest.approx((margins > 0).mean(), abs=1e-6)
    ]
    assert history["val_reward_margin"] == [
        pytest.approx(margins.mean(), rel=1e-4)
    ]
    with pytest.raises(ValueError, match="already has a batch size"):
        compiled().fit(dataset(8, 4), batch_size=2, verbose=0)


@pytest.mark.slow
def test_weight_two_is_the_pair_twice_and_zero_is_its_absence():
    pairs = random_pairs(3)
    cases = [
        ([{**pairs[0], "weight": 2.0}, *pairs[1:]], [pairs[0], *pairs]),
        ([{**pairs[0], "weight": 0.0}, *pairs[1:]], pairs[1:]),
    ]
    for weighted, plain in cases:
        weights = []
        for rows in (weighted, plain):
            model = compiled(tiny_policy())
            data = PreferenceDataset(
                rows, batch_size=4, verbose=False, buckets=[32]
            )
            model.fit(data, verbose=0)
            weights.append(values_of(model.trainable_variables))
        for a, b in zip(*weights, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_predict_is_in_input_order():
    pairs = random_pairs(9, longest=40)
    model = compiled()
    scores = model.predict(pairs, batch_size=4, verbose=0)
    alone = [
        model.predict([pair], batch_size=4, verbose=0)["chosen_log_prob"][0]
        for pair in pairs
    ]
    np.testing.assert_allclose(scores["chosen_log_prob"], alone, rtol=1e-4)


def test_predict_marks_dropped_pairs():
    pairs = random_pairs(3)
    pairs[1]["rejected_ids"] = pairs[1]["chosen_ids"]
    scores = compiled().predict(pairs, batch_size=2, verbose=0)
    assert np.isnan(scores["chosen_reward"]).tolist() == [False, True, False]


def test_evaluate_inside_fit_leaves_training_metrics_alone():
    data = dataset(16, 4, shuffle=False)

    class Evaluate(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                self.model.evaluate(dataset(4), verbose=0)

    results = [
        compiled().fit(data, verbose=0, callbacks=callbacks).history
        for callbacks in ([], [Evaluate()])
    ]
    for name, values in results[0].items():
        assert values == pytest.approx(results[1][name], rel=1e-5)


def test_batch_logs_can_be_read_by_any_keras_callback():
    recorder = Recorder()
    stop = keras.callbacks.EarlyStopping("val_reward_accuracy", mode="max")
    compiled().fit(
        dataset(),
        validation_data=dataset(4),
        epochs=2,
        verbose=0,
        callbacks=[recorder, stop, keras.callbacks.TerminateOnNaN()],
    )
    assert recorder.logs[0]["loss"] == pytest.approx(LN2, abs=1e-6)


def test_compilations_are_the_buckets_in_use():
    data = PreferenceDataset(
        random_pairs(40, longest=60), batch_size=4, verbose=False
    )
    assert len(data.shapes) > 1
    model = compiled()
    traces = []
    plain = model.train_step

    def counted(state, batch):
        traces.append(batch["row_ids"].shape)
        return plain(state, batch)

    model.train_step = counted
    model.fit(data, epochs=3, verbose=0)
    assert len(traces) == len(set(traces)) <= len(data.shapes)


# --- Failure ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
def test_a_failing_first_batch_leaves_the_weights(method):
    model = compiled()
    before = values_of(model.variables)

    def fail(*_):
        raise RuntimeError("broken on purpose")

    model.train_step = model.test_step = model.predict_step = fail
    with pytest.raises(RuntimeError, match="on purpose"):
        getattr(model, method)(dataset(), verbose=0)
    for a, b in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(a, np.array(b.value))


def test_keras_still_purges():
    """When this fails, `_purge_model_variables` can go."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(loss="mse")

    def fail(*_):
        raise RuntimeError("broken on purpose")

    model.train_step = fail
    with pytest.raises(RuntimeError, match="on purpose"):
        model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
    assert model.trainable_variables[0]._value is None


def test_self_check_finds_a_policy_that_moved():
    policy = tiny_policy()
    model = compiled(policy)
    policy.trainable_variables[1].assign_add(
        0.1 * np.ones(policy.trainable_variables[1].shape)
    )
    before = values_of(policy.variables)
    with pytest.raises(ValueError, match="policy and reference must agree"):
        model.fit(dataset(), verbose=0)
    for a, b in zip(before, policy.variables, strict=True):
        np.testing.assert_array_equal(a, np.array(b.value))


def test_self_check_passes_for_every_loss():
    policy = tiny_policy(layers=1)
    for name in losses.LOSSES:
        model = compiled(policy, name)
        train = prepare(model, dataset(4))
        check_first_batch(model, train.make_batch(train.batch_indices(0)))


# --- Dropout, dtype ---------------------------------------------------------


@pytest.mark.slow
def test_dropout_is_off_unless_asked_for():
    def first_losses(disable):
        found = []
        for _ in range(2):
            keras.utils.set_random_seed(len(found))
            policy = tiny_policy(dropout=0.5, seed=0)
            model = DPOModel(policy, disable_dropout=disable)
            model.compile(optimizer=keras.optimizers.SGD(0.1))
            recorder = Recorder()
            keras.utils.set_random_seed(7 + len(found))
            for layer in policy._flatten_layers():
                seeds = getattr(layer, "seed_generator", None)
                if seeds is not None:
                    seeds.state.assign([len(found), 1])
            model.fit(dataset(), verbose=0, callbacks=[recorder])
            found.append([log["loss"] for log in recorder.logs])
        return found

    first, second = first_losses(True)
    assert first == second
    assert first[0] == pytest.approx(LN2, abs=1e-6)
    first, second = first_losses(False)
    assert first != second
    assert abs(first[0] - LN2) > 1e-4


def test_sixteen_bit_trainable_variables_are_refused():
    policy = tiny_policy(dtype="bfloat16")
    with pytest.raises(ValueError, match="mixed_bfloat16"):
        DPOModel(policy).compile()


@pytest.mark.slow
def test_mixed_bfloat16_trains():
    model = DPOModel(tiny_policy(dtype="mixed_bfloat16"))
    model.compile(optimizer=keras.optimizers.Adam(1e-3))
    before = values_of(model.trainable_variables)
    history = model.fit(dataset(), epochs=4, verbose=0).history
    assert history["loss"][-1] < LN2 - 0.05
    moved = [
        np.abs(a - np.array(b.value)).max()
        for a, b in zip(before, model.trainable_variables, strict=True)
    ]
    assert min(moved) > 0


def test_mixed_float16_gets_a_scaled_loss():
    """Chosen by the policy's dtype; XLA has no float16 model on CPU to run."""
    model = DPOModel(tiny_policy(dtype="mixed_float16"))
    model.compile(optimizer=keras.optimizers.Adam(1e-3))
    assert type(model.optimizer).__name__ == "LossScaleOptimizer"


@pytest.mark.slow
def test_loss_scaling_changes_nothing_else():
    """Scaled, differentiated and scaled back: the same weights."""

    def weights(optimizer):
        model = DPOModel(tiny_policy(layers=1))
        model.compile(optimizer=optimizer, gradient_accumulation_steps=2)
        model.fit(dataset(), epochs=2, verbose=0)
        return values_of(model.trainable_variables)

    scaled = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.5), initial_scale=1024.0
    )
    for a, b in zip(
        weights(scaled), weights(keras.optimizers.SGD(0.5)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_average_of_weights_counts_updates_not_micro_batches():
    """4 micro-batches and one large batch leave the same Keras EMA."""

    def weights(steps, **options):
        model = DPOModel(tiny_policy(layers=1))
        model.compile(
            optimizer=keras.optimizers.SGD(1.0, **options),
            gradient_accumulation_steps=steps,
        )
        model.fit(dataset(8, 8), epochs=3, verbose=0)
        return values_of(model.trainable_variables)

    average = {"use_ema": True, "ema_momentum": 0.5}
    large, small, last = (
        weights(1, **average),
        weights(4, **average),
        weights(1),
    )
    for a, b in zip(large, small, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert any(
        np.abs(a - b).max() > 1e-4 for a, b in zip(large, last, strict=True)
    )


@pytest.mark.slow
def test_optimizer_clipping_keeps_working():
    model = DPOModel(tiny_policy())
    before = values_of(model.trainable_variables)
    model.compile(optimizer=keras.optimizers.SGD(1.0, global_clipnorm=1e-3))
    model.fit(dataset(4), verbose=0)
    moved = sum(
        ((a - np.array(b.value)) ** 2).sum()
        for a, b in zip(before, model.trainable_variables, strict=True)
    )
    assert np.sqrt(moved) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.slow
def test_keras_own_accumulation_keeps_working():
    """Two fit steps, one update."""
    model = DPOModel(tiny_policy())
    model.compile(
        optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    )
    model.fit(dataset(8, 4), verbose=0)
    assert steps_done(model.optimizer) == 1


# --- Mistakes ---------------------------------------------------------------


def test_enable_lora_after_wrapping_is_told():
    policy = tiny_policy()
    model = DPOModel(policy)
    policy.backbone.enable_lora(2)
    with pytest.raises(ValueError, match="before DPOModel"):
        model.compile()


def test_option_without_effect_in_compile():
    model = DPOModel(tiny_policy())
    with pytest.raises(ValueError, match="no effect here"):
        model.compile(loss="sigmoid", loss_weights=[1.0])
    with pytest.raises(ValueError, match="Unknown metric"):
        model.compile(metrics=["accuracy"])
    with pytest.raises(ValueError, match="at least 1"):
        model.compile(gradient_accumulation_steps=0)
    for steps in (2, "auto"):
        with pytest.raises(ValueError, match="steps_per_execution` must be 1"):
            model.compile(steps_per_execution=steps)


def test_batch_that_does_not_divide():
    model = compiled(gradient_accumulation_steps=3)
    with pytest.raises(ValueError, match="Use a multiple of 3"):
        model.fit(dataset(8, 4), verbose=0)


def test_token_id_beyond_the_embedding():
    pairs = random_pairs(2)
    pairs[1]["chosen_ids"][0] = 64
    with pytest.raises(ValueError, match="Row 1 holds token id 64"):
        compiled().fit(pairs, verbose=0)


def test_tokenizer_larger_than_the_embedding():
    tokenizer = make_chat_tokenizer()
    preprocessor = keras_dpo.DPOPreprocessor(tokenizer)
    model = DPOModel(tiny_policy(), preprocessor=preprocessor)
    model.compile()
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    with pytest.raises(ValueError, match=f"{len(tokenizer)} tokens, 64 rows"):
        model.fit(rows, verbose=0)


def test_weights_with_a_sorting_loss():
    pairs = random_pairs(4)
    pairs[0]["weight"] = 0.5
    with pytest.raises(ValueError, match="sorts the pairs"):
        compiled(loss="aot").fit(pairs, verbose=0)


def test_policy_that_is_no_model_or_frozen():
    with pytest.raises(TypeError, match="load_policy"):
        DPOModel("gemma")
    policy = tiny_policy()
    policy.trainable = False
    with pytest.raises(ValueError, match="no trainable variable"):
        DPOModel(policy)


def test_summary_shows_policy_reference_and_what_is_trained():
    lines = []
    compiled().summary(print_fn=lines.append)
    text = "\n".join(lines)
    assert "llama3_backbone" in text
    assert "Reference: a snapshot" in text
    assert "Trained: " in text


@pytest.mark.slow
def test_running_state_of_a_loss_moves_in_fit_not_in_evaluate():
    loss = losses.BetaDPO(beta=0.5)
    model = compiled(loss=loss, rate=0.5)
    model.fit(dataset(), epochs=3, verbose=0)
    moved = float(loss.running_mean.value)
    assert moved != 0.0
    model.evaluate(dataset(), verbose=0)
    assert float(loss.running_mean.value) == moved
