"""Every row of the EasyDeL page, by its effect, through `DPOConfig`/`train`.

`docs/features.md` lists row and test; `test_table_in_the_docs` holds it.
"""

import dataclasses
import json

import keras
import numpy as np
import pytest
import yaml
from conftest import ROOT

import keras_dpo
from keras_dpo import DPOConfig
from keras_dpo.data.preprocessor import DPOPreprocessor
from keras_dpo.losses import PairLogProbs
from keras_dpo.runs.build import choose_attention, make_optimizer
from keras_dpo.runs.demo import make_questions, make_tokenizer

LN2 = float(np.log(2))


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """A tiny saved policy with the demo's tokenizer, and its pairs."""
    import keras_hub

    directory = tmp_path_factory.mktemp("preset")
    training, _ = make_questions(0)
    tokenizer = make_tokenizer(training)

    def save(name, seed, dropout=0.0):
        keras.utils.set_random_seed(seed)
        backbone = keras_hub.models.Qwen3Backbone(
            vocabulary_size=len(tokenizer),
            num_layers=1,
            num_query_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            hidden_dim=16,
            intermediate_dim=16,
            tie_word_embeddings=True,
            dropout=dropout,
        )
        policy = keras_hub.models.Qwen3CausalLM(backbone, None)
        keras_dpo.save_policy(
            policy, directory / name, DPOPreprocessor(tokenizer)
        )

    save("policy", 0)
    save("other", 1)
    save("noisy", 0, dropout=0.5)
    rows = [
        {"prompt": q.prompt, "chosen": f" {q.right}", "rejected": f" {q.wrong}"}
        for q in training[:24]
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "pairs.jsonl").write_text(lines)
    return directory


@pytest.fixture
def run(preset, tmp_path):
    """Train for a few steps with the given settings."""

    def start(**settings):
        settings = {
            "repo_id": str(preset / "policy"),
            "dataset_name": str(preset / "pairs.jsonl"),
            "save_directory": str(tmp_path),
            "total_batch_size": 8,
            "num_train_epochs": 1,
            "learning_rate": 1e-2,
            "num_sample_prompts": 0,
            "do_last_save": False,
            "log_steps": 1,
            # Several runs of a test share the directory.
            "resume": "never",
            **settings,
        }
        return keras_dpo.train(DPOConfig(**settings))

    return start


def steps_of(run):
    path = run.directory / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [r for r in records if "end_of_epoch" not in r]


def test_model_name_is_the_directory(run, tmp_path):
    done = run(model_name="my-run")
    assert done.directory == tmp_path / "my-run"
    assert (done.directory / "report.html").exists()
    assert DPOConfig().model_name == "DPOTrainer"
    with pytest.raises(ValueError, match="plain directory name"):
        DPOConfig(model_name="../up")


def test_learning_rate_scales_the_step(run):
    constant = {"learning_rate_schedule": "constant", "max_steps": 1}
    moved = []
    for rate in (1e-4, 1e-2):
        done = run(learning_rate=rate, **constant)
        moved.append(
            max(
                float(np.abs(a.value - b.value).max())
                for a, b in zip(
                    done.model.reference.snapshot,
                    done.model.trainable_variables,
                    strict=True,
                )
            )
        )
    assert moved[1] == pytest.approx(100 * moved[0], rel=0.1)


def test_beta_scales_rewards_and_loss(run):
    found = [steps_of(run(beta=beta))[-1] for beta in (0.05, 0.5)]
    assert abs(found[1]["reward_margin"]) > 3 * abs(found[0]["reward_margin"])
    assert found[0]["loss"] != found[1]["loss"]


PAGE_LOSSES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot "
    "aot_pair apo_zero apo_down discopop"
).split()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (i >= 4))
        for i, name in enumerate(PAGE_LOSSES)
    ],
)
def test_loss_type_is_the_loss_that_runs(name, run):
    done = run(loss_type=name, max_steps=1)
    assert isinstance(done.model.preference_loss, keras_dpo.losses.LOSSES[name])
    # At the start both models are the same.
    same = PairLogProbs(np.zeros((1, 2, 1)), np.ones((1, 2, 1)))
    expected = keras_dpo.losses.get(name, beta=0.1).per_pair(same, same)[0]
    assert steps_of(done)[0]["loss"] == pytest.approx(
        float(expected), abs=1e-4, rel=1e-4
    )


@pytest.mark.slow
def test_loss_weights_mix(run):
    """At the start sigmoid is ln 2, bco_pair twice that."""
    sft = steps_of(run(loss_type="sft", max_steps=1))[0]["loss"]
    for weights in ((0.8, 0.2, 1.0), (0.1, 2.0, 0.3)):
        done = run(
            loss_type="sigmoid,bco_pair,sft",
            loss_weights=",".join(map(str, weights)),
            max_steps=1,
        )
        expected = np.dot(weights, [LN2, 2 * LN2, sft])
        assert steps_of(done)[0]["loss"] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="no effect on one loss"):
        DPOConfig(loss_weights="1")


