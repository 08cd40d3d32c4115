"""One layer's attention, forward and backward, at 8 x 512: ours and torch's.

    python tests/benchmarks/attention.py --trl PYTHON

SmolLM2-135M's heads (9 queries, 3 keys, 64 wide), float32, causal. Both sides
run in turn in one call, each in a process of its own; the medians are printed.
"""

import argparse
import statistics
import subprocess
import sys

OURS = """
import os, time
os.environ["KERAS_BACKEND"] = "jax"
import jax, jax.numpy as jnp, numpy as np
import keras_dpo
from keras_dpo.compat.compilation import compiler_options
from keras_dpo.data.packing import Packing, pack_batch
from keras_dpo.utils.arrays import BLOCK
from keras_dpo.data.tokenized import Tokenized
from keras_dpo.scoring.row_attention import (
    AttentionSettings, Row, attend_in_blocks)
# Eight sequences of 512: four pairs without a shared prompt.
pairs = [Tokenized([1], [1] * 511, [1] * 511)] * 4
batch = pack_batch(Packing(share_prompt=False), pairs, 4, 512)
row = Row(*(jnp.asarray(batch[n][0]) for n in (
    "row_segments", "row_positions", "blocks_0", "block_counts_0")))
random = np.random.default_rng(0)
query = jnp.asarray(random.standard_normal((3, 3, 4096, 64)), "float32")
key, value = jnp.asarray(random.standard_normal((2, 3, 4096, 64)), "float32")
step = jax.jit(jax.grad(lambda *x: attend_in_blocks(
    *x, row, AttentionSettings(0.125)).sum(), (0, 1, 2)),
    compiler_options=compiler_options("float32"))
run = lambda: jax.block_until_ready(step(query, key, value))
"""
TORCH = """
import time, torch
query = torch.randn(8, 9, 512, 64, requires_grad=True)
key = torch.randn(8, 3, 512, 64, requires_grad=True)
value = torch.randn(8, 3, 512, 64, requires_grad=True)
def run():
    torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True).sum().backward()
"""
TIMED = """
run()
for _ in range(5):
    start = time.perf_counter()
    run()
    print("SECONDS", time.perf_counter() - start)
"""


def seconds(python, script):
    done = subprocess.run(
        [python, "-c", script + TIMED],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith("SECONDS")]
    return [float(line.split()[1]) for line in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", default=sys.executable)
    parser.add_argument("--trl", required=True, help="Python with torch")
    args = parser.parse_args()
    ours, torch = [], []
    for _ in range(10):
        ours += seconds(args.ours, OURS)
        torch += seconds(args.trl, TORCH)
    ours, torch = statistics.median(ours), statistics.median(torch)
    print(f"keras_dpo {ours * 1e3:.0f} ms, torch {torch * 1e3:.0f} ms")
    print(f"torch / keras_dpo: {torch / ours:.2f}")


if __name__ == "__main__":
    main()
