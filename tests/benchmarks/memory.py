"""Memory that `memory_report` predicts against the peak of the process.

    python tests/benchmarks/memory.py --model DIR [--remat layers] [--stored]

CPU: the peak holds Python, the libraries and what loading leaves, too.
"""

import argparse
import os
import resource

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_dpo  # isort: skip
import keras
from demo_pairs import add_arguments, load_pairs


def now():
    """MiB that the process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--stored", action="store_true")
    args = parser.parse_args()
    data = load_pairs(args, f"train[:{args.pairs * args.steps}]")
    libraries = now()
    policy = keras_dpo.load_policy(args.model)
    weights = sum(v.value.nbytes for v in policy.variables) / 2**20
    print(f"libraries and data {libraries:,.0f} MiB")
    print(f"policy loaded {now():,.0f}, peak {peak():,.0f}; {weights:,.0f} big")
    model = keras_dpo.DPOModel(
        policy,
        preprocessor=None,
        execution=keras_dpo.Execution(remat=args.remat),
        reference="precomputed" if args.stored else "initial",
    )
    model.compile(keras.optimizers.AdamW(1e-6))
    report = model.memory_report(data)
    held = report.policy + report.optimizer + report.reference
    beside = now() - held / 2**20
    predicted = report.peak / 2**20
    print(f"compiled {now():,.0f}, peak {peak():,.0f}")
    model.fit(data, epochs=1, verbose=0)
    print(f"trained {now():,.0f}, peak {peak():,.0f}")
    print(
        f"predicted {predicted:,.0f} and {beside:,.0f} of the process: "
        f"{(predicted + beside) / peak():.2f} of the peak"
    )


main()