def test_label_smoothing_reaches_sigmoid(run):
    found = [
        steps_of(run(label_smoothing=e, beta=1.0))[-1]["loss"]
        for e in (0.0, 0.3)
    ]
    assert found[1] > found[0]


def test_lengths_limit_what_the_model_sees(run):
    done = run(max_length=6, max_prompt_length=4, max_steps=1)
    data = done.model.preprocessor
    assert (data.max_length, data.max_prompt_length) == (6, 4)
    row = data.tokenize(
        [{"prompt": "a " * 9, "chosen": "b " * 9, "rejected": "c " * 9}]
    )[0]
    assert (len(row.prompt_ids), len(row.chosen_ids)) == (4, 2)
    done = run(
        max_length=60, max_prompt_length=4, max_completion_length=3, max_steps=1
    )
    row = done.model.preprocessor.tokenize(
        [{"prompt": "a", "chosen": "b " * 9, "rejected": "c " * 9}]
    )[0]
    assert len(row.chosen_ids) == 3


def test_reference_free_keeps_no_reference(run):
    done = run(reference_free=True, max_steps=1)
    assert done.model.reference.variables == []
    assert steps_of(done)[0]["chosen_reward"] < -0.1


@pytest.mark.slow
def test_sync_ref_model_moves_the_reference(run):
    """24 pairs in batches of 8: a sync after step 2 of 3."""
    still = run().model.reference.snapshot
    moved = run(
        sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.5
    )
    assert any(
        (np.asarray(a.value) != np.asarray(b.value)).any()
        for a, b in zip(still, moved.model.reference.snapshot, strict=True)
    )
    never = run(sync_ref_model=True, ref_model_sync_steps=4)
    for a, b in zip(still, never.model.reference.snapshot, strict=True):
        np.testing.assert_array_equal(a.value, b.value)


def test_ref_model_mixup_alpha_is_the_share_of_the_policy(run, preset):
    """0.3 of the policy after step 2 of 3, 0.7 of what it began with."""
    constant = {"learning_rate_schedule": "constant"}
    synced = run(
        sync_ref_model=True,
        ref_model_sync_steps=2,
        ref_model_mixup_alpha=0.3,
        **constant,
    )
    second = run(max_steps=2, **constant)
    start = keras_dpo.load_policy(preset / "policy")
    for mixed, policy, initial in zip(
        synced.model.reference.snapshot,
        second.model.trainable_variables,
        start.trainable_variables,
        strict=True,
    ):
        policy, initial = np.asarray(policy.value), np.asarray(initial.value)
        assert np.abs(policy - initial).max() > 1e-3
        np.testing.assert_allclose(
            mixed.value, 0.3 * policy + 0.7 * initial, atol=1e-6
        )
    assert DPOConfig().ref_model_mixup_alpha == 0.9


def test_sync_settings_without_sync_are_told():
    lines = DPOConfig(ref_model_sync_steps=128).unread_flags()
    assert lines == [
        "`ref_model_sync_steps`=128 has no effect: sync_ref_model is off."
    ]


def test_disable_dropout_reaches_the_model(run, preset):
    """A policy with dropout is its own reference only where it is off."""
    noisy = {"repo_id": str(preset / "noisy"), "max_steps": 1, "beta": 1.0}
    off = steps_of(run(**noisy))[0]
    on = steps_of(run(disable_dropout=False, **noisy))[0]
    assert off["loss"] == pytest.approx(LN2, abs=1e-5)
    assert off["chosen_reward"] == pytest.approx(0.0, abs=1e-5)
    assert abs(on["loss"] - LN2) > 1e-3


@pytest.mark.slow
def test_total_batch_size_is_pairs_per_update(run):
    """24 pairs."""
    for size, updates in ((12, 2), (6, 4)):
        done = run(total_batch_size=size, gradient_accumulation_steps=3)
        assert int(done.model.optimizer.iterations.value) == updates


@pytest.mark.slow
def test_gradient_accumulation_steps_are_micro_batches(run):
    """A loss that sorts the pairs sees fewer of them at once."""
    found = [
        steps_of(run(loss_type="aot", beta=1.0, gradient_accumulation_steps=n))
        for n in (1, 4)
    ]
    first, last = ([steps[i]["loss"] for steps in found] for i in (0, -1))
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert abs(last[0] - last[1]) > 1e-6


