"""Logging, samples and checkpoints: what they write is what happened."""

import glob
import json

import keras
import numpy as np
import pytest
import wandb
from conftest import random_pairs, tiny_policy

from keras_dpo import DPOModel, PreferenceDataset
from keras_dpo.callbacks import (
    GenerationSamples,
    MetricsFile,
    PolicyCheckpoint,
    ReferenceSync,
    WandbLogger,
)
from keras_dpo.data.preprocessor import DPOPreprocessor
from keras_dpo.data.tokenizers import TextTokenizer
from keras_dpo.runs.schedules import WarmupThenDecay


def data(count=12, batch_size=4, **options):
    return PreferenceDataset(
        random_pairs(count),
        batch_size=batch_size,
        verbose=False,
        buckets=[32],
        **options,
    )


def model_of(policy=None, preprocessor=None, rate=0.5):
    model = DPOModel(policy or tiny_policy(), preprocessor=preprocessor)
    model.compile(optimizer=keras.optimizers.SGD(WarmupThenDecay(rate, 100)))
    return model


class NumberTokenizer(TextTokenizer):
    """Ids written as numbers, for policies without a language."""

    name = "numbers"
    vocabulary_size = 64
    bos_id = None
    eos_id = 2
    control_tokens = {"<end>": 2}
    chat_template = None
    special_texts = {}

    def encode(self, texts):
        return [
            [int(word) if word.isdigit() else 1 for word in text.split()]
            for text in texts
        ]

    def encode_plain(self, text):
        return [3]

    def decode(self, ids, skip_control=True):
        return " ".join(str(i) for i in ids if not (skip_control and i == 2))


class StepLosses(keras.callbacks.Callback):
    """The exact loss of every step, from the running sums."""

    def __init__(self):
        super().__init__()
        self.values = []

    def on_epoch_begin(self, epoch, logs=None):
        self.last = (0.0, 0.0)

    def on_train_batch_end(self, batch, logs=None):
        total, count = self._model.metric_totals()["loss"]
        self.values.append((total - self.last[0]) / (count - self.last[1]))
        self.last = (total, count)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_file_holds_means_of_the_steps_between(tmp_path):
    """3 steps an epoch, every 2: records after steps 2, 3, 4, 6."""
    losses = StepLosses()
    path = tmp_path / "metrics.jsonl"
    model = model_of()
    history = model.fit(
        data(),
        validation_data=data(4),
        epochs=2,
        verbose=0,
        callbacks=[losses, MetricsFile(path, every=2)],
    ).history
    records = read(path)
    steps = [r for r in records if "end_of_epoch" not in r]
    ends = [r for r in records if "end_of_epoch" in r]
    assert [r["step"] for r in steps] == [2, 3, 4, 6]
    expected = [
        np.mean(losses.values[a:b]) for a, b in ((0, 2), (2, 3), (3, 4), (4, 6))
    ]
    found = [r["loss"] for r in steps]
    assert found == pytest.approx(expected, rel=1e-5)
    assert [r["val_loss"] for r in ends] == history["val_loss"]
    assert all(r["seconds_per_step"] > 0 for r in steps)


def test_metrics_file_does_not_sync_the_state_every_step(tmp_path):
    """As many full syncs in an epoch of 10 steps as in one of 2."""

    def syncs(pairs):
        model = model_of()
        count = []
        plain = model.jax_state_sync
        model.jax_state_sync = lambda: (count.append(1), plain())[1]
        logger = MetricsFile(tmp_path / "m.jsonl", every=1)
        model.fit(data(pairs), verbose=0, callbacks=[logger])
        return len(count)

    assert syncs(40) == syncs(8)


