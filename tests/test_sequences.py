"""Orders of use: what is remembered must not outlive what it came from.

Every test compares a sequence of calls on the same objects with a fresh start.
"""

import copy
import pickle

import keras
import numpy as np
import pytest
from conftest import random_pairs, tiny_policy

import keras_dpo
from keras_dpo import DPOModel, Execution, PreferenceDataset
from keras_dpo.errors import UserError

LN2 = float(np.log(2))


def data(seed=1, count=8):
    return PreferenceDataset(
        random_pairs(count, seed=seed),
        batch_size=4,
        verbose=False,
        buckets=[32],
    )


def lora_policy(rank=2, alpha=None, seed=0):
    policy = tiny_policy(layers=1, seed=seed)
    policy.backbone.enable_lora(rank)
    random = np.random.default_rng(seed)
    for variable in policy.trainable_variables:
        variable.assign(0.2 * random.standard_normal(variable.shape))
    for layer in policy._flatten_layers():
        if alpha is not None and getattr(layer, "lora_enabled", False):
            layer.lora_alpha = alpha
    return policy


def compiled(policy=None, reference="initial", loss="sigmoid", **options):
    model = DPOModel(policy or tiny_policy(layers=1), reference, **options)
    model.compile(keras.optimizers.SGD(0.5), loss=loss)
    return model


def scores_of(model, dataset):
    return model.predict(dataset, verbose=0)


