"""Our side of `compare.py`."""

import json
import os
import sys
import time

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_dpo  # isort: skip
import keras
import keras_hub
from reporting import report


class Timer(keras.callbacks.Callback):
    """Times the second epoch: the first compiles."""

    epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        loss = float(logs["loss"])  # Waits for the step.
        seconds = time.perf_counter() - self.start
        if self.epoch == 0:
            report(loss=loss)
        else:
            report(seconds=seconds)


Execution = keras_dpo.Execution
SETTINGS = {
    "default": {},
    "stored reference": {"reference": "precomputed"},
    "plain": {"execution": Execution(attention="keras", split_head=False)},
    "plain, split head": {"execution": Execution(attention="keras")},
    "no packing": {"execution": Execution(packing=False)},
    "no prompt sharing": {"execution": Execution(prompt_sharing=False)},
    "remat": {"execution": Execution(remat="layers")},
    "stored reference, remat": {
        "reference": "precomputed",
        "execution": Execution(remat="layers"),
    },
    "bfloat16": {},
    "bfloat16, stored reference": {"reference": "precomputed"},
    "bfloat16, stored reference, remat": {
        "reference": "precomputed",
        "execution": Execution(remat="layers"),
    },
}


def load(path, dtype):
    """Of a shape with random weights there is no tokenizer of its own."""
    config = json.load(open(os.path.join(path, "config.json")))
    if config["model_type"] == "llama":
        return keras_dpo.load_policy(path, dtype)
    backbone = keras_hub.models.Backbone.from_preset(path, dtype=dtype)
    task = type(backbone).__name__.replace("Backbone", "CausalLM")
    return getattr(keras_hub.models, task)(backbone=backbone, preprocessor=None)


def main():
    job = json.loads(sys.argv[1])
    records = json.load(open(job["records"]))
    is_mixed = job["setting"].startswith("bfloat16")
    policy = load(job["model"], "mixed_bfloat16" if is_mixed else "float32")
    if job["lora_rank"]:
        policy.backbone.enable_lora(job["lora_rank"])
    model = keras_dpo.DPOModel(
        policy, preprocessor=None, **SETTINGS[job["setting"]]
    )
    model.compile(optimizer=keras.optimizers.AdamW(1e-6))
    data = keras_dpo.PreferenceDataset(
        records, batch_size=job["pairs"], shuffle=False, verbose=False
    )
    data.steps_per_epoch = job["steps"]
    model.fit(data, epochs=2, verbose=0, callbacks=[Timer()])


main()
