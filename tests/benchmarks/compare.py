"""Pairs per second and peak memory of a training step, ours and the peers'.

    python tests/benchmarks/compare.py --model DIR \
        --ours PYTHON --trl PYTHON --tunix PYTHON --easydel PYTHON

Each side runs in its own environment (see `docs/benchmarks.md`), on the same
weights and token ids, in turn, `--rounds` times over. What compiles or warms up
is left out (our first epoch, the others' first step), and every pair is in one
timed step of every side. A ratio is only worth something
within one run of this script.
"""

import argparse
import json
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent


def make_records(args, path):
    """Token ids of the demo's first pairs, cut as our preprocessor does."""
    script = f"""
import json, os
os.environ["KERAS_BACKEND"] = "jax"
import keras_dpo
from keras_dpo.policies.presets import load_tokenizer
tokenizer = load_tokenizer({args.model!r})
data = keras_dpo.PreferenceDataset({args.data!r}, keras_dpo.DPOPreprocessor(
    tokenizer, max_length={args.max_length},
    max_prompt_length={args.max_length // 2}), 1, verbose=False)
pairs = data.pairs[:{args.pairs * args.steps}]
if {args.longest_prompts}:
    pairs = sorted(data.pairs, key=lambda p: -len(p.prompt_ids))[
        :{args.pairs * args.steps}]
names = ("prompt_ids", "chosen_ids", "rejected_ids")
json.dump([{{n: list(getattr(p, n)) for n in names}} for p in pairs],
    open({str(path)!r}, "w"))
"""
    if args.tokens:
        write_equal_records(args, path)
    else:
        subprocess.run([args.ours, "-c", script], check=True, cwd=ROOT)
    records = json.loads(path.read_text())
    lengths = [
        (len(r["prompt_ids"]), len(r["chosen_ids"]), len(r["rejected_ids"]))
        for r in records
    ]
    print(
        f"{len(records)} pairs, {sum(2 * p + c + r for p, c, r in lengths)} "
        f"tokens; {sum(p + c + r for p, c, r in lengths)} with prompts once"
    )


def write_equal_records(args, path):
    """Random pairs, each sequence of as many tokens, half of them prompt."""
    generator = random.Random(0)

    def ids(size):
        return [generator.randrange(100, 1000) for _ in range(size)]

    half = args.tokens // 2
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    records = [
        {name: ids(half) for name in names}
        for _ in range(args.pairs * args.steps)
    ]
    path.write_text(json.dumps(records))


def run(args, side, setting, records):
    """Seconds of each timed step, peak MiB, and the losses."""
    job = {
        "records": str(records),
        "model": args.model,
        "setting": setting,
        "pairs": args.pairs,
        "steps": args.steps,
        "max_length": args.max_length,
        "lora_rank": args.lora_rank,
    }
    worker = HERE / f"worker_{side}.py"
    done = subprocess.run(
        [
            getattr(args, "ours" if side == "keras_dpo" else side),
            worker,
            json.dumps(job),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=args.timeout,
    )
    lines = [
        json.loads(line)
        for line in done.stdout.splitlines()
        if line.startswith("{") and '"peak_mib"' in line
    ]
    if done.returncode or not lines:
        print(done.stderr[-2000:], file=sys.stderr)
        return None
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    losses = [line["loss"] for line in lines if "loss" in line]
    return seconds, lines[-1]["peak_mib"], losses


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="../shared/data/dpo_en_demo.json")
    parser.add_argument("--ours", default=sys.executable)
    for side in ("trl", "tunix", "easydel"):
        parser.add_argument(f"--{side}", help=f"Python with {side}")
    parser.add_argument(
        "--sides",
        nargs="+",
        default=["keras_dpo:default", "trl:float32"],
        help="side:setting; the first is what the others are divided by",
    )
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument(
        "--tokens",
        type=int,
        help="random pairs of so many tokens instead of the demo's",
    )
    parser.add_argument("--lora_rank", type=int, default=0)
    parser.add_argument("--longest_prompts", action="store_true")
    parser.add_argument("--timeout", type=float, default=3600)
    args = parser.parse_args()
    # Or TRL would cut what is longer, and do less than the others.
    args.max_length = max(args.max_length, args.tokens or 0)
    seconds = {side: [] for side in args.sides}
    peaks = dict.fromkeys(args.sides, 0)
    with tempfile.TemporaryDirectory() as scratch:
        records = pathlib.Path(scratch) / "records.json"
        make_records(args, records)
        for number in range(args.rounds):
            for side in args.sides:
                found = run(args, *side.split(":"), records)
                if found is None:
                    print(f"round {number}: {side} failed")
                    continue
                seconds[side] += found[0]
                peaks[side] = max(peaks[side], found[1])
                print(
                    f"round {number}: {side}: "
                    f"{[round(s, 2) for s in found[0]]} s, {found[1]} MiB, "
                    f"first loss {found[2][0]:.4f}",
                    flush=True,
                )
    # Means: a side's batches are not the other's, the pairs are.
    print("\n| side | s/step | pairs/s | time / first | peak MiB |")
    print("|---|---|---|---|---|")
    first = statistics.mean(seconds[args.sides[0]])
    for side in args.sides:
        if not seconds[side]:
            continue
        mean = statistics.mean(seconds[side])
        print(
            f"| {side} | {mean:.1f} | {args.pairs / mean:.3f} | "
            f"{mean / first:.2f} | {peaks[side]:,} |"
        )


if __name__ == "__main__":
    main()
