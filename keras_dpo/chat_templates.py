"""Chat templates per family, for presets whose tokenizer carries none."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from keras_dpo.errors import UserError

Messages = list[dict[str, str]]
# A conversation takes milliseconds; nested loops would take forever.
RENDER_SECONDS = 10.0

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A system message goes in front of the first user turn.
GEMMA = (
    "{{ bos_token }}"
    "{% set start = '' %}{% set turns = messages %}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set start = messages[0]['content'] | trim + '\n\n' %}"
    "{% set turns = messages[1:] %}{% endif %}"
    "{% for message in turns %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else "
    "message['role']) + '\n' + (start if loop.first else '') + "
    "message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}"
    "{% set start = '' %}{% set turns = messages %}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set start = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (start if loop.first else '') + message['content'] + "
    "' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}"
    "{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + "
    "(eos_token if message['role'] == 'assistant' else '') + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "gemma": GEMMA,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "phi3": PHI3,
    "zephyr": ZEPHYR,
}
# Class name of the Keras-Hub CausalLM, without that suffix -> template.
FAMILY_TEMPLATES = {
    "Gemma": "gemma",
    "Gemma3": "gemma",
    "Llama3": "llama3",
    "Mistral": "mistral",
    "Mixtral": "mistral",
    "Phi3": "phi3",
    "Qwen": "chatml",
    "Qwen3": "chatml",
    "QwenMoe": "chatml",
    "SmolLM3": "chatml",
}


def family_template(policy: Any) -> str | None:
    """The template of a Keras-Hub CausalLM's family, if there is one."""
    name = type(policy).__name__.removesuffix("CausalLM")
    return FAMILY_TEMPLATES.get(name)


def render(
    template: str,
    messages: Messages,
    add_generation_prompt: bool,
    special_texts: dict[str, str],
) -> str:
    """The text of a conversation, from a sandboxed Jinja template.

    Raises:
        ValueError: The template refuses the messages.
    """
    try:
        with _time_limit(RENDER_SECONDS):
            return _compiled(template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **{"bos_token": "", "eos_token": "", **special_texts},
            )
    except Exception as error:  # Whatever a template's own code raises.
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"The chat template refuses these messages ({roles}): {error}"
        ) from error


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` inside the block when it takes too long.

    In the main thread alone: only there does Python let a signal in.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer"):
        yield
        return

    def late(*_: Any) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    from transformers.utils import chat_template_utils

    # transformers' own sandbox, with the functions that templates expect.
    return chat_template_utils._compile_jinja_template(template)