def assert_same_scores(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(
            found[name], values, rtol=1e-5, atol=1e-5, err_msg=name
        )


# --- A dataset that two models use ------------------------------------------


def test_a_dataset_keeps_no_model_s_reference():
    """One that trained on it leaves nothing for the next."""
    pairs = data()
    first = compiled(reference="precomputed")
    first.fit(pairs, epochs=3, verbose=0)
    assert not pairs.has_reference
    assert (pairs.epoch, pairs.first_batch) == (0, 0)
    untrained = compiled(tiny_policy(layers=1, seed=4), "precomputed")
    assert untrained.evaluate(pairs, verbose=0)[0] == pytest.approx(LN2)
    again = compiled(first.policy, "precomputed")
    assert again.evaluate(pairs, verbose=0)[0] == pytest.approx(LN2, abs=1e-5)


def test_log_probs_that_came_with_the_data_stay_with_it():
    rows = [
        {**p, "reference_chosen_log_prob": -3.0,
         "reference_rejected_log_prob": -4.0}
        for p in random_pairs(8)
    ]  # fmt: skip
    pairs = PreferenceDataset(rows, batch_size=4, verbose=False)
    for seed in (0, 4):
        model = compiled(tiny_policy(layers=1, seed=seed), "precomputed")
        scores = scores_of(model, pairs)
        assert (scores["reference_chosen_log_prob"] == -3.0).all()
        assert (scores["reference_rejected_log_prob"] == -4.0).all()


# --- A model that is compiled, fitted, saved again --------------------------


def test_a_trained_policy_never_becomes_its_own_precomputed_reference():
    """Other pairs after training: refused; those that are stored: read."""
    first, other = data(), data(seed=7)
    true = scores_of(compiled(), other)
    model = compiled(reference="precomputed")
    model.fit(first, epochs=3, verbose=0)
    model.compile(keras.optimizers.SGD(0.1))
    with pytest.raises(UserError, match="the reference's weights are gone"):
        model.fit(other, verbose=0)
    # Nothing was written under the initial weights' name.
    fresh = compiled(reference="precomputed")
    assert_same_scores(scores_of(fresh, other), true)
    # Now they are on disk, and the trained model may read them.
    found = scores_of(model, other)
    for name in ("reference_chosen_log_prob", "reference_rejected_log_prob"):
        np.testing.assert_allclose(found[name], true[name], rtol=1e-5)


def test_a_precomputed_reference_model_is_never_replaced_by_the_policy():
    """It leaves memory in `fit`, also where `fit` then fails."""
    model = compiled(
        reference=tiny_policy(layers=1, seed=9), precompute_reference=True
    )

    def fail(*_):
        raise RuntimeError("broken on purpose")

    model.train_step = fail
    with pytest.raises(RuntimeError, match="on purpose"):
        model.fit(data(), verbose=0)
    with pytest.raises(UserError, match="the reference's weights are gone"):
        model.predict(data(seed=7), verbose=0)


def test_a_failed_first_batch_is_no_training():
    model = compiled(reference="precomputed")
    step = model.train_step

    def fail(*_):
        raise RuntimeError("broken on purpose")

    model.train_step = fail
    with pytest.raises(RuntimeError, match="on purpose"):
        model.fit(data(), verbose=0)
    assert not model.has_trained
    model.train_step = step
    model.train_function = None
    assert model.evaluate(data(seed=7), verbose=0)[0] == pytest.approx(LN2)


@pytest.mark.slow
def test_another_rate_after_training_needs_no_self_check():
    model = compiled()
    model.fit(data(), epochs=2, verbose=0)
    before = scores_of(model, data())
    model.compile(keras.optimizers.SGD(0.1), loss="ipo")
    assert_same_scores(scores_of(model, data()), before)
    model.fit(data(), verbose=0)


def test_losses_with_and_without_a_reference_in_turn():
    """The snapshot stays that of the initial weights."""
    expected = scores_of(compiled(), data())
    model = compiled()
    model.compile("sgd", loss="simpo")
    assert len(model.non_trainable_variables) == 0
    model.fit(data(), verbose=0)
    model.compile("sgd", loss="sigmoid")
    found = scores_of(model, data())
    assert np.abs(found["chosen_reward"]).max() > 1e-3
    for name in ("reference_chosen_log_prob", "reference_rejected_log_prob"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


@pytest.mark.parametrize("use", ["evaluate", "predict"])
def test_scoring_is_no_training(use):
    """Keras donates the weights to these steps, too."""
    model = compiled(loss="simpo")
    getattr(model, use)(data(), verbose=0)
    model.compile("sgd")
    assert model.evaluate(data(), verbose=0)[0] == pytest.approx(LN2)


def test_another_model_s_run_is_not_this_one_s_training():
    """Two models of one policy; a policy that is another's reference."""
    policy = tiny_policy(layers=1)
    waiting = compiled(policy, "precomputed")
    compiled(policy).evaluate(data(seed=3), verbose=0)
    other = compiled(tiny_policy(layers=1, seed=4), policy)
    other.fit(data(), verbose=0)
    assert not waiting.has_trained
    assert waiting.evaluate(data(), verbose=0)[0] == pytest.approx(LN2)
    # Its own policy, trained elsewhere, is.
    compiled(policy).fit(data(), verbose=0)
    with pytest.raises(UserError, match="initial weights are gone"):
        waiting.fit(data(seed=9), verbose=0)


def test_training_without_a_reference_leaves_none_to_make():
    model = compiled(loss="simpo")
    model.fit(data(), verbose=0)
    with pytest.raises(UserError, match="initial weights are gone"):
        model.compile("sgd", loss="sigmoid")


# --- Save and load ------------------------------------------------------------


def trained(**options):
    model = compiled(**options)
    model.fit(data(), epochs=3, verbose=0)
    return model


@pytest.mark.parametrize("reference", ["initial", "precomputed", "model"])
@pytest.mark.parametrize("how", ["compiled", "not compiled", "compiled later"])
def test_a_loaded_model_has_its_reference(reference, how, tmp_path):
    kind = reference
    if reference == "model":
        kind = tiny_policy(layers=1, seed=4)
    model = trained(reference=kind)
    expected = scores_of(model, data())
    assert np.abs(expected["chosen_reward"]).max() > 1e-2
    model.save(tmp_path / "model.keras")
    keras.utils.set_random_seed(5)
    again = keras.models.load_model(
        tmp_path / "model.keras", compile=how == "compiled"
    )
    if how == "compiled later":
        again.compile(keras.optimizers.SGD(0.5))
    assert again.has_trained
    assert_same_scores(scores_of(again, data()), expected)
    again.compile(keras.optimizers.SGD(0.1))
    assert_same_scores(scores_of(again, data()), expected)
    again.fit(data(), verbose=0)


def test_weights_of_a_compiled_model_need_one(tmp_path):
    model = trained()
    model.save_weights(tmp_path / "m.weights.h5")
    other = DPOModel(tiny_policy(layers=1, seed=3))
    with pytest.raises(ValueError, match="Compile the model"):
        other.load_weights(tmp_path / "m.weights.h5")
    other.compile()
    other.load_weights(tmp_path / "m.weights.h5")
    assert_same_scores(scores_of(other, data()), scores_of(model, data()))


def test_weights_without_a_reference_bring_their_own_beginning(tmp_path):
    """Untrained: they are the reference; trained: there is none to be had."""
    policy = tiny_policy(layers=1, seed=3)
    DPOModel(policy).save_weights(tmp_path / "new.weights.h5")
    model = compiled()
    model.load_weights(tmp_path / "new.weights.h5")
    expected = scores_of(compiled(tiny_policy(layers=1, seed=3)), data())
    assert_same_scores(scores_of(model, data()), expected)
    model.fit(data(), verbose=0)
    trained(loss="simpo").save_weights(tmp_path / "old.weights.h5")
    with pytest.raises(ValueError, match="initial weights are gone"):
        compiled().load_weights(tmp_path / "old.weights.h5")


@pytest.mark.slow
def test_lora_alpha_is_part_of_a_policy(tmp_path):
    model = compiled(lora_policy(alpha=16))
    expected = scores_of(model, data())
    unscaled = scores_of(compiled(lora_policy()), data())
    difference = expected["chosen_log_prob"] - unscaled["chosen_log_prob"]
    assert np.abs(difference).max() > 0.1
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert_same_scores(scores_of(again, data()), expected)


def test_a_quantized_base_survives(tmp_path):
    policy = tiny_policy(layers=1)
    policy.backbone.quantize("int8")
    model = compiled(policy, reference=None)
    expected = scores_of(model, data())
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert_same_scores(scores_of(again, data()), expected)


def test_a_number_type_that_a_config_does_not_hold_is_told(tmp_path):
    policy = tiny_policy(layers=1)
    policy.backbone.transformer_layers[0].dtype_policy = "mixed_bfloat16"
    for layer in policy.backbone.transformer_layers[0]._flatten_layers():
        layer.dtype_policy = "mixed_bfloat16"
    model = compiled(policy, execution=Execution(attention="keras"))
    model.save(tmp_path / "model.keras")
    with pytest.raises(Exception, match="number types that its config"):
        keras.models.load_model(tmp_path / "model.keras")


@pytest.mark.parametrize("is_compiled", [False, True])
def test_copies_of_a_model(is_compiled, tmp_path):
    model = DPOModel(tiny_policy(layers=1))
    if is_compiled:
        model.compile("sgd")
    expected = scores_of(model, data())
    model.save(tmp_path / "model.keras")
    copies = [
        keras.models.load_model(tmp_path / "model.keras"),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
    ]
    for other in copies:
        assert other.compiled == is_compiled
        assert not other.has_trained
        assert_same_scores(scores_of(other, data()), expected)
    # A clone has weights of its own, and is its own reference.
    clone = keras.models.clone_model(model)
    clone.compile("sgd")
    assert clone.evaluate(data(), verbose=0)[0] == pytest.approx(LN2)


def test_a_snapshot_that_waits_is_not_of_other_weights(tmp_path):
    """Weights that were trained without a reference, into a model that has
    seen one."""
    trained(loss="simpo").save_weights(tmp_path / "m.weights.h5")
    model = compiled(tiny_policy(layers=1, seed=5))
    model.compile("sgd", loss="simpo")
    model.load_weights(tmp_path / "m.weights.h5")
    with pytest.raises(UserError, match="initial weights are gone"):
        model.compile("sgd", loss="sigmoid")


def test_weights_of_another_alpha_are_refused(tmp_path):
    compiled(lora_policy(alpha=16)).save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(ValueError, match="'lora_alpha': 16"):
        compiled(lora_policy()).load_weights(tmp_path / "m.weights.h5")


@pytest.mark.slow
def test_a_backup_of_another_alpha_is_refused(tmp_path):
    def fit(alpha):
        backup = keras_dpo.callbacks.TrainingBackup(tmp_path, every=1)
        model = compiled(lora_policy(alpha=alpha))
        model.fit(data(), verbose=0, callbacks=[backup])

    fit(16)
    with pytest.raises(UserError, match="lora_alpha was 16 and is 4"):
        fit(4)


def test_two_sources_of_reference_log_probs_are_refused():
    """A model to compute them with, and columns that hold them."""
    rows = [
        {**p, "reference_chosen_log_prob": -9.0,
         "reference_rejected_log_prob": -1.0}
        for p in random_pairs(4)
    ]  # fmt: skip
    reference = tiny_policy(layers=1, seed=5)
    model = compiled(reference=reference, precompute_reference=True)
    for use in (model.evaluate, model.fit):
        with pytest.raises(UserError, match="another model was given"):
            use(rows, verbose=0)


def test_weights_loaded_after_wrapping_are_told_when_precomputed():
    policy = tiny_policy(layers=1)
    model = compiled(policy, "precomputed")
    other = tiny_policy(layers=1, seed=5)
    policy.set_weights(other.get_weights())
    with pytest.raises(UserError, match="initial weights are gone"):
        model.fit(data(), verbose=0)


@pytest.mark.parametrize("use", ["evaluate", "predict"])
def test_an_exception_while_scoring_loses_no_weights(use):
    class Fail(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            raise RuntimeError("on purpose")

        on_predict_batch_end = on_test_batch_end

    model = trained()
    expected = scores_of(model, data())
    with pytest.raises(RuntimeError, match="on purpose"):
        getattr(model, use)(data(), verbose=0, callbacks=[Fail()])
    assert_same_scores(scores_of(model, data()), expected)
    model.fit(data(), verbose=0)


def test_a_model_of_keras_own_layers_has_one_store(tmp_path):
    """Layer names are numbered in a process, and mean nothing."""

    def functional():
        keras.utils.set_random_seed(0)
        inputs = {
            name: keras.Input((None,), dtype="int32", name=name)
            for name in ("token_ids", "padding_mask")
        }
        hidden = keras.layers.Embedding(64, 8)(inputs["token_ids"])
        logits = keras.layers.Dense(64)(hidden)
        return keras.Model(inputs, logits)

    options = {"reference_cache": str(tmp_path), "preprocessor": None}
    stores = {
        compiled(functional(), "precomputed", **options).precompute(
            random_pairs(4)
        )
        for _ in range(2)
    }
    assert len(stores) == 1


# --- Rounds -------------------------------------------------------------------


def copy_of(policy):
    other = tiny_policy(layers=1, seed=11)
    if any(getattr(x, "lora_enabled", 0) for x in policy._flatten_layers()):
        other.backbone.enable_lora(2)
    for theirs, ours in zip(other.weights, policy.weights, strict=True):
        theirs.assign(ours.value)
    return other


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("reference", ["initial", "model", "precomputed"])
@pytest.mark.slow
def test_three_rounds_each_begin_at_ln_2(reference, lora, place, tmp_path):
    """Train; the trained policy is the next reference; other pairs; again."""
    policy = lora_policy() if lora else tiny_policy(layers=1)
    for number in range(3):
        kind = copy_of(policy) if reference == "model" else reference
        model = compiled(
            policy,
            kind,
            reference_cache=(
                str(tmp_path / "cache") if reference == "precomputed" else None
            ),
        )
        pairs = data(seed=20 + number)
        first = model.evaluate(pairs, return_dict=True, verbose=0)
        assert first["loss"] == pytest.approx(LN2, abs=1e-5), number
        assert first["chosen_reward"] == pytest.approx(0, abs=1e-5), number
        history = model.fit(pairs, epochs=4, verbose=0).history
        assert history["loss"][-1] < LN2 - 1e-3, number
        policy = model.policy
        if place == "disk":
            keras_dpo.save_policy(policy, tmp_path / f"round_{number}")
            policy = keras_dpo.load_policy(tmp_path / f"round_{number}")
            if lora:
                policy.backbone.enable_lora(2)


# --- The optimizer's average in the weights' place --------------------------


def averaging(policy=None):
    model = DPOModel(policy or tiny_policy(layers=1))
    model.compile(keras.optimizers.Adam(1e-2, use_ema=True, ema_momentum=0.5))
    return model


def test_an_average_outlives_what_comes_after_fit(tmp_path):
    """Keras leaves one array to the policy and to the optimizer."""
    pairs = data()
    straight, other = averaging(), averaging()
    for model in (straight, other):
        model.fit(pairs, epochs=2, verbose=0)
    averages = [
        np.array(v.value)
        for v in other.optimizer._model_variables_moving_average
    ]
    other.evaluate(pairs, verbose=0)
    scores = other.predict(pairs, verbose=0)
    other.save(tmp_path / "model.keras")
    for average, variable in zip(
        averages, other.optimizer._model_variables_moving_average, strict=True
    ):
        np.testing.assert_array_equal(average, np.array(variable.value))
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same_scores(loaded.predict(pairs, verbose=0), scores)
    losses = [
        model.fit(pairs, epochs=2, verbose=0).history["loss"]
        for model in (straight, other)
    ]
    assert losses[0] == losses[1]
    averaging(other.policy).fit(pairs, verbose=0)


def test_keras_still_shares_averages_with_weights():
    """If this fails, `compat.averages` can go."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1, use_ema=True), loss="mse")
    model.fit(np.ones((4, 4)), np.ones((4, 1)), verbose=0)
    averages = model.optimizer._model_variables_moving_average
    for average, weight in zip(
        averages, model.trainable_variables, strict=True
    ):
        assert average.value is weight.value


# --- Columns of the data in one dataset alone --------------------------------


@pytest.mark.parametrize("side", ["training", "validation"])
def test_training_and_validation_have_one_reference(side):
    columns = {
        "reference_chosen_log_prob": -3.0,
        "reference_rejected_log_prob": -4.0,
    }
    rows = random_pairs(8)
    given = [{**row, **columns} for row in rows]
    train, valid = (given, rows) if side == "training" else (rows, given)
    model = compiled(reference="precomputed")
    with pytest.raises(ValueError, match=f"The {side} pairs alone"):
        model.fit(train, batch_size=4, validation_data=valid, verbose=0)
    model.fit(given, batch_size=4, validation_data=given, verbose=0)
