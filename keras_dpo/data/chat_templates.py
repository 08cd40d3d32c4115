"""Chat templates per family, for presets whose tokenizer carries none."""

import datetime
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from keras_dpo.errors import UserError
from keras_dpo.utils.time_limit import run_within

Messages = list[dict[str, Any]]
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
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant take turns') }}"
    "{% endif %}{% endfor %}"
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


def is_source(template: str) -> bool:
    """Whether a string is a Jinja template rather than the name of one."""
    return "{{" in template or "{%" in template


def writes_date(template: str) -> bool:
    """Whether a template writes today's date."""
    return "strftime_now" in template


def render(
    template: str,
    messages: Messages,
    add_generation_prompt: bool,
    special_texts: dict[str, str],
    tools: Messages | None = None,
    date: datetime.date | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Render a conversation with a sandboxed Jinja template.

    Args:
        template: Jinja source.
        messages: Messages, with every key that the template may read.
        add_generation_prompt: Whether to open the assistant's next turn.
        special_texts: Texts of special tokens, such as `bos_token`.
        tools: JSON schemas of tools.
        date: Date that `strftime_now` formats. None: today.
        options: Further variables, such as `enable_thinking`.

    Raises:
        ValueError: The template rejects the messages.
    """
    today = date or datetime.date.today()
    midnight = datetime.datetime.combine(today, datetime.time())
    variables = {
        "bos_token": "",
        "eos_token": "",
        **special_texts,
        "strftime_now": midnight.strftime,
        "documents": None,
        **(options or {}),
        "messages": messages,
        "tools": tools or None,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        # Compile outside the time limit: it imports transformers, slowly.
        compiled = _compiled(template)
        return run_within(RENDER_SECONDS, lambda: compiled.render(variables))
    except Exception as error:  # Whatever a template's own code raises.
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise UserError(
            f"The chat template refuses these messages ({roles}): {error}"
        ) from error


def parse_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Parse the arguments of tool calls to mappings, as templates expect.

    Raises:
        ValueError: Arguments are neither a mapping nor the JSON of one.
    """
    calls = message.get("tool_calls")
    if not calls:
        return message
    if not isinstance(calls, list):
        raise UserError(
            "`tool_calls` must be a list of mappings. Received: "
            f"{type(calls).__name__}."
        )
    return {**message, "tool_calls": [_parsed_call(call) for call in calls]}


def _parsed_call(call: Any) -> Any:
    if not isinstance(call, Mapping):
        raise UserError(
            f"`tool_calls` must be a list of mappings. Received: {call!r}."
        )
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _parsed_call(call["function"])}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments or "{}")
    except (json.JSONDecodeError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise UserError(
            "The arguments of a tool call must be a mapping or its JSON. "
            f"Received: {arguments[:60]!r}. Write a call that is broken on "
            "purpose as the message's content."
        )
    return {**call, "arguments": parsed}


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    from transformers.utils import chat_template_utils

    # transformers' own sandbox, with the functions that templates expect.
    return chat_template_utils._compile_jinja_template(template)
