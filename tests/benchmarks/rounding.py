"""How far bfloat16's log-probs are from float32's, on rows and as Keras-Hub is.

python tests/benchmarks/rounding.py --model path/to/smollm2
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_dpo  # isort: skip
import numpy as np
from demo_pairs import add_arguments, load_pairs


def log_probs(args, data, dtype, **options):
    policy = keras_dpo.load_policy(args.model, dtype)
    model = keras_dpo.DPOModel(
        policy, preprocessor=None, reference=None, **options
    )
    model.compile(loss="simpo")
    found = model.predict(data, verbose=0)
    return np.stack([found["chosen_log_prob"], found["rejected_log_prob"]])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    args = parser.parse_args()
    data = load_pairs(args, f"train[:{3 * args.pairs}]")
    exact = log_probs(args, data, "float32")
    for name, options in (("rows", {}), ("plain", {"attention": "keras"})):
        found = log_probs(args, data, "mixed_bfloat16", **options)
        error = np.sqrt(np.mean((found - exact) ** 2))
        print(f"{name}: {error:.2f} nats")


if __name__ == "__main__":
    main()
