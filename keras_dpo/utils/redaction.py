"""Redaction of tokens and passwords from files, W&B and the report."""

import os
import re
from typing import Any

HIDDEN = "[hidden]"
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY", re.IGNORECASE)
# Hugging Face, GitHub, OpenAI and Anthropic, AWS; `user:password@`; `?token=`.
SECRET_TEXTS = re.compile(
    r"\bhf_\w{20,}|\bgh[pousr]_\w{20,}|\bsk-[\w-]{20,}|\bAKIA[0-9A-Z]{16}\b"
    r"|(?<=://)[^/\s@]+:[^/\s@]+(?=@)"
    r"|(?<=[?&]token=)[^&\s]+|(?<=Signature=)[^&\s]+",
)
# Shorter environment values are ordinary words, not secrets.
LEAST_LENGTH = 8


def without_secrets(value: Any) -> Any:
    """Return `value` with every secret in its strings replaced by `[hidden]`.

    Secrets are strings that look like tokens, and values of environment
    variables that are named like one.
    """
    if isinstance(value, dict):
        return {k: without_secrets(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_secrets(v) for v in value)
    if not isinstance(value, str):
        return value
    for name, secret in os.environ.items():
        if SECRET_NAMES.search(name) and len(secret) >= LEAST_LENGTH:
            value = value.replace(secret, HIDDEN)
    return SECRET_TEXTS.sub(HIDDEN, value)
