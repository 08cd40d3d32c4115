"""Runs that are killed and go on, against runs that are not: the same bits."""

import json
import os
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from conftest import ROOT, environment, random_pairs, tiny_policy, values_of

from keras_dpo import DPOModel, PreferenceDataset
from keras_dpo.callbacks import MetricsFile, ReferenceSync, TrainingBackup

SCRIPT = ROOT / "tests" / "training_run.py"
KINDS = ["full", "lora", "sync", "accumulation", "precomputed"]
# By hand: KERAS_DPO_KILLS=50.
KILLS = int(os.environ.get("KERAS_DPO_KILLS", 2))


def start(directory, kinds, **options):
    return subprocess.Popen(
        [sys.executable, SCRIPT, directory, kinds, json.dumps(options)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """The digests of all final state that the script prints, by kind."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    lines = [x for x in out.splitlines() if x.startswith("DIGEST")]
    digests = [json.loads(line.removeprefix("DIGEST")) for line in lines]
    return {digest.pop("kind"): digest for digest in digests}


def wait_for_steps(process, number):
    """Read its output until so many steps of this process are done."""
    seen = 0
    for line in process.stdout:
        seen += line.startswith("step")
        if seen >= number:
            return True
    return False


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(tmp_path):
    """SIGKILL at random moments, many of them inside a write.

    Weights, reference, optimizer, metrics and history, with dropout, a cosine
    schedule and a batch that is not full.
    """
    whole = finish(start(tmp_path / "whole", ",".join(KINDS)))
    random = np.random.default_rng(0)
    for kill in range(KILLS):
        first = kill % len(KINDS)
        kinds = [*KINDS[first:], *KINDS[:first]]
        every = 1 + kill % 2
        process = start(tmp_path / "killed", ",".join(kinds), every=every)
        wait_for_steps(process, random.integers(1, 9))
        time.sleep(random.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    found = finish(start(tmp_path / "killed", ",".join(KINDS)))
    for kind in KINDS:
        assert found[kind] == whole[kind], kind


@pytest.mark.slow
def test_sigterm_and_ctrl_c_save_and_lose_nothing(tmp_path):
    """SIGTERM ends with 75, Ctrl-C with the exception; both can go on."""
    whole = finish(start(tmp_path / "whole", "full"))
    process = start(tmp_path / "stopped", "full", every=1000, pause=0.3)
    assert wait_for_steps(process, 4)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err[-2000:]
    assert "SIGTERM: ending after this step" in err
    process = start(tmp_path / "stopped", "full", every=1000, pause=0.3)
    assert wait_for_steps(process, 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert "WEIGHTS FINITE True" in out
    assert "KeyboardInterrupt" in err
    assert "WEIGHTS" in out
    backups = tmp_path / "stopped" / "full" / "backups"
    steps = sorted(int(p.name) for p in backups.glob("[0-9]*"))
    assert len(steps) == 2
    assert steps[1] >= 7
    assert finish(start(tmp_path / "stopped", "full", every=1000)) == whole


@pytest.mark.slow
def test_a_full_disk_loses_nothing(tmp_path):
    """No file may grow any more, midway: an error; the backup before is whole.

    With room again the run goes on from it.
    """
    whole = finish(start(tmp_path / "whole", "full"))
    process = start(tmp_path / "full_disk", "full", every=1, full_after=6)
    _, err = process.communicate(timeout=300)
    assert process.returncode not in (0, 75)
    assert "cannot be written to" in err
    assert "The one before is whole: make room" in err
    assert finish(start(tmp_path / "full_disk", "full")) == whole


# --- In one process -----------------------------------------------------------


def model_of(learning_rate=1e-2, **options):
    model = DPOModel(tiny_policy(**options))
    model.compile(keras.optimizers.Adam(learning_rate))
    return model


def data(pairs=12, **options):
    options = {"batch_size": 4, "seed": 3, "verbose": False, **options}
    return PreferenceDataset(random_pairs(pairs), **options)


def run(directory, epochs=2, model=None, dataset=None, callbacks=(), **options):
    model = model or model_of()
    model.fit(
        dataset or data(),
        epochs=epochs,
        verbose=0,
        callbacks=[*callbacks, TrainingBackup(directory, **options)],
    )
    return model


class StopAt(keras.callbacks.Callback):
    """Fails in a step, as a crash would."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def on_train_batch_begin(self, batch, logs=None):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("crash")


def crash(directory, steps, **options):
    with pytest.raises(RuntimeError, match="crash"):
        run(directory, callbacks=[StopAt(steps)], **options)


def test_state_is_kept_every_so_often_and_thinned(tmp_path):
    run(tmp_path / "b", epochs=3, every=2, keep=2)
    found = sorted(int(p.name) for p in (tmp_path / "b").glob("[0-9]*"))
    assert found == [8, 9]


@pytest.mark.slow
def test_history_and_early_stopping_go_on(tmp_path):
    def stopper():
        return keras.callbacks.EarlyStopping("val_loss", patience=10)

    def train(directory, *more):
        model, early = model_of(), stopper()
        model.fit(
            data(),
            epochs=3,
            verbose=0,
            validation_data=random_pairs(4, seed=5),
            callbacks=[*more, early, TrainingBackup(directory, every=1)],
        )
        return model.history.history, early.best, early.wait

    expected = train(tmp_path / "a")
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path / "b", StopAt(5))
    found = train(tmp_path / "b")
    assert found == expected
    assert len(found[0]["loss"]) == 3


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.slow
def test_a_backup_at_an_epoch_s_end_holds_its_history(own, tmp_path):
    """A run that is killed before the next epoch's first backup."""

    def crash(epoch, logs=None):
        if epoch == 1:
            raise RuntimeError("crash")

    def history(directory, *callbacks):
        model = model_of()
        mine = [keras.callbacks.History()] if own else []
        run(directory, model=model, callbacks=[*callbacks, *mine], every=1)
        return model.history.history

    expected = history(tmp_path / "a")
    stop = keras.callbacks.LambdaCallback(on_epoch_begin=crash)
    with pytest.raises(RuntimeError, match="crash"):
        history(tmp_path / "b", stop)
    assert history(tmp_path / "b") == expected


@pytest.mark.slow
def test_metrics_file_has_every_step_once(tmp_path):
    def train(directory, *more):
        metrics = MetricsFile(directory / "metrics.jsonl", every=1)
        run(
            directory / "backups",
            every=2,
            callbacks=[metrics, *more],
        )

    train(tmp_path / "a")
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path / "b", StopAt(5))
    train(tmp_path / "b")

    def records(directory):
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        for record in found:
            record.pop("seconds_per_step", None)
        return found

    assert records(tmp_path / "b") == records(tmp_path / "a")


