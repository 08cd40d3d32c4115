"""Gemma3-270M's shape with random weights, for `compare.py --model`.

    TRL_PYTHON tests/benchmarks/make_gemma3.py SMOLLM2 OUT

Runs in TRL's environment. The tokenizer is SmolLM2's: all sides get token ids.
"""

import pathlib
import shutil
import sys

import torch
import transformers


def main():
    tokenizer, out = map(pathlib.Path, sys.argv[1:])
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
        max_position_embeddings=32768,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.Gemma3ForCausalLM(config)
    model.save_pretrained(out)
    for path in tokenizer.glob("tokenizer*"):
        shutil.copy(path, out)


main()
