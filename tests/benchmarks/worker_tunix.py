"""Tunix's side of `compare.py`; runs in Tunix's own environment.

Tunix pads to fixed lengths: here the least that hold the records, which is
better for it than its `max_prompt_length` and `max_response_length`.
"""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from reporting import report
from tunix.models.gemma3 import model as gemma3
from tunix.models.gemma3 import params_safetensors as gemma3_params
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params as llama3_params
from tunix.sft.dpo import dpo_trainer

SETTINGS = {
    "reference": llama3.RematConfig.NONE,
    "reference, checkpointing": llama3.RematConfig.DECODER,
}


class TimedTrainer(dpo_trainer.DPOTrainer):
    """Times from one step's end to the next's; the first compiles."""

    start = None

    def _post_process_train_step(self, aux):
        super()._post_process_train_step(aux)
        loss = float(self._buffered_train_metrics.losses[-1])
        now = time.perf_counter()
        if self.start is None:
            report(loss=loss)
        else:
            report(seconds=now - self.start)
        self.start = time.perf_counter()


def load(path, mesh, remat):
    with open(path + "/config.json") as file:
        hub = json.load(file)
    sizes = {
        "num_layers": hub["num_hidden_layers"],
        "embed_dim": hub["hidden_size"],
        "hidden_dim": hub["intermediate_size"],
        "num_heads": hub["num_attention_heads"],
        "head_dim": hub["head_dim"],
        "num_kv_heads": hub["num_key_value_heads"],
    }
    if hub["model_type"] == "llama":
        config = llama3.ModelConfig(
            **sizes,
            vocab_size=hub["vocab_size"],
            rope_theta=int(hub["rope_theta"]),
            norm_eps=hub["rms_norm_eps"],
            weight_tying=hub["tie_word_embeddings"],
            remat_config=remat,
        )
        make = llama3_params.create_model_from_safe_tensors
    else:
        config = gemma3.ModelConfig(
            **sizes,
            num_embed=hub["vocab_size"],
            sliding_window_size=hub["sliding_window"],
            remat_config=gemma3.RematConfig[remat.name],
        )
        make = gemma3_params.create_model_from_safe_tensors
    return make(path, config, mesh, dtype=jnp.float32)


def pad(sequences, length, left):
    """Ids and mask, both `(len(sequences), length)`."""
    ids = np.zeros((len(sequences), length), "int32")
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(length - len(sequence), None)
        place = place if left else slice(len(sequence))
        ids[row, place], mask[row, place] = sequence, 1
    return jnp.asarray(ids), jnp.asarray(mask)


def batches(records, pairs):
    prompt = max(len(r["prompt_ids"]) for r in records)
    completion = max(
        len(r[n]) for r in records for n in ("chosen_ids", "rejected_ids")
    )
    for start in range(0, len(records), pairs):
        batch = records[start : start + pairs]
        arrays = {}
        for name in ("prompt", "chosen", "rejected"):
            arrays[f"{name}_ids"], arrays[f"{name}_mask"] = pad(
                [r[f"{name}_ids"] for r in batch],
                prompt if name == "prompt" else completion,
                left=name == "prompt",
            )
        yield dpo_trainer.TrainingInput(**arrays)


def main():
    job = json.loads(sys.argv[1])
    if job["lora_rank"]:
        sys.exit("no LoRA case for Tunix: it needs qwix")
    with open(job["records"]) as file:
        records = json.load(file)
    mesh = jax.sharding.Mesh([jax.devices()[:1]], ("fsdp", "tp"))
    with mesh:
        policy, reference = (
            load(job["model"], mesh, SETTINGS[job["setting"]]) for _ in range(2)
        )
        trainer = TimedTrainer(
            policy,
            reference,
            optax.adamw(1e-6, b2=0.999, weight_decay=0.0),
            dpo_trainer.DPOTrainingConfig(
                eval_every_n_steps=10**9,
                max_steps=job["steps"] + 1,
                max_inflight_computations=1,
                pbar_description=None,
            ),
        )
        train = list(batches(records, job["pairs"]))
        # The first step compiles; its pairs come again at the end.
        trainer.train([*train, train[0]])


main()