@pytest.mark.slow
def test_batches_are_numbered_from_the_middle(tmp_path):
    """Callbacks see the epoch's own batch numbers, and no warning."""

    class Seen(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.batches = []

        def on_train_batch_begin(self, batch, logs=None):
            self.batches.append(batch)

    crash(tmp_path, 2, every=1)
    seen = Seen()
    run(tmp_path, callbacks=[seen])
    # The backup of step 2 is written as step 3 begins.
    assert seen.batches in ([1, 2, 0, 1, 2], [2, 0, 1, 2])


def test_keras_still_counts_batches_once(tmp_path):
    """`resumable_epochs` can go when this fails."""
    import inspect

    from keras.src.trainers.epoch_iterator import EpochIterator

    assert "self._num_batches = self.data_adapter.num_batches" in (
        inspect.getsource(EpochIterator.__init__)
    )
    assert "num_batches = self.data_adapter" not in inspect.getsource(
        EpochIterator._enumerate_iterator
    )


@pytest.mark.slow
def test_a_finished_run_has_nothing_left_and_more_epochs_go_on(
    tmp_path, caplog
):
    caplog.set_level("INFO", "keras_dpo")
    first = run(tmp_path, epochs=1)
    again = run(tmp_path, epochs=1)
    assert "nothing to resume" in caplog.text
    for a, b in zip(
        values_of(first.policy.weights),
        values_of(again.policy.weights),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    more = run(tmp_path, epochs=2)
    straight = model_of()
    straight.fit(data(), epochs=2, verbose=0)
    for a, b in zip(
        values_of(more.policy.weights),
        values_of(straight.policy.weights),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dataset": {"pairs": 16}}, "pairs was"),
        ({"dataset": {"batch_size": 6}}, "batch_size was 4 and is 6"),
        ({"dataset": {"seed": 4}}, "seed was 3 and is 4"),
        ({"model": {"learning_rate": 1e-3}}, "optimizer.learning_rate"),
        ({"model": {"layers": 1}}, "variables"),
    ],
)
def test_another_run_is_refused_with_what_differs(tmp_path, change, match):
    run(tmp_path, epochs=1)
    with pytest.raises(ValueError, match=match):
        run(
            tmp_path,
            model=model_of(**change.get("model", {})),
            dataset=data(**change.get("dataset", {})),
        )


@pytest.mark.slow
def test_another_base_under_lora_is_refused(tmp_path):
    def lora(seed):
        policy = tiny_policy(seed=seed)
        policy.backbone.enable_lora(2)
        model = DPOModel(policy)
        model.compile("adam")
        return model

    run(tmp_path, epochs=1, model=lora(0))
    with pytest.raises(ValueError, match="not trained differ"):
        run(tmp_path, model=lora(1))


@pytest.mark.slow
def test_frozen_weights_are_not_written(tmp_path):
    def size(directory):
        return sum(
            p.stat().st_size for p in directory.rglob("*") if p.is_file()
        )

    policy = tiny_policy(layers=4)
    policy.backbone.enable_lora(1)
    model = DPOModel(policy)
    model.compile("adam")
    run(tmp_path / "lora", epochs=1, model=model)
    run(tmp_path / "full", epochs=1, model=model_of(layers=4))
    assert size(tmp_path / "lora") < 0.6 * size(tmp_path / "full")


@pytest.mark.slow
def test_never_moves_earlier_backups_aside(tmp_path):
    run(tmp_path / "b", epochs=1)
    run(tmp_path / "b", epochs=1, resume="never")
    assert (tmp_path / "b.earlier-1" / "3").is_dir()
    assert (tmp_path / "b" / "3").is_dir()


@pytest.mark.slow
def test_a_named_backup_is_gone_on_from(tmp_path):
    expected = run(tmp_path / "a", every=1, keep=10)
    found = run(tmp_path / "b", resume=tmp_path / "a" / "2")
    for a, b in zip(
        values_of(found.policy.weights),
        values_of(expected.policy.weights),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="no whole backup"):
        run(tmp_path / "c", resume=tmp_path / "nothing")


@pytest.mark.slow
def test_a_damaged_backup_is_an_error_with_the_way_out(tmp_path):
    run(tmp_path, epochs=2, every=3)
    newest = max(tmp_path.glob("[0-9]*"), key=lambda p: int(p.name))
    for path in newest.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{newest.name} cannot be read.*Rem"):
        run(tmp_path, epochs=3)
    for path in sorted(newest.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    newest.rmdir()
    run(tmp_path, epochs=3)


def test_a_directory_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        run(file / "backups")


@pytest.mark.parametrize("every", [0, -1, "soon", "0 minutes", 1.5])
def test_intervals_are_checked(every):
    with pytest.raises(ValueError, match="`every` must be"):
        TrainingBackup("x", every=every)


def test_best_weights_are_not_promised(tmp_path):
    early = keras.callbacks.EarlyStopping(restore_best_weights=True)
    with pytest.raises(ValueError, match="best weights"):
        run(tmp_path, callbacks=[early])


@pytest.mark.slow
def test_sync_reference_comes_back(tmp_path):
    def train(directory, *more):
        return run(
            directory,
            every=1,
            callbacks=[ReferenceSync(every=2, alpha=0.5), *more],
        )

    expected = train(tmp_path / "a")
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path / "b", StopAt(5))
    found = train(tmp_path / "b")
    for a, b in zip(
        values_of(found.reference.snapshot),
        values_of(expected.reference.snapshot),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
