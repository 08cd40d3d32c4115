"""`GenerationSamples`: sample answers of policy and reference in training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from keras_dpo.data.preprocessor import DPOPreprocessor, Prompt
from keras_dpo.policies.generation import generate_each, is_one_prompt
from keras_dpo.training.after_step import AfterStep
from keras_dpo.utils.messages import say

Samples = list[dict[str, str]]


class GenerationSamples(AfterStep):
    """Answers a few prompts with policy and reference every N steps.

    Args:
        prompts: Strings, message lists, or mappings with messages as `prompt`
            and JSON schemas as `tools`; or a single one of these.
        every: Optimizer steps between samples. None samples when training
            begins and ends.
        preprocessor: A `DPOPreprocessor`; defaults to the model's own.
        max_new_tokens: Maximum length of an answer in tokens.
        sampler: A Keras-Hub sampler or its name.
        on_samples: Called with (step, samples), in addition to printing.

    Attributes:
        samples: Step -> list of prompt, policy and reference texts.
    """

    def __init__(
        self,
        prompts: Prompt | Sequence[Prompt],
        every: int | None = None,
        preprocessor: DPOPreprocessor | None = None,
        max_new_tokens: int = 64,
        sampler: Any = "greedy",
        on_samples: Callable[[int, Samples], None] | None = None,
    ) -> None:
        super().__init__()
        one = is_one_prompt(prompts)
        self.prompts: list[Any] = [prompts] if one else list(prompts)
        self.every = every
        self.preprocessor = preprocessor
        self.max_new_tokens = max_new_tokens
        self.sampler = sampler
        self.on_samples = on_samples
        self.samples: dict[int, Samples] = {}

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        if self.every is None:
            self._sample()

    def after_step(self, step: int) -> None:
        if self.every is not None and step % self.every == 0:
            self._sample()

    def on_train_end(self, logs: Any = None) -> None:
        if self.step not in self.samples:
            self._sample()

    def _sample(self) -> None:
        # Reading `self.model` syncs the variables from the step state.
        samples = sample_answers(
            self.model,
            self.prompts,
            self.preprocessor,
            self.max_new_tokens,
            self.sampler,
        )
        self.samples[self.step] = samples
        for sample in samples:
            say(f"Step {self.step}, prompt: {sample['prompt']}")
            for side in ("policy", "reference"):
                if side in sample:
                    say(f"  {side}: {sample[side]}")
        if self.on_samples is not None:
            self.on_samples(self.step, samples)


def sample_answers(
    model: Any,
    prompts: Sequence[Prompt],
    preprocessor: DPOPreprocessor | None = None,
    max_new_tokens: int = 64,
    sampler: Any = "greedy",
) -> Samples:
    """Answer each prompt with the policy and, if any, the reference."""
    preprocessor = preprocessor or model.preprocessor
    if not prompts:
        return []

    def answer(policy: keras.Model) -> list[str]:
        return generate_each(
            policy, preprocessor, prompts, max_new_tokens, sampler
        )

    columns = {"policy": answer(model.policy)}
    with model._ensure_reference().as_model() as reference:
        if reference is not None:
            columns["reference"] = answer(reference)
    return [
        {
            "prompt": prompt_text(prompt),
            **{side: texts[i] for side, texts in columns.items()},
        }
        for i, prompt in enumerate(prompts)
    ]


def prompt_text(prompt: Prompt) -> str:
    """The last turn of a prompt, as a string to display."""
    turns: Any = prompt["prompt"] if isinstance(prompt, Mapping) else prompt
    return turns if isinstance(turns, str) else turns[-1]["content"]
