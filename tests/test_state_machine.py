"""Any order of compile, fit, score, save, load, sync, crash and resume.

A policy that three lines of numpy can compute is driven at random; after
every step its log-probs, and the reference's, are held against the copies of
the weights that they must come from.

By hand: KERAS_DPO_STATES=2000 pytest tests/test_state_machine.py
"""

import os
import pathlib
import tempfile

import keras
import numpy as np
import pytest
from conftest import random_pairs
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from keras_dpo import DPOModel, PreferenceDataset
from keras_dpo.callbacks import ReferenceSync, TrainingBackup
from keras_dpo.errors import UserError

EXAMPLES = int(os.environ.get("KERAS_DPO_STATES", 6))
WORDS, WIDTH, RANK, ALPHA = 16, 6, 2, 3
LOSSES = ("sigmoid", "ipo", "simpo")
RATE = 0.2


# --- The policy, and the same in numpy ---------------------------------------


def make_policy(seed, lora):
    """Each token's state is its own embedding through two dense layers."""
    inputs = {
        "token_ids": keras.Input((None,), dtype="int32", name="token_ids"),
        "padding_mask": keras.Input((None,), dtype="int32", name="mask"),
    }
    hidden = keras.layers.Embedding(WORDS, WIDTH)(inputs["token_ids"])
    hidden = keras.layers.Dense(WIDTH, activation="tanh", name="inner")(hidden)
    logits = keras.layers.Dense(WORDS, name="outer")(hidden)
    policy = keras.Model(inputs, logits, name="policy")
    if lora:
        for name in ("inner", "outer"):
            policy.get_layer(name).enable_lora(RANK, lora_alpha=ALPHA)
        policy.layers[1].trainable = False
    random = np.random.default_rng(seed)
    for variable in policy.weights:
        variable.assign(0.7 * random.standard_normal(variable.shape))
    return policy


def copy_of(model):
    """A model's weights by layer and name, in float64."""
    return {
        f"{layer.name}/{v.name}": np.asarray(v.value, "float64")
        for layer in model.layers
        for v in layer.weights
    }


def is_lora(weights):
    return "inner/lora_kernel_a" in weights


def log_probs(weights, dataset):
    """Of whole completions, `(pairs, 2)`; the policy a second time."""

    def kernel(name):
        own = weights[f"{name}/kernel"]
        if is_lora(weights):
            a, b = (weights[f"{name}/lora_kernel_{x}"] for x in "ab")
            own = own + ALPHA / RANK * a @ b
        return own

    (table,) = (v for k, v in weights.items() if k.endswith("/embeddings"))
    hidden = np.tanh(table @ kernel("inner") + weights["inner/bias"])
    logits = hidden @ kernel("outer") + weights["outer/bias"]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = []
    for pair in dataset.pairs:
        for ids in (pair.chosen_ids, pair.rejected_ids):
            before = [pair.prompt_ids[-1], *ids[:-1]]
            found.append(log_p[before, ids].sum())
    return np.reshape(found, (-1, 2))


def key_of(weights):
    """What a store of log-probs belongs to."""
    return tuple((k, v.tobytes()) for k, v in sorted(weights.items()))


def make_dataset(seed):
    return PreferenceDataset(
        random_pairs(6, seed=seed, longest=5, vocabulary=WORDS),
        batch_size=2,
        verbose=False,
        buckets=[16],
    )


def optimizer():
    """One that no loss makes diverge: the numbers stay comparable."""
    return keras.optimizers.SGD(RATE, global_clipnorm=0.5)


class Crash(keras.callbacks.Callback):
    def __init__(self, after):
        super().__init__()
        self.left = after

    def on_train_batch_begin(self, batch, logs=None):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("crash")