def test_wandb_offline_holds_config_metrics_and_samples(tmp_path):
    policy = tiny_policy()
    preprocessor = DPOPreprocessor(NumberTokenizer(), chat_template=None)
    model = model_of(policy, preprocessor)
    logger = WandbLogger(
        "project", "my-run", {"beta": 0.25}, every=1, directory=str(tmp_path)
    )
    samples = GenerationSamples(
        ["5 6 7"], every=2, max_new_tokens=4, on_samples=logger.log_samples
    )
    model.fit(
        data(), validation_data=data(4), verbose=0, callbacks=[logger, samples]
    )
    logger.close()
    # wandb 0.31's `finish` may return just before its service has written
    # the file's last block; `teardown` waits for the service.
    wandb.teardown()
    runs = glob.glob(str(tmp_path / "wandb" / "offline-run-*" / "*.wandb"))
    assert len(runs) == 1
    with open(runs[0], "rb") as file:
        content = file.read()
    for text in (
        b"my-run",
        b"beta",
        b"0.25",
        b"train/loss",
        b"train/reward_accuracy",
        b"epoch/val_reward_margin",
        b"samples",
    ):
        assert text in content, text
    tables = glob.glob(
        str(tmp_path / "wandb" / "*" / "files" / "media" / "table" / "*.json")
    )
    table = json.loads(open(tables[0]).read())
    assert table["columns"] == ["prompt", "policy", "reference"]
    assert table["data"][0][0] == "5 6 7"


def test_tensorboard_works_on_jax(tmp_path):
    model_of().fit(
        data(),
        validation_data=data(4),
        epochs=2,
        verbose=0,
        callbacks=[keras.callbacks.TensorBoard(str(tmp_path))],
    )
    events = glob.glob(str(tmp_path / "*" / "events*"))
    content = b"".join(open(path, "rb").read() for path in events)
    assert b"epoch_reward_accuracy" in content


@pytest.mark.slow
def test_samples_show_policy_beside_reference():
    """The reference's answers stay those of the start; training goes on
    unharmed by the swap."""
    preprocessor = DPOPreprocessor(NumberTokenizer(), chat_template=None)
    prompts = ["5 6 7", "9 10"]
    samples = GenerationSamples(prompts, every=3, max_new_tokens=6)
    model = model_of(preprocessor=preprocessor, rate=3.0)
    model.fit(data(shuffle=False), epochs=4, verbose=0, callbacks=[samples])
    assert list(samples.samples) == [3, 6, 9, 12]
    references = {
        tuple(s["reference"] for s in rows) for rows in samples.samples.values()
    }
    assert len(references) == 1
    policies = {
        tuple(s["policy"] for s in rows) for rows in samples.samples.values()
    }
    assert len(policies) > 1
    without = model_of(rate=3.0)
    without.fit(data(shuffle=False), epochs=4, verbose=0)
    for a, b in zip(
        model.trainable_variables, without.trainable_variables, strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_policy_checkpoints_load(tmp_path):
    import keras_hub

    model = model_of()
    model.fit(data(), verbose=0, callbacks=[PolicyCheckpoint(tmp_path, 2)])
    assert [p.name for p in tmp_path.iterdir()] == ["step_2"]
    keras_hub.models.CausalLM.from_preset(str(tmp_path / "step_2"))


def test_mistakes():
    with pytest.raises(ValueError, match="at least 1"):
        MetricsFile("x", every=0)


@pytest.mark.slow
def test_own_callbacks_act_in_the_training_thread_alone(tmp_path):
    """Keras runs async-safe callbacks in other threads, while the next step
    deletes the state: 200 steps would find a race."""
    import threading

    threads = set()

    class Spy(MetricsFile):
        def after_step(self, step):
            threads.add(threading.get_ident())
            super().after_step(step)

    sync = ReferenceSync(every=1, alpha=0.5)
    model = model_of(rate=0.01)
    model.fit(
        data(200, 4),
        epochs=4,
        verbose=0,
        callbacks=[Spy(tmp_path / "m.jsonl", every=1), sync],
    )
    assert threads == {threading.get_ident()}
    steps = [
        r["step"] for r in read(tmp_path / "m.jsonl") if "end_of_epoch" not in r
    ]
    assert steps == list(range(1, 201))


def test_stop_after_stops_after():
    from keras_dpo.training.stop_after import StopAfter

    model = model_of()
    model.fit(data(40, 4), epochs=3, verbose=0, callbacks=[StopAfter(12)])
    assert int(model.optimizer.iterations.value) == 12


def test_a_resumed_run_keeps_its_wandb_id(tmp_path):
    from keras_dpo.callbacks import WandbLogger
    from keras_dpo.runs.build import wandb_run_id

    first = wandb_run_id(tmp_path, goes_on=False)
    assert wandb_run_id(tmp_path, goes_on=True) == first
    logger = WandbLogger(directory=str(tmp_path), run_id=first)
    assert logger.run.id == first
    logger.close()
    assert wandb_run_id(tmp_path, goes_on=False) != first
