"""How near a training step is to its matrix products alone.

    python tests/benchmarks/profile_step.py --model DIR

Steps with and without recomputed layers, in turn with the products of one,
shape by shape, in the same process: the limit of this work on this machine.
"""

import argparse
import collections
import os
import statistics
import time

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_dpo  # isort: skip
import jax
import keras
import numpy as np
from demo_pairs import add_arguments, load_pairs

from keras_dpo.compat.compilation import compiler_options
from keras_dpo.training.memory import longest_batch
from keras_dpo.training.preparation import prepare


def time_products(model, tokens, scored):
    """Seconds of a step's products alone, each shape on its own."""
    passes = collections.Counter()
    embedding = model.policy.backbone.token_embedding
    for layer in model.policy.backbone.transformer_layers:
        for part in layer._flatten_layers():
            kernel = getattr(part, "kernel", None)
            if kernel is None:
                continue
            width = model.policy.backbone.hidden_dim
            other = int(np.prod(kernel.shape)) // width
            passes[tokens, width, other] += 3
    passes[scored, embedding.output_dim, embedding.input_dim] += 4
    total = 0.0
    work = 0.0
    for (rows, inner, outer), count in passes.items():
        left = np.ones((rows, inner), "float32")
        right = np.ones((inner, outer), "float32")
        product = jax.jit(
            lambda a, b: (a @ b).sum(),
            compiler_options=compiler_options("float32"),
        )
        left, right = jax.device_put((left, right))
        float(product(left, right))
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            float(product(left, right))
            seconds.append(time.perf_counter() - start)
        total += count * statistics.median(seconds)
        work += count * 2.0 * rows * inner * outer
    return total, work


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--remat", nargs="+", default=["none", "layers"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    data = load_pairs(args, f"train[:{3 * args.pairs}]")
    models = {}
    for remat in args.remat:
        model = keras_dpo.DPOModel(
            keras_dpo.load_policy(args.model),
            preprocessor=None,
            reference=None,
            execution=keras_dpo.Execution(remat=remat),
        )
        model.compile(keras.optimizers.AdamW(1e-6), loss="simpo")
        model.fit(data, verbose=0)
        models[remat] = model
    batch = longest_batch(prepare(model, data))
    tokens, scored = batch["row_ids"].size, int(batch["completion_mask"].sum())
    times = collections.defaultdict(list)
    for _ in range(args.rounds):
        for remat, model in models.items():
            start = time.perf_counter()
            model.fit(data, verbose=0)
            times[remat].append((time.perf_counter() - start) / 3)
        seconds, work = time_products(model, tokens, scored)
        times["products"].append(seconds)
    print(f"{tokens} tokens, {scored} scored; products {work / 1e12:.2f} TFLOP")
    for name, values in times.items():
        print(name, [round(v, 2) for v in values])


if __name__ == "__main__":
    main()