class Orders(RuleBasedStateMachine):
    """`reference` is the copy that reference log-probs must come from; None:
    there is no reference, or its weights are gone."""

    @initialize(seed=st.integers(0, 3))
    def begin(self, seed):
        self.root = tempfile.TemporaryDirectory()
        self.path = pathlib.Path(self.root.name)
        os.environ["KERAS_DPO_CACHE"] = str(self.path / "cache")
        self.datasets = [make_dataset(s) for s in range(2)]
        self.stored = set()
        self.count = 0
        self.policy = None
        self.new_model(seed, "initial", False, False)

    def teardown(self):
        if hasattr(self, "root"):
            self.root.cleanup()

    # --- What should hold ----------------------------------------------------

    def next_path(self, suffix):
        self.count += 1
        return self.path / f"{self.count}{suffix}"

    @property
    def needs_reference(self):
        return self.kind is not None and self.loss != "simpo"

    def may_score(self, index):
        """Whether the reference's log-probs of a dataset are to be had."""
        if self.kind != "precomputed" or not self.needs_reference:
            return True
        known = (key_of(self.reference), index) in self.stored
        return known or not self.trained

    def remember(self, index):
        if self.kind == "precomputed" and self.needs_reference:
            self.stored.add((key_of(self.reference), index))

    def scored(self, index, call):
        """Score a dataset, or see it refused where it must be."""
        if not self.may_score(index):
            with pytest.raises(UserError, match="weights are gone"):
                call()
            return None
        found = call()
        self.remember(index)
        return found

    # --- Steps ---------------------------------------------------------------

    @rule(
        seed=st.integers(0, 3),
        kind=st.sampled_from(["initial", "model", "precomputed", None]),
        lora=st.booleans(),
        next_round=st.booleans(),
    )
    def new_model(self, seed, kind, lora, next_round):
        """Of a new policy, or of the one that was trained so far."""
        if not next_round or self.policy is None:
            self.policy = make_policy(seed, lora)
        self.kind, self.loss, self.trained = kind, "sigmoid", False
        self.reference = copy_of(self.policy)
        reference = kind
        if kind == "model":
            reference = make_policy(seed + 5, False)
            self.reference = copy_of(reference)
        self.model = DPOModel(self.policy, reference)
        self.has_snapshot = False
        self.compile("sigmoid")

    @rule(loss=st.sampled_from(LOSSES))
    def compile(self, loss):
        needs_snapshot = self.kind == "initial" and loss != "simpo"
        if needs_snapshot and not self.has_snapshot and self.trained:
            with pytest.raises(UserError, match="initial weights are gone"):
                self.model.compile(optimizer(), loss=loss)
            self.model.compile(optimizer(), loss="simpo")
            self.loss = "simpo"
            return
        self.model.compile(optimizer(), loss=loss)
        self.loss = loss
        self.has_snapshot |= needs_snapshot

    @rule(index=st.integers(0, 1), epochs=st.integers(1, 2))
    def fit(self, index, epochs):
        data = self.datasets[index]
        before = copy_of(self.policy)
        done = self.scored(
            index,
            lambda: self.model.fit(
                data, epochs=epochs, verbose=0, validation_data=data
            ),
        )
        if done is not None:
            self.trained = True
            after = copy_of(self.policy)
            assert any((after[k] != before[k]).any() for k in before)

    @rule(index=st.integers(0, 1))
    def evaluate(self, index):
        call = self.model.evaluate
        found = self.scored(
            index,
            lambda: call(self.datasets[index], return_dict=True, verbose=0),
        )
        at_ln_2 = self.loss == "sigmoid" and self.kind in (
            "initial",
            "precomputed",
        )
        if found and at_ln_2 and not self.trained:
            assert found["loss"] == pytest.approx(np.log(2), abs=1e-5)

    @precondition(lambda self: self.needs_reference and self.kind == "initial")
    @rule(alpha=st.sampled_from([0.5, 1.0]))
    def sync(self, alpha):
        ReferenceSync(every=1, alpha=alpha).sync(self.model)
        now = copy_of(self.policy)
        trained = {
            f"{layer.name}/{v.name}"
            for layer in self.policy.layers
            for v in layer.trainable_variables
        }
        self.reference = {
            k: alpha * now[k] + (1 - alpha) * old if k in trained else old
            for k, old in self.reference.items()
        }

    @rule(compile=st.booleans())
    def save_and_load(self, compile):
        path = self.next_path(".keras")
        self.model.save(path)
        keras.utils.set_random_seed(self.count)
        before = copy_of(self.policy)
        self.model = keras.models.load_model(path, compile=compile)
        self.policy = self.model.policy
        assert self.model.compiled == compile
        assert self.model.has_trained == self.trained
        for name, value in copy_of(self.policy).items():
            np.testing.assert_array_equal(value, before[name])
        # A snapshot that no compiled loss reads is not in the file.
        self.has_snapshot = self.kind == "initial" and self.needs_reference
        if not compile:
            self.compile(self.loss)

    @precondition(lambda self: not self.trained and self.kind != "model")
    @rule(after=st.integers(1, 5), every=st.integers(1, 2))
    def crash_and_resume(self, after, every):
        """Against the same run that was not stopped."""
        if not self.may_score(0):
            return
        self.remember(0)
        start = self.model.get_config(), copy_of(self.policy)
        weights = [np.asarray(v.value) for v in self.policy.weights]

        def run(directory, *callbacks):
            model = DPOModel.from_config(start[0])
            for variable, value in zip(
                model.policy.weights, weights, strict=True
            ):
                variable.assign(value)
            model = DPOModel(model.policy, self.kind)
            model.compile(optimizer(), loss=self.loss)
            backup = TrainingBackup(directory, every=every)
            model.fit(
                self.datasets[0],
                epochs=2,
                verbose=0,
                callbacks=[*callbacks, backup],
            )
            return model

        directory = self.next_path("")
        straight = run(self.next_path(""))
        with pytest.raises(RuntimeError, match="crash"):
            run(directory, Crash(after))
        self.model = run(directory)
        self.policy, self.trained = self.model.policy, True
        self.has_snapshot = self.kind == "initial" and self.needs_reference
        expected = copy_of(straight.policy)
        for name, value in copy_of(self.policy).items():
            np.testing.assert_array_equal(value, expected[name])

    # --- What always holds ---------------------------------------------------

    @invariant()
    def scores_come_from_the_weights(self):
        if not hasattr(self, "model"):
            return
        index = self.count % 2
        data = self.datasets[index]
        scores = self.scored(index, lambda: self.model.predict(data, verbose=0))
        if scores is None:
            return
        policy = log_probs(copy_of(self.policy), data)
        for side, name in enumerate(("chosen", "rejected")):
            np.testing.assert_allclose(
                scores[f"{name}_log_prob"], policy[:, side], atol=2e-4
            )
        if not self.needs_reference and self.kind != "model":
            assert "reference_chosen_log_prob" not in scores
            return
        reference = log_probs(self.reference, data)
        for side, name in enumerate(("chosen", "rejected")):
            np.testing.assert_allclose(
                scores[f"reference_{name}_log_prob"],
                reference[:, side],
                atol=2e-4,
            )

    @invariant()
    def a_user_s_datasets_are_never_written_to(self):
        for data in getattr(self, "datasets", []):
            assert not data.has_reference
            assert (data.epoch, data.first_batch) == (0, 0)
            assert data.packing is None


TestOrders = Orders.TestCase
TestOrders.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=8 if EXAMPLES < 100 else 14,
    deadline=None,
    derandomize=EXAMPLES < 100,
    suppress_health_check=list(HealthCheck),
)
