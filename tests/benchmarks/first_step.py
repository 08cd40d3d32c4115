"""Seconds from `keras-dpo train` to the first step's end, cold and warm.

    python tests/benchmarks/first_step.py --model DIR

The second start finds the compiled steps of the first.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="../shared/data/dpo_en_demo.json")
    parser.add_argument("more", nargs="*", help="further flags of train")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("cold", "warm"):
            command = [
                sys.executable, "-m", "keras_dpo", "train",
                "--repo_id", args.model, "--dataset_name", args.data,
                "--total_batch_size", "4", "--max_steps", "2",
                "--num_train_epochs", "1", "--log_steps", "1",
                "--num_sample_prompts", "0", "--do_last_save", "false",
                "--compilation_cache", f"{scratch}/compiled",
                "--save_directory", f"{scratch}/{name}", *args.more,
            ]  # fmt: skip
            metrics = f"{scratch}/{name}/DPOTrainer/metrics.jsonl"
            start = time.perf_counter()
            process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            while process.poll() is None and not os.path.exists(metrics):
                time.sleep(0.05)
            seconds = time.perf_counter() - start
            _, error = process.communicate()
            if process.returncode:
                sys.exit(error[-2000:])
            print(f"{name}: {seconds:.1f} s", flush=True)


main()