def test_gradient_accumulation_steps_change_nothing(run):
    found = [
        steps_of(run(gradient_accumulation_steps=n, seed=3))[-1]["loss"]
        for n in (1, 4)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_num_train_epochs(run):
    assert len(run(num_train_epochs=2).history["loss"]) == 2


def test_saving(run, tmp_path):
    import keras_hub

    done = run(save_steps=2, do_last_save=True)
    for name in ("checkpoints/step_2", "policy"):
        keras_hub.models.CausalLM.from_preset(str(done.directory / name))
    assert not (run(model_name="b").directory / "policy").exists()


@pytest.mark.slow
def test_use_wandb_writes_an_offline_run(run):
    done = run(use_wandb=True, num_sample_prompts=1, model_name="wb")
    files = list((done.directory / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1
    content = files[0].read_bytes()
    for text in (b"wb", b"max_prompt_length", b"train/reward_margin"):
        assert text in content


def test_log_steps(run):
    assert [r["step"] for r in steps_of(run(log_steps=2))] == [2, 3]


@pytest.mark.slow
def test_reference_model_repo_id_is_the_reference(run, preset):
    other = str(preset / "other")
    for name in ("reference_model_repo_id", "refrence_model_repo_id"):
        first = steps_of(run(max_steps=1, **{name: other}))[0]
        assert abs(first["loss"] - LN2) > 1e-5
    assert steps_of(run(max_steps=1))[0]["loss"] == pytest.approx(LN2, abs=1e-5)


@pytest.mark.slow
def test_dtype(run):
    done = run(dtype="bfloat16", max_steps=2)
    assert done.model.policy.dtype_policy.name == "mixed_bfloat16" or (
        done.model.policy.backbone.dtype_policy.name == "mixed_bfloat16"
    )
    assert {v.dtype for v in done.model.trainable_variables} == {"float32"}
    done = run(dtype="bfloat16", lora_rank=2, max_steps=2)
    assert {v.dtype for v in done.model.trainable_variables} == {"float32"}
    frozen = [v for v in done.model.policy.weights if not v.trainable]
    assert {v.dtype for v in frozen} == {"bfloat16"}


def test_attn_mechanism_is_said_and_set(run, capsys):
    keras.config.enable_interactive_logging()
    # Keras says None for "where it is possible", False for "never".
    for name, value, said in (
        ("vanilla", False, "sequences: vanilla\n"),
        ("flash", None, "there is no flash attention on cpu"),
        ("auto", None, "sequences: auto"),
    ):
        choose_attention(name)
        assert keras.config.is_flash_attention_enabled() is value
        assert said in capsys.readouterr().out
    keras.config.disable_flash_attention()


def test_validation_accuracy_is_reported(run, preset):
    done = run(
        validation_dataset_name=str(preset / "pairs.jsonl"),
        validation_split="train[:8]",
    )
    assert len(done.history["val_reward_accuracy"]) == 1


def test_precomputed_reference_runs(run):
    online, stored = (
        steps_of(run(reference=kind))[-1]["loss"]
        for kind in ("initial", "precomputed")
    )
    assert online == pytest.approx(stored, rel=1e-4)


def test_schedule_and_clipping():
    config = DPOConfig(
        learning_rate=1.0,
        warmup_ratio=0.25,
        learning_rate_schedule="cosine",
        clip_norm=1.0,
    )
    optimizer = make_optimizer(config, 8)
    assert optimizer.global_clipnorm == 1.0
    rates = [float(optimizer._learning_rate(step)) for step in range(9)]
    assert rates[0] == pytest.approx(0.5)
    assert rates[1] == pytest.approx(1.0)
    assert rates[5] == pytest.approx(0.5)
    assert rates[8] == pytest.approx(0.0, abs=1e-6)


def test_saved_config_is_the_config(run):
    done = run(beta=0.08, max_steps=1)
    saved = yaml.safe_load((done.directory / "config.yaml").read_text())
    assert saved["beta"] == 0.08
    assert set(saved) == {f.name for f in dataclasses.fields(DPOConfig)}
    DPOConfig(**saved)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "`beta` must be above 0"),
        ({"beta": -0.1}, "`beta` must be above 0"),
        ({"loss_type": "kto"}, "Known losses"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "does not read"),
        ({"loss_type": "sigmoid,sft", "gamma": 1.0}, "None of the losses"),
        ({"sync_ref_model": True, "reference": "precomputed"}, "synced"),
        ({"sync_ref_model": True, "reference_free": True}, "kept"),
        (
            {"reference_free": True, "reference_model_repo_id": "x"},
            "no effect together",
        ),
        ({"total_batch_size": 10, "gradient_accumulation_steps": 3}, "divide"),
        ({"lora_target_layers": ["query"]}, "without lora_rank"),
        ({"warmup_ratio": 1.0}, "warmup_ratio"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(**settings)


def test_table_in_the_docs():
    """Every page field is in the table, and every test named there exists."""
    import re

    text = (ROOT / "docs" / "features.md").read_text()
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", text)
    assert len(named) > 25
    for file, test in named:
        source = (ROOT / "tests" / f"{file}.py").read_text()
        assert f"def {test}(" in source, (file, test)
    fields = (
        "model_name learning_rate beta loss_type label_smoothing max_length "
        "max_prompt_length max_completion_length reference_free "
        "sync_ref_model ref_model_sync_steps ref_model_mixup_alpha "
        "disable_dropout total_batch_size gradient_accumulation_steps "
        "num_train_epochs save_directory save_steps do_last_save use_wandb "
        "log_steps dtype attn_mechanism"
    ).split()
    for field in fields:
        assert f"`{field}`" in text, field
