"""Generate answers to prompts, encoded exactly as in training."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_dpo.data.preprocessor import DPOPreprocessor, Prompt
from keras_dpo.distribution.processes import to_host
from keras_dpo.errors import UserError
from keras_dpo.policies.positions import num_positions


def is_one_prompt(prompts: Any) -> bool:
    """Whether this is one prompt: a string, a conversation or a mapping.

    A mapping has the keys `prompt` and `tools`.
    """
    if isinstance(prompts, str | Mapping):
        return True
    first = prompts[0] if len(prompts) else None
    return isinstance(first, Mapping) and "role" in first


def generate(
    policy: keras.Model,
    preprocessor: DPOPreprocessor,
    prompts: Any,
    max_new_tokens: int = 64,
    sampler: Any = "greedy",
    strip_special: bool = True,
) -> str | list[str]:
    """Generate answers, without the prompts; a string for a single prompt.

    Args:
        policy: A Keras-Hub CausalLM; its own sampler is left unchanged.
        preprocessor: Encodes the prompts and decodes the answers.
        prompts: A prompt or a list of prompts: a string, a message list for
            the chat template, or a mapping with messages as `prompt` and JSON
            schemas as `tools`.
        max_new_tokens: Maximum length of an answer in tokens.
        sampler: A Keras-Hub sampler or its name.
        strip_special: Whether to strip control tokens.
    """
    one = is_one_prompt(prompts)
    answers = generate_each(
        policy,
        preprocessor,
        [prompts] if one else prompts,
        max_new_tokens,
        sampler,
        strip_special,
    )
    return answers[0] if one else answers


def generate_each(
    policy: keras.Model,
    preprocessor: DPOPreprocessor,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 64,
    sampler: Any = "greedy",
    strip_special: bool = True,
) -> list[str]:
    """Generate an answer to each prompt of a list; see `generate`."""
    if not prompts:
        return []
    prompt_ids = [preprocessor.prompt_ids(prompt) for prompt in prompts]
    answers = generate_ids(
        policy, prompt_ids, preprocessor.end_ids, max_new_tokens, sampler
    )
    tokenizer = preprocessor.need_tokenizer()
    return [tokenizer.decode(ids, strip_special).strip() for ids in answers]


def _make_sampler(sampler: Any) -> Any:
    import keras_hub

    made = keras_hub.samplers.get(sampler)
    if not isinstance(made, keras_hub.samplers.Sampler):
        # Keras-Hub (0.32) hands an unknown name back.
        raise UserError(
            "`sampler` must be a Keras-Hub sampler or its name, such as "
            f"'greedy', 'top_p' or 'top_k'. Received: {sampler!r}."
        )
    return made


def generate_ids(
    policy: keras.Model,
    prompt_ids: Sequence[list[int]],
    end_ids: Sequence[int],
    max_new_tokens: int,
    sampler: Any = "greedy",
) -> list[list[int]]:
    """Generate the token ids of the answers, without end tokens.

    Raises:
        ValueError: Prompt and answer exceed the policy's positions.
    """
    longest = max(map(len, prompt_ids)) + max_new_tokens
    # Rounded up, to compile for few lengths.
    length = -(-longest // 64) * 64
    positions = num_positions(policy)
    if positions is not None:
        if longest > positions:
            raise UserError(
                f"Prompt and answer must fit into the policy's {positions} "
                f"positions. Received: a prompt of {longest - max_new_tokens} "
                f"tokens, max_new_tokens={max_new_tokens}. Shorten the prompt "
                "or lower max_new_tokens."
            )
        length = min(length, positions)
    token_ids = np.zeros((len(prompt_ids), length), "int32")
    mask = np.zeros((len(prompt_ids), length), "int32")
    for row, ids in enumerate(prompt_ids):
        token_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    own = policy.__dict__.get("sampler"), policy.generate_function
    policy.sampler = _make_sampler(sampler)
    policy.generate_function = None
    try:
        # `generate` with a preprocessor attached would tokenize again.
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
