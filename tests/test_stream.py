"""Streams: pairs that are read as training comes to them."""

import json

import datasets
import keras
import numpy as np
import pytest
from conftest import random_pairs, tiny_policy, values_of

import keras_dpo
from keras_dpo import DPOConfig, DPOModel, DPOPreprocessor, Execution
from keras_dpo.callbacks import TrainingBackup
from keras_dpo.data import PreferenceStream, reading
from keras_dpo.data import order as order_module
from keras_dpo.data import stream as stream_module

LIMITS = DPOPreprocessor(None, max_length=32, max_prompt_length=16)


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch):
    """Windows of four batches."""
    for module in (order_module, stream_module):
        monkeypatch.setattr(module, "BALANCED_BATCHES", 4)


class Source:
    """Rows that can be read again, and how many were asked for."""

    def __init__(self, rows):
        self.rows, self.asked, self.begun = rows, 0, 0

    def __iter__(self):
        self.begun += 1
        for row in self.rows:
            self.asked += 1
            yield row


def stream(rows, steps=100, **options):
    return PreferenceStream(
        rows, LIMITS, 2, steps_per_epoch=steps, verbose=False, **options
    )


def seen(dataset, steps):
    """The completions of every batch."""
    return [
        tuple(map(tuple, dataset[i]["completion_ids"].reshape(4, -1).tolist()))
        for i in range(steps)
    ]


def test_every_pair_comes_once_a_pass():
    rows = random_pairs(24)
    data = stream(rows)
    batches = seen(data, 12)
    one_pass = {row for batch in batches for row in batch}
    assert len(one_pass) == 48
    # Pairs stay in their window of four batches, and are mixed there.
    again = seen(stream(rows, shuffle=False), 12)
    for first in (0, 4, 8):
        part, plain = batches[first : first + 4], again[first : first + 4]
        assert sorted(sum(part, ())) == sorted(sum(plain, ()))
        assert part != plain
    # The next pass has the same pairs in another order.
    following = seen(data, 24)[12:]
    assert sorted(sum(following, ())) == sorted(sum(batches, ()))
    assert following != batches
    # A batch is a function of its number, whichever came before.
    assert seen(stream(rows), 3)[2] == batches[2]
    backwards = stream(rows)
    assert [backwards[i]["completion_ids"].sum() for i in (9, 0)] == [
        data[i]["completion_ids"].sum() for i in (9, 0)
    ]


def test_only_what_is_needed_is_read(monkeypatch):
    monkeypatch.setattr(reading, "RECORDS_AT_ONCE", 8)
    source = Source(random_pairs(400))
    data = stream(source)
    assert source.asked <= 8
    seen(data, 9)
    assert source.asked <= 24
    assert source.begun == 1


def sources():
    import grain
    import tensorflow as tf

    rows = random_pairs(30)
    columns = {
        name: tf.ragged.constant([row[name] for row in rows])
        for name in rows[0]
    }
    endless = tf.data.Dataset.from_tensor_slices(columns).repeat()
    return {
        "hugging face": datasets.Dataset.from_list(rows).to_iterable_dataset(),
        "tf.data": endless.map(lambda row: {name: row[name] for name in row}),
        "grain": grain.MapDataset.source(rows).to_iter_dataset(),
        "own": Source(rows),
    }


def fit(source, directory=None, stop=None, **options):
    policy = tiny_policy()
    model = DPOModel(policy, preprocessor=LIMITS, **options)
    model.compile(keras.optimizers.Adam(1e-3))
    callbacks = []
    if directory:
        callbacks.append(TrainingBackup(directory, every=1))
    if stop:
        callbacks.append(
            keras.callbacks.LambdaCallback(on_train_batch_end=stop)
        )
    history = model.fit(
        source,
        batch_size=2,
        epochs=2,
        steps_per_epoch=11,
        callbacks=callbacks,
        verbose=0,
    ).history
    return history["loss"], values_of(policy.weights)


@pytest.mark.parametrize("kind", ["hugging face", "tf.data", "grain", "own"])
@pytest.mark.slow
def test_sources_train_by_steps(kind):
    """Two epochs of eleven steps: the source is read once and a half."""
    losses, _ = fit(sources()[kind])
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(losses, fit(random_pairs_again())[0], rtol=1e-6)


def random_pairs_again():
    return Source(random_pairs(30))


@pytest.mark.parametrize(
    "options", [{}, {"execution": Execution(packing=False)}]
)
@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_same_bits(options, tmp_path):
    expected = fit(Source(random_pairs(30)), **options)

    class StopError(Exception):
        pass

    done = 0

    def stop(batch, logs):
        nonlocal done
        done += 1
        if done == 15:
            raise StopError

    with pytest.raises(StopError):
        fit(Source(random_pairs(30)), tmp_path, stop, **options)
    found = fit(Source(random_pairs(30)), tmp_path, **options)
    assert found[0] == expected[0]
    for a, b in zip(found[1], expected[1], strict=True):
        np.testing.assert_array_equal(a, b)
    # Another source is refused.
    with pytest.raises(ValueError, match="another run: pairs was"):
        fit(Source(random_pairs(30, seed=7)), tmp_path, **options)


