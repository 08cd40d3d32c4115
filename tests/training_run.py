"""Small runs with backups, in a process of their own, that can be killed.

    python tests/training_run.py DIRECTORY KIND,KIND,... [JSON]

Prints a line for every step and, at the end of each run, digests of its state.
"""

import json
import pathlib
import resource
import sys
import time

from conftest import random_pairs, tiny_policy

import keras_dpo  # isort: skip
import keras
import numpy as np

from keras_dpo.references.store import hash_weights
from keras_dpo.runs.schedules import WarmupThenDecay


class Tell(keras.callbacks.Callback):
    """Reports steps as they end, and takes its time."""

    def __init__(self, pause, full_after):
        super().__init__()
        self.pause = pause
        self.steps_left = full_after

    def on_train_batch_end(self, batch, logs=None):
        self.steps_left -= 1
        if self.steps_left == 0:
            # What a write to a full disk meets, without a disk.
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
        print(f"step {batch} {float(logs['loss'])!r}", flush=True)
        time.sleep(self.pause)


def make_model(kind, directory):
    policy = tiny_policy(dropout=0.1)
    if kind == "lora":
        policy.backbone.enable_lora(2)
        random = np.random.default_rng(2)
        for variable in policy.trainable_variables:
            variable.assign(0.1 * random.standard_normal(variable.shape))
    model = keras_dpo.DPOModel(
        policy,
        disable_dropout=kind != "full",
        reference="precomputed" if kind == "precomputed" else "initial",
        reference_cache=(
            str(directory / "reference") if kind == "precomputed" else None
        ),
    )
    model.compile(
        keras.optimizers.AdamW(WarmupThenDecay(1e-2, 12, 2, "cosine")),
        loss="sigmoid",
        gradient_accumulation_steps=2 if kind == "accumulation" else 1,
    )
    return model


def run(directory, kind, options):
    model = make_model(kind, directory)
    callbacks = [
        Tell(options.get("pause", 0.0), options.get("full_after", -1)),
        keras_dpo.callbacks.TrainingBackup(
            directory / "backups", every=options.get("every", 2)
        ),
    ]
    if kind == "sync":
        sync = keras_dpo.callbacks.ReferenceSync(every=3, alpha=0.5)
        callbacks.append(sync)
    data = keras_dpo.PreferenceDataset(
        random_pairs(22), batch_size=4, seed=3, verbose=False
    )
    try:
        model.fit(data, epochs=2, verbose=0, callbacks=callbacks)
    finally:
        values = [np.asarray(v.value) for v in model.policy.weights]
        finite = all(np.isfinite(value).all() for value in values)
        print("WEIGHTS FINITE", finite, flush=True)
    digest = {
        "policy": hash_weights(model.policy.variables),
        "reference": hash_weights(model.reference.variables),
        "optimizer": hash_weights(model.optimizer.variables),
        "metrics": hash_weights(model.metrics_variables),
        "history": model.history.history,
    }
    print("DIGEST" + json.dumps({"kind": kind, **digest}), flush=True)


def main():
    options = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    for kind in sys.argv[2].split(","):
        keras.utils.set_random_seed(0)
        run(pathlib.Path(sys.argv[1]) / kind, kind, options)


if __name__ == "__main__":
    main()
