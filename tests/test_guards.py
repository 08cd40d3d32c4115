"""Guards: what they say when a run goes wrong, and when."""

import json
import re

import keras
import numpy as np
import pytest
from conftest import random_pairs, tiny_policy

from keras_dpo import DPOModel, PreferenceDataset
from keras_dpo.callbacks import (
    CollapseGuard,
    FallingRewardGuard,
    NaNGuard,
    ReferenceSync,
    StuckLossGuard,
    TrainingBackup,
)
from keras_dpo.runs.report import write_report


@pytest.fixture(autouse=True)
def _hear(caplog):
    caplog.set_level("INFO", "keras_dpo")


def model_of(learning_rate=1e-2, policy=None, **options):
    model = DPOModel(policy or tiny_policy())
    model.compile(keras.optimizers.SGD(learning_rate, **options))
    return model


def data(pairs, **options):
    return PreferenceDataset(
        pairs, batch_size=4, shuffle=False, verbose=False, **options
    )


def fit(model, pairs, guard, epochs=1, callbacks=()):
    model.fit(
        data(pairs), epochs=epochs, verbose=0, callbacks=[guard, *callbacks]
    )


def test_divergence_stops_with_rows_and_token_ids(tmp_path):
    """An infinite update makes the next step's loss infinite."""
    pairs = random_pairs(16)
    with pytest.raises(FloatingPointError) as error:
        fit(model_of(np.inf), pairs, NaNGuard(tmp_path))
    text = str(error.value)
    assert "epoch 1, batch 2. Rows " in text
    assert "diverged at learning rate inf. Lower it, or clip" in text
    (path,) = tmp_path.glob("nonfinite-step-2.json")
    saved = json.loads(path.read_text())
    assert len(saved) == 4
    for row in saved:
        assert f" {row['row']}" in text
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert row[name] == pairs[row["row"]][name]


def test_the_first_bad_batch_is_named_in_whatever_order_they_come(tmp_path):
    """Keras tells of finished batches from several threads."""
    guard = NaNGuard(tmp_path)
    guard.set_model(model_of(1e-3))
    guard.on_epoch_begin(0)
    guard._first_batch = 0
    guard._finite.add(0)
    guard._not_finite.add(3)
    guard.after_batch()
    guard._not_finite.add(2)
    guard.after_batch()
    guard._not_finite.add(1)
    with pytest.raises(FloatingPointError, match="epoch 1, batch 2"):
        guard.after_batch()


def test_an_extreme_value_of_the_data_is_named(tmp_path):
    pairs = random_pairs(8)
    for pair in pairs:
        pair["reference_chosen_log_prob"] = -1.0
        pair["reference_rejected_log_prob"] = -1.0
    pairs[5]["reference_chosen_log_prob"] = 3e38
    pairs[5]["reference_rejected_log_prob"] = -3e38
    model = DPOModel(tiny_policy(), reference="precomputed")
    model.compile("sgd")
    with pytest.raises(
        FloatingPointError, match=r"row 5 has reference_chosen_log_prob = 3e"
    ):
        fit(model, pairs, NaNGuard(tmp_path))


def test_nan_in_frozen_weights_is_named(tmp_path):
    policy = tiny_policy()
    policy.backbone.enable_lora(2)
    kernel = next(v for v in policy.weights if not v.trainable)
    kernel.assign(np.full(kernel.shape, np.nan))
    model = DPOModel(policy)
    model.compile("sgd")
    with pytest.raises(ValueError, match="gives NaN"):
        fit(model, random_pairs(8), NaNGuard(tmp_path))


@pytest.mark.slow
def test_a_backup_never_holds_nan(tmp_path, caplog):
    """Sound for an epoch of 4 steps; the fifth makes every weight infinite.

    Its own loss is still finite.
    """

    def train(rate):
        schedule = keras.callbacks.LearningRateScheduler(
            lambda epoch, _: rate if epoch else 1e-2
        )
        model = model_of()
        backup = TrainingBackup(tmp_path / "b", every=1)
        guard = NaNGuard(tmp_path)
        pairs = random_pairs(16)
        fit(model, pairs, guard, epochs=2, callbacks=[schedule, backup])
        return model

    with pytest.raises(FloatingPointError, match="epoch 2, batch 2"):
        train(np.inf)
    steps = sorted(int(p.name) for p in (tmp_path / "b").glob("[0-9]*"))
    assert steps == [3, 4]
    assert "No backup of step 5: weights are not finite" in caplog.text
    for value in train(1e-2).policy.get_weights():
        assert np.isfinite(value).all()


