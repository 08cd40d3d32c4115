"""Parses cells of a row into texts, messages, tools and numbers."""

import json
import math
from collections.abc import Mapping
from typing import Any

from keras_dpo.errors import UserError

Row = Mapping[str, Any]
Record = dict[str, Any]
Message = dict[str, Any]

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "observation": "tool",
}
# Roles of a chat's first message that may hold the system text.
SYSTEM_ROLES = ("system", "developer")
# Turns that agree in these keys are equal; other keys are annotations.
TURN_KEYS = (
    "role",
    "content",
    "tool_calls",
    "tool_call_id",
    "name",
    "reasoning_content",
    "reasoning",
    "thinking",
    "function_call",
)


class RowError(UserError):
    """A row does not hold what its layout needs."""

    def __init__(self, field: str, needed: str, received: Any) -> None:
        shown = repr(received)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        super().__init__(
            f"field {field!r} must be {needed}. Received: {shown}."
        )


class TieError(UserError):
    """Neither answer of a row is better."""


def is_empty(value: Any) -> bool:
    """Whether a cell is empty, as if its column were missing."""
    return value is None or value == "" or value == [] or value == {}


def text(row: Row, field: str) -> str:
    """A string field, or an error that names it."""
    value = row.get(field)
    if not isinstance(value, str):
        raise RowError(field, "a string", value)
    return value


def finite_number(value: Any, field: str) -> float:
    """Parse a finite number, or its text; booleans are rejected."""
    number = _parsed_number(value)
    good = isinstance(number, int | float) and not isinstance(number, bool)
    if not good or not math.isfinite(number):
        raise RowError(field, "a finite number", value)
    return float(number)


def binary_choice(value: Any, field: str) -> int:
    """Parse 0 or 1; booleans are rejected, since their meaning is ambiguous."""
    number = _parsed_number(value)
    if isinstance(number, bool) or number not in (0, 1):
        raise RowError(field, "0 or 1", value)
    return int(number)


def _parsed_number(value: Any) -> Any:
    """Parse numeric text, as in CSV cells; return all else unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def parsed_json(value: str, field: str) -> Any:
    """Parse a cell that holds JSON."""
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RowError(field, f"JSON ({error})", value) from error


# --- Messages ---------------------------------------------------------------


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages, in either spelling."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(x, Mapping) for x in value)
        and ("role" in value[0] or "from" in value[0])
    )


def messages(value: Any, field: str) -> list[Message]:
    """Normalize a message or list of messages, keeping all their keys."""
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, list) or not value:
        raise RowError(field, "a list of messages", value)
    return [_message(item, field) for item in value]


def _message(message: Any, field: str) -> Message:
    if not isinstance(message, Mapping):
        raise RowError(field, "a list of messages", message)
    spelling = ("role", "content") if "role" in message else ("from", "value")
    role, content = (message.get(key) for key in spelling)
    rest = {k: v for k, v in message.items() if k not in spelling}
    rest = without_nulls(rest)
    calls = rest.pop("tool_calls", None)
    if role == "function_call":
        # LLaMA-Factory writes a call as the JSON of its name and arguments.
        role, calls, content = "assistant", _factory_calls(content, field), None
    if not is_empty(calls):
        rest["tool_calls"] = _tool_calls(calls, field)
        content = "" if content is None else content
    if isinstance(content, list):
        content = _joined_parts(content, field)
    if not isinstance(role, str) or not isinstance(content, str):
        raise RowError(
            field, "messages with a role and a text content", message
        )
    return {"role": ROLES.get(role, role), "content": content, **rest}


def _tool_calls(calls: Any, field: str) -> list[Any]:
    if isinstance(calls, str):
        calls = parsed_json(calls, field)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list) or not all(
        isinstance(call, Mapping) for call in calls
    ):
        raise RowError(field, "messages whose tool_calls are mappings", calls)
    return calls


def _factory_calls(content: Any, field: str) -> list[Any]:
    if isinstance(content, str):
        content = parsed_json(content, field)
    calls = content if isinstance(content, list) else [content]
    return [{"type": "function", "function": call} for call in calls]


def _joined_parts(parts: list[Any], field: str) -> str:
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise RowError(field, "messages of text parts only", part)
    return "".join(str(part["text"]) for part in parts)


def without_nulls(value: Any) -> Any:
    """The value without keys that are null.

    Arrow gives every mapping of a column the union of their keys.
    """
    if isinstance(value, Mapping):
        return {
            key: without_nulls(item)
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def tools(value: Any, field: str) -> list[Message]:
    """JSON schemas of tools, from a list or its JSON; empty for none."""
    if is_empty(value):
        return []
    if isinstance(value, str):
        value = parsed_json(value, field)
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, list):
        raise RowError(field, "a list of JSON schemas", value)
    schemas = [
        parsed_json(item, field) if isinstance(item, str) else item
        for item in value
    ]
    for schema in schemas:
        if not isinstance(schema, Mapping):
            raise RowError(field, "a list of JSON schemas", schema)
    return [without_nulls(schema) for schema in schemas]


def same_turn(one: Message, other: Message) -> bool:
    """Whether two messages agree in `TURN_KEYS`."""
    return all(one.get(key) == other.get(key) for key in TURN_KEYS)


def starts_with(turns: list[Message], start: list[Message]) -> bool:
    """Whether a conversation begins with all of another's turns."""
    pairs = zip(turns, start, strict=False)
    return len(turns) >= len(start) and all(same_turn(*pair) for pair in pairs)


def common_turns(chosen: list[Message], rejected: list[Message]) -> int:
    """Number of common leading turns, up to the last user turn."""
    size = 0
    while size < min(len(chosen), len(rejected)) - 1 and same_turn(
        chosen[size], rejected[size]
    ):
        size += 1
    # An identical assistant turn at the end is an answer, not a prompt.
    while size and chosen[size - 1]["role"] == "assistant":
        size -= 1
    return size