def test_going_on_skips_what_was_tokenised():
    data = stream(random_pairs(40))
    seen(data, 15)
    again = stream(random_pairs(40))
    again.set_state(data.get_state())
    reader = again._reader
    reader.each_pair = tokenize = Counting(reader.each_pair)
    np.testing.assert_array_equal(
        again[14]["completion_ids"], data[14]["completion_ids"]
    )
    assert tokenize.firsts == [24]


class Counting:
    def __init__(self, function):
        self.function, self.firsts = function, []

    def __call__(self, first=0):
        self.firsts.append(first)
        return self.function(first)


def test_what_cannot_be_is_told():
    import tensorflow as tf

    rows = random_pairs(9)
    with pytest.raises(ValueError, match="at least 1"):
        stream(rows, steps=0)
    long = {**rows[0], "prompt_ids": [5] * 40}
    with pytest.raises(ValueError, match="Row 0 has .* max_length .* 32"):
        stream([long, *rows])
    once = stream(iter(rows))
    with pytest.raises(ValueError, match="an iterator, and ended after 9 rows"):
        seen(once, 20)
    same = {**rows[0], "rejected_ids": rows[0]["chosen_ids"]}
    with pytest.raises(ValueError, match="No pair is left"):
        stream([same])
    endless = tf.data.Dataset.from_tensors({"prompt": "a"}).repeat()
    model = DPOModel(tiny_policy(), reference="precomputed")
    model.compile()
    with pytest.raises(ValueError, match="no end. Give fit steps_per_epoch"):
        model.fit(endless)
    with pytest.raises(ValueError, match="one of all pairs, and a stream"):
        model.fit(Source(rows), batch_size=2, steps_per_epoch=2)
    with pytest.raises(ValueError, match="a value for every row, and a stream"):
        model.predict(stream(rows))


def test_later_windows_are_checked():
    """An id beyond the vocabulary in the third window stops training."""
    rows = random_pairs(30)
    rows[20] = {**rows[20], "chosen_ids": [64, 2]}
    model = DPOModel(tiny_policy(), preprocessor=LIMITS)
    model.compile()
    with pytest.raises(ValueError, match="Row 20 holds token id 64"):
        model.fit(Source(rows), batch_size=2, steps_per_epoch=12, verbose=0)


@pytest.mark.slow
def test_a_config_streams(tmp_path):
    """Steps are shared by the epochs; validation is read as a whole."""
    keras_dpo.save_policy(tiny_policy(), tmp_path / "preset")
    lines = [json.dumps(pair) + "\n" for pair in random_pairs(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    settings = {
        "repo_id": str(tmp_path / "preset"),
        "dataset_name": str(tmp_path / "pairs.jsonl"),
        "validation_split": "train[:4]",
        "save_directory": str(tmp_path),
        "streaming": True,
        "total_batch_size": 2,
        "num_train_epochs": 2,
        "log_steps": 1,
        "num_sample_prompts": 0,
    }
    with pytest.raises(ValueError, match="`streaming` needs `max_steps`"):
        DPOConfig(**settings)
    with pytest.raises(ValueError, match="reads all pairs before"):
        DPOConfig(**settings, max_steps=5, reference="precomputed")
    done = keras_dpo.train(DPOConfig(**settings, max_steps=5))
    text = (done.directory / "metrics.jsonl").read_text()
    steps = [json.loads(line) for line in text.splitlines()]
    assert [s["step"] for s in steps if "end_of_epoch" not in s] == [
        *range(1, 6)
    ]
    assert len(done.history["val_loss"]) == 2


def test_an_iterator_with_enough_rows_is_enough():
    """Its last window is shorter: 4 batches of 2 a window, 6 are needed."""
    rows = random_pairs(13)
    dataset = stream(iter(rows[:12]), steps=6)
    batches = seen(dataset, 6)
    assert len({side for batch in batches for side in batch}) == 24
    dataset = stream(iter(rows), steps=8)
    with pytest.raises(ValueError, match="ended after 13 rows"):
        seen(dataset, 8)


def test_a_repeated_grain_dataset_never_ends():
    import grain

    rows = random_pairs(6)
    endless = grain.MapDataset.source(rows).repeat()
    model = DPOModel(tiny_policy(layers=1))
    model.compile()
    model.fit(endless, batch_size=2, steps_per_epoch=3, verbose=0)
    with pytest.raises(ValueError, match="has no end"):
        model.evaluate(endless, batch_size=2, verbose=0)
