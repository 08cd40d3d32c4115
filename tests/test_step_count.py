"""What callbacks call a step where the Keras optimizer itself accumulates."""

import json
import signal

import keras
import numpy as np
import pytest
from conftest import random_pairs, tiny_policy, values_of
from test_callbacks import NumberTokenizer, StepLosses

from keras_dpo import DPOModel, PreferenceDataset
from keras_dpo.callbacks import (
    AfterStep,
    GenerationSamples,
    MetricsFile,
    PolicyCheckpoint,
    ReferenceSync,
    StuckLossGuard,
    TrainingBackup,
)
from keras_dpo.data.preprocessor import DPOPreprocessor
from keras_dpo.training.stop_after import StopAfter

# Five batches an epoch, of which one is left over.
ACCUMULATED = 2


class Spy(AfterStep):
    """Compares the count with the optimizer's own."""

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self.steps, self.batches = [], 0

    def after_step(self, step):
        assert step == updates_of(self.model.optimizer)
        self.steps.append(step)

    def after_batch(self):
        self.batches += 1


def updates_of(optimizer):
    # A MultiOptimizer counts batches; its parts, updates.
    part = getattr(optimizer, "optimizers", [optimizer])[0]
    return int(keras.ops.convert_to_numpy(part.iterations))


def model_of(kind="plain", accumulated=ACCUMULATED, preprocessor=None):
    optimizer = keras.optimizers.SGD(
        0.1, momentum=0.9, gradient_accumulation_steps=accumulated
    )
    if kind == "scaled":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, 2.0)
    elif kind == "skipping":
        # Gradients overflow until it has been halved a few times.
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, 2.0**127)
    elif kind == "several":
        optimizer = keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(optimizer)
        )
    model = DPOModel(tiny_policy(), preprocessor=preprocessor)
    model.compile(optimizer)
    return model


def data(pairs=20):
    return PreferenceDataset(
        random_pairs(pairs), batch_size=4, seed=3, verbose=False
    )


def records(path):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in found]


def steps_of(path):
    return [r["step"] for r in records(path) if "end_of_epoch" not in r]


