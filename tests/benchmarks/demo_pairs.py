"""The records that the benchmarks of one process run on."""

import keras_dpo
from keras_dpo.policies.presets import load_tokenizer


def add_arguments(parser):
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="../shared/data/dpo_en_demo.json")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)


def load_pairs(args, split=None):
    """Tokenised pairs in batches, prompts up to half of the length."""
    return keras_dpo.PreferenceDataset(
        args.data,
        keras_dpo.DPOPreprocessor(
            load_tokenizer(args.model), args.max_length, args.max_length // 2
        ),
        args.pairs,
        split=split,
        verbose=False,
    )
