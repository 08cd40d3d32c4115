"""What callbacks, optimizers and limits make of a run that goes on."""

import json
import threading

import keras
import numpy as np
import pytest
from conftest import random_pairs, tiny_policy, values_of

from keras_dpo import DPOModel, DPOPreprocessor, Execution, PreferenceDataset
from keras_dpo.callbacks import MetricsFile, TrainingBackup
from keras_dpo.runs.schedules import WarmupThenDecay
from keras_dpo.training.state import differences
from keras_dpo.training.stop_after import StopAfter


@pytest.fixture(autouse=True)
def _hear(caplog):
    caplog.set_level("INFO", "keras_dpo")


def model_of(optimizer=None, **options):
    model = DPOModel(tiny_policy(), **options)
    model.compile(optimizer or keras.optimizers.Adam(1e-2))
    return model


def data(pairs=12, **options):
    options = {"batch_size": 4, "seed": 3, "verbose": False, **options}
    return PreferenceDataset(random_pairs(pairs), **options)


def run(
    directory=None,
    callbacks=(),
    model=None,
    epochs=2,
    keep=2,
    resume="auto",
    **options,
):
    model = model or model_of()
    callbacks = list(callbacks)
    if directory is not None:
        callbacks.append(TrainingBackup(directory, 1, keep, resume))
    options = {"x": data(), "verbose": 0, **options}
    model.fit(epochs=epochs, callbacks=callbacks, **options)
    return model


class StopAt(keras.callbacks.Callback):
    """Fails as so many batches have been done, as a crash would."""

    def __init__(self, batches):
        super().__init__()
        self.left = batches

    def on_train_batch_begin(self, batch, logs=None):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("crash")


def crash(directory, batches, callbacks=(), **options):
    with pytest.raises(RuntimeError, match="crash"):
        run(directory, [*callbacks, StopAt(batches)], **options)


def check_same(found, expected):
    for name in ("policy", "optimizer"):
        for a, b in zip(
            values_of(getattr(found, name).variables),
            values_of(getattr(expected, name).variables),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
    assert found.history.history == expected.history.history


def records(path):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in found]


# --- Metrics ------------------------------------------------------------------


@pytest.mark.parametrize("how", ["more epochs", "at an epoch's end", "inside"])
@pytest.mark.slow
def test_metrics_begin_anew_with_an_epoch(how, tmp_path):
    def metrics(name):
        return [MetricsFile(tmp_path / name, every=1)]

    expected = run(tmp_path / "a", metrics("a.jsonl"))
    backups = tmp_path / "b"
    if how == "more epochs":
        run(backups, metrics("b.jsonl"), epochs=1)
    else:
        # The backup of a step is written as the next one begins.
        crash(backups, 3 if "end" in how else 5, metrics("b.jsonl"))
    found = run(backups, metrics("b.jsonl"))
    check_same(found, expected)
    assert records(tmp_path / "b.jsonl") == records(tmp_path / "a.jsonl")


# --- What callbacks do as an epoch or training begins -------------------------


