"""save and load of the whole: policy, reference, optimizer, LoRA, losses."""

import keras
import numpy as np
import pytest
from chat_tokenizer import make_chat_tokenizer
from conftest import random_pairs, tiny_policy, values_of
from test_losses import ExponentialLoss

from keras_dpo import DPOModel, DPOPreprocessor, PreferenceDataset, losses


def data():
    return PreferenceDataset(
        random_pairs(8), batch_size=4, verbose=False, buckets=[32]
    )


def trained(policy, reference="initial", loss="sigmoid", epochs=2):
    model = DPOModel(policy, reference=reference)
    model.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss=loss,
        metrics=["kl"],
        gradient_accumulation_steps=2,
    )
    model.fit(data(), epochs=epochs, verbose=0)
    return model


def lora_policy():
    policy = tiny_policy()
    policy.backbone.enable_lora(2)
    return policy


@pytest.mark.parametrize("make", [tiny_policy, lora_policy])
@pytest.mark.slow
def test_a_saved_model_goes_on_as_if_never_saved(make, tmp_path):
    model = trained(make())
    scores = model.predict(data(), verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for a, b in zip(
        values_of(model.variables), values_of(again.variables), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    found = again.predict(data(), verbose=0)
    for name, values in scores.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6)
    assert again.gradient_accumulation_steps == 2
    results = [m.fit(data(), verbose=0).history["loss"] for m in (model, again)]
    assert results[0] == pytest.approx(results[1], rel=1e-5)


@pytest.mark.parametrize("make", [tiny_policy, lora_policy])
def test_weights_files(make, tmp_path):
    model = trained(make())
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    other = trained(make(), epochs=1)
    other.load_weights(path)
    for a, b in zip(
        values_of(model.variables), values_of(other.variables), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_keras_still_merges_lora_into_weights_files(tmp_path):
    """When this fails, `keras_dpo.policies.lora.StoredState` can go."""
    policy = lora_policy()
    for variable in policy.trainable_variables:
        variable.assign(np.ones(variable.shape))
    before = values_of(policy.trainable_variables)
    policy.save_weights(tmp_path / "policy.weights.h5")
    policy.load_weights(tmp_path / "policy.weights.h5")
    after = values_of(policy.trainable_variables)
    assert any((a != b).any() for a, b in zip(before, after, strict=True))


def test_another_model_as_reference_is_saved(tmp_path):
    model = trained(tiny_policy(), reference=tiny_policy(seed=4))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for name, values in model.predict(data(), verbose=0).items():
        np.testing.assert_allclose(
            again.predict(data(), verbose=0)[name],
            values,
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize(
    "loss",
    [
        ExponentialLoss(beta=0.2),
        losses.get({"sigmoid": 0.8, "sft": 1.0}),
        losses.BetaDPO(alpha=0.5),
    ],
)
@pytest.mark.slow
def test_losses_survive(loss, tmp_path):
    model = trained(tiny_policy(), loss=loss)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert repr(again.preference_loss) == repr(loss) or (
        again.preference_loss.get_config() == loss.get_config()
    )
    for a, b in zip(
        values_of(loss.variables),
        values_of(again.preference_loss.variables),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_preprocessor_with_its_tokenizer_survives(tmp_path):
    policy = tiny_policy()
    make_chat_tokenizer().save_pretrained(tmp_path / "tokenizer")
    preprocessor = DPOPreprocessor(
        str(tmp_path / "tokenizer"), max_length=77, max_prompt_length=30
    )
    model = DPOModel(policy, preprocessor=preprocessor)
    model.compile()
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras").preprocessor
    record = {
        "prompt": [{"role": "user", "content": "Hello"}],
        "chosen": [{"role": "assistant", "content": "Hi"}],
        "rejected": [{"role": "assistant", "content": "No"}],
    }
    assert again.tokenize([record]) == preprocessor.tokenize([record])


@pytest.mark.slow
def test_partly_frozen_policy_survives(tmp_path):
    policy = tiny_policy()
    policy.backbone.token_embedding.trainable = False
    model = trained(policy)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert [v.path for v in again.trainable_variables] == [
        v.path for v in model.trainable_variables
    ]


def test_loading_lora_weights_into_another_rank_is_told(tmp_path):
    model = trained(lora_policy())
    model.save_weights(tmp_path / "model.weights.h5")
    plain = trained(tiny_policy(), epochs=1)
    with pytest.raises(ValueError):  # noqa: PT011  Keras' own may come first
        plain.load_weights(tmp_path / "model.weights.h5")


@pytest.mark.parametrize("scales", [False, True])
def test_loss_scaling_is_as_it_was_compiled(scales, tmp_path):
    """A loaded optimizer was another, without its state."""
    model = DPOModel(tiny_policy(layers=1, dtype="mixed_float16"))
    model.compile(keras.optimizers.Adam(1e-3), auto_scale_loss=scales)
    model.fit(random_pairs(4), batch_size=4, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is type(model.optimizer)
    assert hasattr(model.optimizer, "inner_optimizer") == scales
    for a, b in zip(
        loaded.optimizer.variables, model.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(np.array(a.value), np.array(b.value))