def test_a_sound_run_is_left_alone(tmp_path, caplog):
    guards = [StuckLossGuard(1), FallingRewardGuard(1), NaNGuard(tmp_path)]
    model_of(1e-2).fit(data(random_pairs(8)), verbose=0, callbacks=guards)
    assert "Warning" not in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("rate", "the learning rate is 0"),
        ("tiny", "no trained weight moved"),
        ("synced", "synced to the policy so often"),
    ],
)
def test_a_stuck_loss_is_explained(case, says, caplog):
    pairs, callbacks = random_pairs(16), []
    rate = {"rate": 0.0, "tiny": 1e-12}.get(case, 1e-2)
    if case == "synced":
        callbacks = [ReferenceSync(every=1, alpha=1.0)]
    fit(model_of(rate), pairs, StuckLossGuard(4), callbacks=callbacks)
    text = caplog.text
    assert text.count("every reward is still 0 (loss 0.6931)") == 1
    assert says in text


def test_a_falling_chosen_reward_is_explained(caplog):
    """Gradient ascent on both completions: a rate below zero."""
    policy = tiny_policy()
    model = DPOModel(policy)
    model.compile(keras.optimizers.SGD(3.0), loss="sigmoid")
    guard = FallingRewardGuard(every=1, threshold=-0.05)
    fit(model, random_pairs(16), guard, epochs=20)
    text = caplog.text
    assert text.count("the chosen completions are less likely") == 1


@pytest.mark.parametrize("when", ["midway", "at the end"])
def test_a_policy_that_hardly_moved_is_told(when, caplog):
    """Rewards that are not 0, and nothing learned: LoRA at 1e-6."""
    policy = tiny_policy(layers=1)
    policy.backbone.enable_lora(2)
    model = DPOModel(policy)
    model.compile(keras.optimizers.Adam(1e-5))
    fit(
        model,
        random_pairs(8),
        StuckLossGuard(2 if when == "midway" else 4),
        epochs=6,
    )
    text = caplog.text
    step = 10 if when == "midway" else 12
    assert text.count(f"after {step} steps the policy has hardly moved") == 1
    assert "LoRA adapters 1e-5 to 5e-4" in text


def test_a_policy_that_learned_is_not_told(caplog):
    model = model_of(0.5, tiny_policy(layers=1))
    fit(model, random_pairs(8), StuckLossGuard(2), epochs=6)
    assert "Warning" not in caplog.text


def knowing_policy():
    """One that gives the pairs' chosen tokens far more than a guess."""
    policy = tiny_policy(layers=1)
    model = DPOModel(policy, reference=None)
    model.compile(keras.optimizers.Adam(1e-2), loss="sft")
    model.fit(data(random_pairs(8)), epochs=40, verbose=0)
    return policy


@pytest.mark.slow
def test_a_collapsed_policy_ends_the_run():
    """Finite weights that give every token about the same log-prob."""
    policy = knowing_policy()
    model = DPOModel(policy)
    model.compile(keras.optimizers.AdamW(1e6))
    with pytest.raises(FloatingPointError) as error:
        fit(model, random_pairs(8), CollapseGuard(1), epochs=4)
    text = str(error.value)
    assert "The policy has collapsed: at step 2" in text
    assert "guessing among 64 tokens has -4.16" in text
    assert "under the reference -" in text
    assert "learning rate 1e+06. Lower it" in text


@pytest.mark.slow
def test_a_policy_that_knows_little_has_not_collapsed():
    fit(model_of(1e-2), random_pairs(8), CollapseGuard(1), epochs=3)


@pytest.mark.slow
def test_lengths_and_weights_are_no_collapse():
    """All weight on the longest completions, at a rate that moves nothing."""
    random = np.random.default_rng(0)

    def pair(length, weight):
        first, second = random.integers(3, 64, (2, length)).tolist()
        return {
            "prompt_ids": [5, 6],
            "chosen_ids": first,
            "rejected_ids": second,
            "weight": weight,
        }

    pairs = [*(pair(4, 0.0) for _ in range(14)), pair(60, 1.0), pair(60, 1.0)]
    fit(model_of(1e-7), pairs, CollapseGuard(1))


@pytest.mark.slow
def test_pairs_that_are_ranked_the_wrong_way_round_are_told(caplog, capsys):
    keras.config.enable_interactive_logging()
    pairs = random_pairs(16)
    swapped = [
        {
            **pair,
            "chosen_ids": pair["rejected_ids"],
            "rejected_ids": pair["chosen_ids"],
        }
        for pair in pairs
    ]
    for training, is_told in ((swapped, True), (pairs, False)):
        model = model_of(0.5)
        model.fit(
            data(training), epochs=8, validation_data=data(pairs), verbose=2
        )
        said = capsys.readouterr().out
        assert ("clearly fewer than one half" in said) == is_told
        assert ("Chosen and rejected may be swapped" in said) == is_told


def test_a_loss_that_did_not_move_is_a_flat_line(tmp_path):
    """In the report: the sixth digit of ln 2 does not fill the chart."""
    records = [{"step": n, "loss": 0.693147 - 1e-7 * n} for n in range(1, 99)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(lines)
    write_report(tmp_path, "run", [], [], [])
    page = (tmp_path / "report.html").read_text()
    (points,) = re.findall(r"<polyline points='([^']+)'", page)
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert max(heights) - min(heights) < 1
