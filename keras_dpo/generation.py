"""Answers of a policy to prompts, fed exactly the ids it was trained on."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_dpo.chat_templates import Messages
from keras_dpo.distribution import to_host
from keras_dpo.preprocessor import DPOPreprocessor


def generate(
    policy: keras.Model,
    preprocessor: DPOPreprocessor,
    prompts: Sequence[str | Messages],
    max_new_tokens: int = 64,
    sampler: Any = "greedy",
    strip_special: bool = True,
) -> list[str]:
    """The policy's answers, without the prompts.

    Args:
        policy: A Keras-Hub CausalLM; its own sampler is left as it was.
        preprocessor: Makes the prompts' ids and reads the answers'.
        prompts: Strings, or message lists for the chat template.
        max_new_tokens: Tokens of an answer at most.
        sampler: A Keras-Hub sampler or its name.
        strip_special: Whether to leave out control tokens.
    """
    prompt_ids = [preprocessor.prompt_ids(prompt) for prompt in prompts]
    answers = generate_ids(
        policy, prompt_ids, preprocessor.end_ids, max_new_tokens, sampler
    )
    tokenizer = preprocessor.need_tokenizer()
    return [tokenizer.decode(ids, strip_special).strip() for ids in answers]


def generate_ids(
    policy: keras.Model,
    prompt_ids: Sequence[list[int]],
    end_ids: Sequence[int],
    max_new_tokens: int,
    sampler: Any = "greedy",
) -> list[list[int]]:
    """Ids of the answers, without end tokens."""
    import keras_hub

    longest = max(map(len, prompt_ids)) + max_new_tokens
    # Few lengths, few compilations.
    length = -(-longest // 64) * 64
    token_ids = np.zeros((len(prompt_ids), length), "int32")
    mask = np.zeros((len(prompt_ids), length), "int32")
    for row, ids in enumerate(prompt_ids):
        token_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    own = policy.__dict__.get("sampler"), policy.generate_function
    policy.sampler = keras_hub.samplers.get(sampler)
    policy.generate_function = None
    try:
        # `generate` with a preprocessor attached would tokenise again.
        outputs = policy.make_generate_function()(
            {"token_ids": token_ids, "padding_mask": mask}, tuple(end_ids)
        )
    finally:
        policy.sampler, policy.generate_function = own
    answers = []
    rows = to_host(outputs["token_ids"])
    for ids, prompt in zip(rows, prompt_ids, strict=True):
        answer = ids[len(prompt) : len(prompt) + max_new_tokens].tolist()
        ends = [i for i, token in enumerate(answer) if token in end_ids]
        answers.append(answer[: ends[0]] if ends else answer)
    return answers
