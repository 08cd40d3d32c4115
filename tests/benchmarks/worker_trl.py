"""TRL's side of `compare.py`; runs in TRL's own environment."""

import json
import sys
import tempfile
import time

import torch
import transformers
import trl
from datasets import Dataset
from reporting import report

CONFIGS = {
    "float32": {"bf16": False, "gradient_checkpointing": False},
    "shipped": {},
    "float32, stored reference": {
        "bf16": False,
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": True,
    },
    "bfloat16, stored reference": {
        "bf16": True,
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": True,
    },
    "bfloat16": {"bf16": True, "gradient_checkpointing": False},
}


class IdTrainer(trl.DPOTrainer):
    """Takes token ids as they are, in the order of the file."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Timer(transformers.TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 1:
            report(seconds=time.perf_counter() - self.start)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            report(loss=logs["loss"])


def main():
    job = json.loads(sys.argv[1])
    records = json.load(open(job["records"]))
    options = {"model_init_kwargs": {"dtype": "float32"}}
    if job["setting"] == "shipped":
        options = {}
    model = job["model"]
    if options:
        options = {}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            job["model"], dtype=torch.float32
        )
    peft = None
    if job["lora_rank"]:
        import peft as peft_library

        peft = peft_library.LoraConfig(
            r=job["lora_rank"], target_modules=["q_proj", "v_proj"]
        )
    with tempfile.TemporaryDirectory() as scratch:
        config = trl.DPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=job["pairs"],
            # The first step warms up; its pairs come again at the end.
            max_steps=job["steps"] + 1,
            logging_steps=1,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            max_length=job["max_length"],
            **CONFIGS[job["setting"]],
            **options,
        )
        trainer = IdTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(records),
            processing_class=transformers.AutoTokenizer.from_pretrained(
                job["model"]
            ),
            peft_config=peft,
            callbacks=[Timer()],
        )
        trainer.train()


main()
