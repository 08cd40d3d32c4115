"""What large models need on pods of chips: on paper, nothing is run.

    python tests/benchmarks/scaling.py [CASE ...]

Memory comes from `keras-dpo plan` on as many simulated devices; time from the
chips' published rates: products at 40 % of the peak, and gathering kernels over
the data axis three times a step (forward, again for the backward pass, and
scattering gradients). Where the two overlap a step takes the longer one.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
}
CONFIGS = {
    "Llama-3 8B": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "Llama-3 70B": LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "Gemma3 27B": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
        "rms_norm_eps": 1e-6,
        "sliding_window": 1024,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window_pattern": 6,
    },
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published rates: GiB, bfloat16 FLOP/s, bytes/s to other chips."""

    memory: float
    flops: float
    bandwidth: float


CHIPS = {
    # 80 GB; 989 TFLOP/s dense; one 400 Gbit/s NIC a GPU between hosts.
    "H100": Chip(74.5, 989e12, 50e9),
    # NVLink 4 within a host of eight: 450 GB/s each way.
    "H100, one host": Chip(74.5, 989e12, 450e9),
    # 95 GB; 459 TFLOP/s; 4,800 Gbit/s of ICI, both ways together.
    "TPU v5p": Chip(88.5, 459e12, 300e9),
}
CASES = (
    ("Llama-3 8B", "H100, one host", "data=8", 8),
    ("Llama-3 8B", "TPU v5p", "data=8", 8),
    ("Gemma3 27B", "TPU v5p", "data=32", 32),
    ("Gemma3 27B", "H100", "data=32", 32),
    ("Llama-3 70B", "TPU v5p", "data=64", 64),
    ("Llama-3 70B", "H100", "data=64", 64),
    ("Llama-3 70B", "H100", "data=16,model=8", 32),
)
EFFICIENCY = 0.4
PLAN = """
import dataclasses, json, sys
from keras_dpo import DPOConfig
from keras_dpo.runs.plan import plan
print("FOUND" + json.dumps(dataclasses.asdict(plan(DPOConfig(
    repo_id=sys.argv[1], mesh=sys.argv[2], total_batch_size=int(sys.argv[3]),
    max_length=2048, max_prompt_length=1024, dtype="bfloat16",
    reference="precomputed", remat="layers")))))
"""


def plan(name, mesh, pairs):
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory, "config.json")
        path.write_text(json.dumps(CONFIGS[name]))
        done = subprocess.run(
            [sys.executable, "-c", PLAN, directory, mesh, str(pairs)],
            capture_output=True,
            text=True,
        )
    for line in done.stdout.splitlines():
        if line.startswith("FOUND"):
            return json.loads(line.removeprefix("FOUND"))
    sys.exit(done.stderr[-3000:])


def main():
    wanted = sys.argv[1:]
    print(
        "| model | chips | mesh | GiB a chip: state, peak | of | products | "
        "gathering | tokens/s |\n|---|---|---|---|---|---|---|---|"
    )
    for name, chip_name, mesh, pairs in CASES:
        if wanted and name not in wanted:
            continue
        chip = CHIPS[chip_name]
        found = plan(name, mesh, pairs)
        sizes = dict(part.split("=") for part in mesh.split(","))
        data, model = int(sizes["data"]), int(sizes.get("model", 1))
        chips = data * model
        state = found["policy"] + found["optimizer"] + found["reference"]
        peak = (state + found["batch"] + found["temporary"]) / 2**30
        products = found["flops"] / chips / chip.flops / EFFICIENCY
        # Kernels are gathered in bfloat16, gradients scattered in float32.
        kernels = found["policy"] / 4 * data
        moved = kernels * (2 + 2 + 4) * (data - 1) / data
        gathering = moved / chip.bandwidth
        rate = found["tokens"] / max(products, gathering)
        print(
            f"| {name} | {chips} x {chip_name} | {mesh}, {pairs} pairs | "
            f"{state / 2**30:.1f}, {peak:.1f} | {chip.memory:.0f} | "
            f"{products:.2f} s | {gathering:.2f} s | {rate:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