class CountEpochs(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.begun = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.begun += 1

    def get_state(self):
        return {"begun": self.begun}

    def set_state(self, state):
        self.begun = state["begun"]


class RateAtTheStart(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.model.optimizer.learning_rate = 0.02


@pytest.mark.slow
@pytest.mark.parametrize("batches", [2, 3, 5])
def test_callbacks_act_on_a_resume_as_in_a_straight_run(batches, tmp_path):
    """Halving the rate at each epoch's start: once for each."""

    def callbacks():
        halve = keras.callbacks.LearningRateScheduler(lambda _, rate: rate / 2)
        return [RateAtTheStart(), halve, CountEpochs()]

    theirs = callbacks()
    expected = run(None, theirs)
    crash(tmp_path, batches, callbacks())
    mine = callbacks()
    found = run(tmp_path, mine)
    assert float(found.optimizer.learning_rate) == pytest.approx(0.005)
    check_same(found, expected)
    assert mine[-1].begun == theirs[-1].begun == 2


# --- Limits -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "higher"), [(2, 5), (3, 7), (4, None), (6, None)]
)
@pytest.mark.slow
def test_a_higher_limit_goes_on(limit, higher, tmp_path, caplog):
    """Inside an epoch, at its end, and with validation at the early end."""

    def limited(name, steps):
        limits = [] if steps is None else [StopAfter(steps)]
        metrics = MetricsFile(tmp_path / f"{name}.jsonl", every=2)
        return run(
            tmp_path / name,
            [metrics, *limits],
            epochs=3,
            validation_data=data(4, shuffle=False),
        )

    expected = limited("a", higher)
    first = limited("b", limit)
    assert int(first.optimizer.iterations.value) == limit
    again = limited("b", limit)
    assert "nothing to resume" in caplog.text
    check_same(again, first)
    caplog.clear()
    found = limited("b", higher)
    assert "nothing to resume" not in caplog.text
    check_same(found, expected)
    assert records(tmp_path / "b.jsonl") == records(tmp_path / "a.jsonl")


def test_a_higher_limit_of_the_same_epochs_is_finished(tmp_path, caplog):
    """The limit was the last epoch's end."""
    first = run(tmp_path, [StopAfter(6)])
    check_same(run(tmp_path, [StopAfter(9)]), first)
    assert "nothing to resume" in caplog.text


class DieInValidation(keras.callbacks.Callback):
    def on_test_begin(self, logs=None):
        raise RuntimeError("crash")


def test_a_limit_that_was_reached_takes_no_further_step(tmp_path):
    """Killed between the last step's backup and the word that it ended."""
    valid = {"validation_data": data(4, shuffle=False)}
    straight = run(tmp_path / "a", [StopAfter(2)], **valid)
    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path / "b", [StopAfter(2), DieInValidation()], **valid)
    found = run(tmp_path / "b", [StopAfter(2)], **valid)
    assert int(found.optimizer.iterations.value) == 2
    for a, b in zip(
        values_of(found.policy.variables),
        values_of(straight.policy.variables),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


class MyStopping(keras.callbacks.EarlyStopping):
    pass


@pytest.mark.slow
def test_a_subclass_of_keras_own_counts_on(tmp_path):
    """As does ModelCheckpoint's own count of batches."""

    def callbacks(name):
        (tmp_path / name).mkdir(exist_ok=True)
        path = str(tmp_path / name / "b{batch}.weights.h5")
        return [
            MyStopping("loss", patience=1, min_delta=1e9),
            keras.callbacks.ModelCheckpoint(
                path, save_freq=2, save_weights_only=True
            ),
        ]

    expected = run(tmp_path / "a", callbacks("ca"), epochs=5)
    assert len(expected.history.history["loss"]) == 2
    crash(tmp_path / "b", 4, callbacks("cb"), epochs=5)
    found = run(tmp_path / "b", callbacks("cb"), epochs=5)
    check_same(found, expected)
    names = [
        sorted(p.name for p in (tmp_path / name).iterdir())
        for name in ("ca", "cb")
    ]
    assert names[0] == names[1]


def test_a_directory_of_backups_may_be_called_a_number(tmp_path):
    expected = run(tmp_path / "7")
    found = run(tmp_path / "b", resume=tmp_path / "7")
    check_same(found, expected)


@pytest.mark.slow
def test_what_early_stopping_ended_stays_finished(tmp_path, caplog):
    def stopped(epochs):
        early = keras.callbacks.EarlyStopping("loss", patience=1, min_delta=1e9)
        callbacks = [early, StopAfter(100)]
        return run(tmp_path, callbacks, epochs=epochs)

    first = stopped(5)
    assert len(first.history.history["loss"]) < 5
    for epochs in (5, 8):
        caplog.clear()
        check_same(stopped(epochs), first)
        assert "nothing to resume" in caplog.text
        assert "EarlyStopping, ended that run. Remove" in caplog.text
    (tmp_path / "finished.json").unlink()
    more = run(tmp_path, epochs=5)
    assert len(more.history.history["loss"]) == 5


@pytest.mark.slow
def test_a_schedule_of_other_steps_is_refused_readably(tmp_path):
    def model(steps, wrap=lambda x: x):
        adam = keras.optimizers.Adam(WarmupThenDecay(1e-2, steps))
        return model_of(wrap(adam))

    run(tmp_path / "a", model=model(6))
    with pytest.raises(ValueError, match="of another run") as told:
        run(tmp_path / "a", model=model(12), epochs=4)
    text = str(told.value)
    assert "optimizer.learning_rate.steps was 6 and is 12. The schedule" in text
    assert "keep their number (--max_steps" in text
    scaled = keras.optimizers.LossScaleOptimizer
    run(tmp_path / "b", model=model(6, scaled))
    with pytest.raises(ValueError, match="keep their number") as told:
        run(tmp_path / "b", model=model(12, scaled), epochs=4)
    assert "optimizer.inner_optimizer.learning_rate.steps was 6" in str(
        told.value
    )


def test_differences_are_named_at_every_depth():
    before = {"a": {"b": {"c": 1, "d": 2}, "e": [1]}, "f": 1, "same": {"x": 1}}
    now = {"a": {"b": {"c": 3, "d": 2}, "e": [2]}, "g": 1, "same": {"x": 1}}
    assert differences(before, now) == [
        "a.b.c was 1 and is 3",
        "a.e was [1] and is [2]",
        "f was 1 and is null",
        "g was null and is 1",
    ]


@pytest.mark.slow
def test_going_on_from_an_older_backup_leaves_the_newer_ones(tmp_path):
    """Of the same directory: they are of another branch of the run."""
    expected = run(tmp_path, keep=9)
    found = run(tmp_path, keep=9, resume=tmp_path / "2")
    check_same(found, expected)
    check_same(run(tmp_path, keep=9), expected)


# --- Settings -----------------------------------------------------------------


@pytest.mark.slow
def test_nested_names_are_no_settings(tmp_path):
    """Keras numbers the names of one process: here 'adam', 'adam_1', ..."""

    def scaled():
        inner = keras.optimizers.Adam(1e-2)
        optimizer = keras.optimizers.LossScaleOptimizer(inner, 1.0)
        assert inner.name not in names
        names.append(inner.name)
        return model_of(optimizer)

    names = []
    expected = run(None, model=scaled())
    crash(tmp_path, 4, model=scaled())
    check_same(run(tmp_path, model=scaled()), expected)


class DatedPreprocessor(DPOPreprocessor):
    """As if its template wrote a date."""

    written_date = None


@pytest.mark.slow
def test_a_date_that_the_template_writes_is_named(tmp_path):
    def dated(date):
        preprocessor = DatedPreprocessor()
        preprocessor.written_date = date
        return data(preprocessor=preprocessor)

    run(tmp_path, x=dated("2026-01-01"), epochs=1)
    with pytest.raises(ValueError, match="of another run") as told:
        run(tmp_path, x=dated("2026-01-02"))
    text = str(told.value)
    assert 'date was "2026-01-01" and is "2026-01-02"' in text
    assert "DPOPreprocessor(date=...) or --template_date" in text
    run(tmp_path, x=dated("2026-01-01"))


# --- Averaged weights ---------------------------------------------------------


def averaging(swap_on_epoch=None, **options):
    optimizer = keras.optimizers.SGD(
        0.5, use_ema=True, ema_momentum=0.5, **options
    )
    model = model_of(optimizer)
    if swap_on_epoch is None:
        return model, []
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
    return model, [swap]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("swap", "scaled"),
    [(None, False), (False, True), (True, False), (True, True)],
)
def test_averaged_weights(swap, scaled, tmp_path):
    """Once at the end, never in a backup, however the run came there.

    The straight run has no backup: it is what Keras alone makes of it.
    """

    def start(directory, *more, epochs=2, fail=None):
        model, callbacks = averaging(swap)
        if scaled:
            model.compile(
                keras.optimizers.LossScaleOptimizer(model.optimizer, 1.0)
            )
        options = {
            "model": model,
            "epochs": epochs,
            "validation_data": data(4, shuffle=False),
        }
        if fail is not None:
            return crash(directory, fail, callbacks, **options)
        return run(directory, [*callbacks, *more], **options)

    expected = start(None)
    raw = run(None, model=model_of(keras.optimizers.SGD(0.5)))
    assert not np.array_equal(
        raw.policy.get_weights()[0], expected.policy.get_weights()[0]
    )
    check_same(start(tmp_path / "whole"), expected)
    # Finished, and opened again.
    check_same_policy(start(tmp_path / "whole"), expected)
    check_same_policy(start(tmp_path / "whole"), expected)
    # More epochs, of a finished run and of one that was opened again.
    start(tmp_path / "more", epochs=1)
    start(tmp_path / "more", epochs=1)
    check_same(start(tmp_path / "more"), expected)
    for batches in (2, 3):
        directory = tmp_path / f"crash-{batches}"
        start(directory, fail=batches)
        check_same(start(directory), expected)


