"""A small chat tokenizer, and a random policy of its vocabulary.

Built by code, the same everywhere: byte-level BPE learned from
`tests/data/pairs.json`, ChatML's control tokens, digits one by one, pad ==
EOS and no BOS, as SmolLM2 and Qwen have it.
"""

import collections
import functools
import json
import pathlib

import keras
import numpy as np

PAIRS = pathlib.Path(__file__).parent / "data" / "pairs.json"
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SYSTEM = "You are a helpful assistant."
NUM_MERGES = 700
# With a system message of its own, as many models have one.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def splitter():
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def texts_of_pairs():
    rows = json.loads(PAIRS.read_text())
    return [
        turn["value"]
        for row in rows
        for turn in (*row["conversations"], row["chosen"], row["rejected"])
    ]


def learn_merges(texts, count):
    """The most frequent neighbours, merged one after the other.

    The `tokenizers` trainer breaks ties by the order of a hash map; here the
    greater text wins.
    """
    split = splitter()
    words = collections.Counter(
        word for text in texts for word, _ in split.pre_tokenize_str(text)
    )
    pieces = {word: list(word) for word in words}
    merges = []
    for _ in range(count):
        counts = collections.Counter()
        for word, parts in pieces.items():
            for pair in zip(parts, parts[1:], strict=False):
                counts[pair] += words[word]
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for parts in pieces.values():
            at = 0
            while at < len(parts) - 1:
                if (parts[at], parts[at + 1]) == best:
                    parts[at : at + 2] = ["".join(best)]
                at += 1
    return merges


@functools.cache
def backend_tokenizer():
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    merges = learn_merges([*texts_of_pairs(), SYSTEM], NUM_MERGES)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = [a + b for a, b in merges]
    # Different merges can give the same text, which is one token.
    tokens = dict.fromkeys([*CONTROL, *alphabet, *joined])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = splitter()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(x, special=True, normalized=False) for x in CONTROL]
    )
    return tokenizer


def make_chat_tokenizer():
    """A `PreTrainedTokenizerFast` of about a thousand tokens."""
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend_tokenizer(),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_chat_preset(directory, family="Llama3", seed=0):
    """Write a random two-layer policy with this tokenizer, as a preset."""
    import keras_hub

    import keras_dpo

    tokenizer = make_chat_tokenizer()
    keras.utils.set_random_seed(seed)
    own = {
        "Llama3": {"tie_word_embeddings": True},
        "Gemma3": {"head_dim": 16, "image_size": None},
    }[family]
    backbone = getattr(keras_hub.models, f"{family}Backbone")(
        vocabulary_size=len(tokenizer),
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
        **own,
    )
    policy = getattr(keras_hub.models, f"{family}CausalLM")(
        backbone=backbone, preprocessor=None
    )
    random = np.random.default_rng(seed)
    for variable in policy.trainable_variables:
        noise = 0.1 * random.standard_normal(variable.shape)
        variable.assign(np.asarray(variable) + noise)
    preprocessor = keras_dpo.DPOPreprocessor(tokenizer)
    keras_dpo.save_policy(policy, directory, preprocessor)
    return directory
