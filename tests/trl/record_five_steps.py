"""Five SGD steps of TRL on the oracle's tiny Llama; numbers for our tests.

Runs in an environment of its own, never the project's:

    python -m venv trl && trl/bin/pip install torch==2.13.0
    trl/bin/pip install trl==1.16.0
    trl/bin/python tests/trl/record_five_steps.py

It reads `tests/oracle` and writes `five_steps.json` beside itself.
"""

import json
import pathlib
import tempfile

import torch
import transformers
import trl
from datasets import Dataset

HERE = pathlib.Path(__file__).parent
ORACLE = HERE.parent / "oracle"


class IdTrainer(trl.DPOTrainer):
    """Takes token ids as they are."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def losses_of_five_steps(loss_type, label_smoothing=0.0, rate=0.5):
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(
            ORACLE / name, dtype=torch.float32
        )
        for name in ("tiny_llama", "tiny_llama_ref")
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        ORACLE / "tiny_llama"
    )
    pairs = json.loads((ORACLE / "tiny_llama.json").read_text())["pairs"]
    with tempfile.TemporaryDirectory() as scratch:
        config = trl.DPOConfig(
            output_dir=scratch,
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            beta=0.1,
            per_device_train_batch_size=len(pairs),
            num_train_epochs=5,
            logging_steps=1,
            learning_rate=rate,
            max_grad_norm=0.0,
            optim="sgd",
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            max_length=None,
        )
        trainer = IdTrainer(
            model=models[0],
            ref_model=models[1],
            args=config,
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
        )
        trainer.train()
    return [
        entry["loss"] for entry in trainer.state.log_history if "loss" in entry
    ]


def main():
    cases = {
        "sigmoid": {"rate": 0.5},
        "hinge": {"rate": 0.5},
        "ipo": {"rate": 0.05},
        "robust": {"rate": 0.5, "label_smoothing": 0.1},
        "apo_zero": {"rate": 0.5},
    }
    recorded = {
        "about": f"TRL {trl.__version__}, torch {torch.__version__}, "
        "float32, CPU; tests/trl/record_five_steps.py",
        "cases": {
            name: {**options, "losses": losses_of_five_steps([name], **options)}
            for name, options in cases.items()
        },
    }
    (HERE / "five_steps.json").write_text(json.dumps(recorded, indent=1))


if __name__ == "__main__":
    main()