def check_same_policy(found, expected):
    for a, b in zip(
        found.policy.get_weights(), expected.policy.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert found.history.history == expected.history.history


@pytest.mark.slow
@pytest.mark.parametrize(
    ("swap", "limit"), [(None, 4), (False, 4), (True, 4), (True, 3)]
)
def test_averaged_weights_after_a_limit(swap, limit, tmp_path):
    """The early end of an epoch swaps weights; what goes on is not swapped."""

    def start(directory, steps):
        model, callbacks = averaging(swap)
        return run(
            directory,
            [*callbacks, StopAfter(steps)],
            model=model,
            epochs=3,
            validation_data=data(4, shuffle=False),
        )

    first = start(None, limit)
    check_same_policy(start(tmp_path, limit), first)
    check_same_policy(start(tmp_path, limit), first)
    check_same(start(tmp_path, 7), start(None, 7))


@pytest.mark.slow
def test_the_same_swap_callback_goes_on(tmp_path):
    """It remembers that weights are swapped; a backup's are not."""
    expected, callbacks = averaging(True)
    run(None, callbacks, model=expected)
    model, callbacks = averaging(True)
    run(tmp_path, callbacks, model=model, epochs=1)
    run(tmp_path, callbacks, model=model)
    check_same(model, expected)


# --- One dataset as training and validation data ------------------------------


@pytest.mark.parametrize("attention", ["keras", "auto"])
@pytest.mark.slow
def test_validation_on_the_training_pairs_sees_them_all(attention, tmp_path):
    """Also in the epoch that a run went on inside of."""

    def both(directory, crash_after=None):
        pairs = data()
        options = {
            "x": pairs,
            "validation_data": pairs,
            "model": model_of(execution=Execution(attention=attention)),
        }
        if crash_after is not None:
            return crash(directory, crash_after, **options)
        model = run(directory, **options)
        assert (pairs.epoch, pairs.first_batch) == (0, 0)
        return model

    expected = both(None)
    both(tmp_path, 2)
    check_same(both(tmp_path), expected)


# --- Two runs into one directory ----------------------------------------------


@pytest.mark.slow
def test_two_runs_do_not_share_backups(tmp_path):
    """A second one, in another thread, while the first is at work."""
    told = []

    def second():
        try:
            run(tmp_path)
        except ValueError as error:
            told.append(str(error))

    class StartAnother(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    expected = run(None)
    check_same(run(tmp_path, [StartAnother()]), expected)
    assert len(told) == 2
    assert f"TrainingBackup needs {tmp_path} for itself" in told[0]
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["5", "6", "finished.json"]
    # A run that is refused, or that has nothing left to do, lets others in.
    with pytest.raises(ValueError, match="of another run"):
        run(tmp_path, x=data(seed=4))
    run(tmp_path)
    run(tmp_path)


def test_the_run_s_directory_is_locked(tmp_path):
    from keras_dpo.distribution.locks import locked
    from keras_dpo.runs.config import DPOConfig
    from keras_dpo.runs.train import train

    config = DPOConfig(
        repo_id="nothing",
        dataset_name="nothing",
        save_directory=str(tmp_path),
        model_name="run",
    )
    with (
        locked(tmp_path / "run", "Training"),
        pytest.raises(ValueError, match=r"Training needs .*run for itself"),
    ):
        train(config)
    assert list((tmp_path / "run").iterdir()) == []
