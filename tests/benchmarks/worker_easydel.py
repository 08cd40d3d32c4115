"""EasyDeL's side of `compare.py`; runs in EasyDeL's own environment."""

import json
import sys
import tempfile
import time

import easydel
import jax.numpy as jnp
import transformers
from datasets import Dataset
from reporting import report

SETTINGS = {
    "reference": {},
    "reference, checkpointing": {"checkpointing": True},
}


class TimedTrainer(easydel.DPOTrainer):
    """Times from one step's end to the next's; the first compiles."""

    start = None

    def on_step_end(self, state, metrics, step):
        found = super().on_step_end(state, metrics, step)
        loss = float(found[1].loss)
        now = time.perf_counter()
        if self.start is None:
            report(loss=loss)
        else:
            report(seconds=now - self.start)
        self.start = time.perf_counter()
        return found


def main():
    job = json.loads(sys.argv[1])
    with open(job["records"]) as file:
        records = json.load(file)
    prompt = max(len(r["prompt_ids"]) for r in records)
    completion = max(
        len(r[n]) for r in records for n in ("chosen_ids", "rejected_ids")
    )
    checkpointing = SETTINGS[job["setting"]].get("checkpointing")
    model = easydel.AutoEasyDeLModelForCausalLM.from_pretrained(
        job["model"],
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        auto_shard_model=True,
        sharding_axis_dims=(1, 1, 1, 1, -1),
        config_kwargs=easydel.EasyDeLBaseConfigDict(
            attn_dtype=jnp.float32,
            gradient_checkpointing=(
                easydel.EasyDeLGradientCheckPointers.NOTHING_SAVEABLE
                if checkpointing
                else easydel.EasyDeLGradientCheckPointers.NONE
            ),
        ),
        from_torch=True,
    )
    if job["lora_rank"]:
        model = model.apply_lora_to_layers(
            job["lora_rank"], ".*(q_proj|v_proj).*"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    rows = []
    for record in records:
        row = {
            "prompt_input_ids": record["prompt_ids"],
            "prompt_attention_mask": [1] * len(record["prompt_ids"]),
        }
        for side in ("chosen", "rejected"):
            ids = record[f"{side}_ids"]
            row[f"{side}_input_ids"] = record["prompt_ids"] + ids
            row[f"{side}_attention_mask"] = [1] * len(row[f"{side}_input_ids"])
            row[f"{side}_labels"] = [-100] * len(record["prompt_ids"]) + ids
        rows.append(row)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = TimedTrainer(
            easydel.DPOConfig(
                save_directory=scratch,
                max_length=prompt + completion,
                max_prompt_length=prompt,
                max_completion_length=completion,
                total_batch_size=job["pairs"],
                # The first step compiles; its pairs come again at the end.
                max_training_steps=job["steps"] + 1,
                num_train_epochs=2,
                learning_rate=1e-6,
                optimizer="adamw",
                scheduler="none",
                use_wandb=False,
                do_last_save=False,
                do_eval=False,
                shuffle_train_dataset=False,
                track_memory=False,
                progress_bar_type="json",
            ),
            model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
        )
        trainer.train()


main()