@pytest.mark.parametrize("kind", ["plain", "scaled", "several"])
@pytest.mark.slow
def test_steps_are_updates(kind, tmp_path, caplog):
    """10 batches, 5 updates; the third ends in the second epoch."""
    caplog.set_level("INFO", "keras_dpo")
    preprocessor = DPOPreprocessor(NumberTokenizer(), chat_template=None)
    model = model_of(kind, preprocessor=preprocessor)
    spy, losses = Spy(), StepLosses()
    samples = GenerationSamples(["5 6"], every=2, max_new_tokens=2)
    path = tmp_path / "metrics.jsonl"
    model.fit(
        data(),
        epochs=2,
        verbose=0,
        callbacks=[
            losses,
            spy,
            MetricsFile(path, every=1),
            PolicyCheckpoint(tmp_path / "policies", every=2),
            samples,
        ],
    )
    assert spy.steps == [1, 2, 3, 4, 5]
    assert spy.batches == 10
    assert steps_of(path) == [1, 2, 3, 4, 5]
    assert sorted(p.name for p in (tmp_path / "policies").iterdir()) == [
        "step_2",
        "step_4",
    ]
    assert list(samples.samples) == [2, 4, 5]
    # Every batch is in one record, also the one left over.
    found = [r["loss"] for r in records(path) if "end_of_epoch" not in r]
    expected = np.reshape(losses.values, (5, 2)).mean(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_reference_follows_after_updates():
    """Synced whole after every second update: at the end it is the policy."""
    model = model_of()
    sync = ReferenceSync(every=2, alpha=1.0)
    counted = []
    plain = sync.sync
    sync.sync = lambda model: (counted.append(sync.step), plain(model))[1]
    model.fit(data(16), epochs=2, verbose=0, callbacks=[sync])
    assert counted == [2, 4]
    for own, policy in model.reference.variable_pairs():
        np.testing.assert_array_equal(own.value, policy.value)


def test_a_guard_waits_for_updates(caplog):
    caplog.set_level("INFO", "keras_dpo")
    model = model_of()
    model.optimizer.learning_rate = 0.0
    guard = StuckLossGuard(every=4)
    model.fit(data(24), verbose=0, callbacks=[guard])
    assert "every reward" not in caplog.text
    model.fit(data(24), verbose=0, callbacks=[guard])
    assert "after 4 steps every reward is still 0" in caplog.text


@pytest.mark.parametrize("kind", ["plain", "scaled"])
@pytest.mark.parametrize("steps", [2, 3])
def test_a_limit_is_of_updates(kind, steps):
    model = model_of(kind)
    spy = Spy()
    model.fit(data(), epochs=3, verbose=0, callbacks=[spy, StopAfter(steps)])
    assert spy.steps == list(range(1, steps + 1))
    assert spy.batches == ACCUMULATED * steps


@pytest.mark.parametrize("accumulated", [None, ACCUMULATED])
@pytest.mark.slow
def test_skipped_updates_are_none(accumulated, tmp_path):
    """And a run that goes on counts as the straight one does."""

    def train(name, crash_after=None):
        class Crash(keras.callbacks.Callback):
            batches = 0

            def on_train_batch_begin(self, batch, logs=None):
                self.batches += 1
                if self.batches - 1 == crash_after:
                    raise RuntimeError("crash")

        spy = Spy()
        model = model_of("skipping", accumulated)
        model.fit(
            data(),
            epochs=4,
            verbose=0,
            callbacks=[
                spy,
                MetricsFile(tmp_path / f"{name}.jsonl", every=1),
                Crash(),
                TrainingBackup(tmp_path / name, every=1, keep=99),
            ],
        )
        return model, spy.steps

    expected, steps = train("a")
    updates = updates_of(expected.optimizer)
    # All but the first few were made, and some were skipped.
    assert 0 < updates < 20 // (accumulated or 1)
    assert steps == list(range(1, updates + 1))
    assert steps_of(tmp_path / "a.jsonl") == steps
    with pytest.raises(RuntimeError, match="crash"):
        train("b", 17)
    found, _ = train("b")
    check_same(found, expected)
    assert records(tmp_path / "b.jsonl") == records(tmp_path / "a.jsonl")


class Interrupt(keras.callbacks.Callback):
    """Ctrl-C in a batch."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("batches", [3, 5, 7])
@pytest.mark.slow
def test_a_run_goes_on_inside_an_accumulation(batches, tmp_path):
    """After 3 of 5 batches, at an epoch's end with one left over, after 7."""

    def train(name, *more):
        model = model_of()
        model.fit(
            data(),
            epochs=2,
            verbose=0,
            callbacks=[
                MetricsFile(tmp_path / f"{name}.jsonl", every=1),
                ReferenceSync(every=2, alpha=0.5),
                *more,
                TrainingBackup(tmp_path / name, every=1, keep=9),
            ],
        )
        return model

    expected = train("a")
    # The end of an epoch and of the run has a state of its own.
    names = {p.name for p in (tmp_path / "a").glob("[0-9]*")}
    assert names == {"2", "4", "6", "8", "10"}
    with pytest.raises(KeyboardInterrupt):
        train("b", Interrupt(batches))
    assert (tmp_path / "b" / str(batches)).is_dir()
    found = train("b")
    check_same(found, expected)
    assert records(tmp_path / "b.jsonl") == records(tmp_path / "a.jsonl")


@pytest.mark.slow
def test_a_finished_run_keeps_gradients_left_over(tmp_path):
    """The last batch of 5 is no update; the next epoch's first makes it one."""

    def train(epochs, *callbacks):
        model = model_of()
        model.fit(data(), epochs=epochs, verbose=0, callbacks=callbacks)
        return model

    expected = train(2)
    train(1, TrainingBackup(tmp_path, every=1))
    check_same(train(1, TrainingBackup(tmp_path, every=1)), train(1))
    check_same(train(2, TrainingBackup(tmp_path, every=1)), expected)


def check_same(found, expected):
    for part in ("policy", "reference", "optimizer"):
        for a, b in zip(
            values_of(getattr(found, part).variables),
            values_of(getattr(expected, part).variables),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
    assert found.history.history == expected.history.history
