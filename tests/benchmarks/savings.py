"""What each fast path saves on the demo data: work and memory, none run.

    python tests/benchmarks/savings.py --model DIR

Compiles the training step of two and of four layers for each switch (as
`keras-dpo plan`) and prints FLOPs and bytes of the longest step of the model,
and the tokens of one epoch.
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_dpo  # isort: skip
import keras
from demo_pairs import add_arguments, load_pairs

from keras_dpo import Execution
from keras_dpo.policies.presets import count_layers, load_outline
from keras_dpo.training.memory import extrapolate

SWITCHES = {
    "default": {},
    "`packing=False`": {"execution": Execution(packing=False)},
    "`prompt_sharing=False`": {"execution": Execution(prompt_sharing=False)},
    '`attention="keras"`': {"execution": Execution(attention="keras")},
    "`split_head=False`": {"execution": Execution(split_head=False)},
    '`reference="precomputed"`': {"reference": "precomputed"},
    '`remat="layers"`': {"execution": Execution(remat="layers")},
    "both": {
        "reference": "precomputed",
        "execution": Execution(remat="layers"),
    },
    '`snapshot_dtype="bfloat16"`': {"snapshot_dtype": "bfloat16"},
    "LoRA, rank 16": {"lora_rank": 16},
}


def measure(args, data, layers, options):
    """The report of an outline, and the tokens of an epoch."""
    options = dict(options)
    policy = load_outline(args.model, layers)
    rank = options.pop("lora_rank", 0)
    if rank:
        policy.backbone.enable_lora(rank)
    model = keras_dpo.DPOModel(policy, preprocessor=None, **options)
    model.compile(keras.optimizers.AdamW(1e-6))
    if model.execution.in_rows:
        rows = data.packed(model._packing(data, 1))
        lengths = [rows.packing.row_length(t) for t in rows.row_totals()]
        tokens = sum(lengths) * rows.packing.num_rows(data.batch_size)
    else:
        tokens = sum(
            data.make_batch(batch)["token_ids"].size
            for batch in data.all_batches()
        )
    return model.memory_report(data), tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    args = parser.parse_args()
    data = load_pairs(args)
    whole = count_layers(args.model)
    print("| switch | tokens of an epoch | TFLOP of the longest step | MiB |")
    print("|---|---|---|---|")
    for name, options in SWITCHES.items():
        few, tokens = measure(args, data, 2, options)
        more, _ = measure(args, data, 4, options)
        found = extrapolate(few, more, (2, 4, whole))
        print(
            f"| {name} | {tokens:,} | {found.flops / 1e12:.2f} | "
            f"{found.peak / 2**20:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
