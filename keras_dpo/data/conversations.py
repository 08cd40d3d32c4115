"""Rendered conversations: where prompts end, and which text is scored."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from keras_dpo.data.chat_templates import Messages
from keras_dpo.data.control_tokens import StandIns
from keras_dpo.errors import UserError

# A piece of text, and whether it is scored.
Segment = tuple[str, bool]
END_OF_REASONING = "</think>"
ROLES_OF_ALL = ("system", "developer", "user", "assistant")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
WRITTEN_KEYS = {"role", "content", "tool_calls", "function_call"}
# Remedies for what a template leaves out, beside another template.
REMEDIES = {
    "function_call": ", or write the call as tool_calls",
    "reasoning": ", or name it reasoning_content",
    "thinking": ", or name it reasoning_content",
    "messages": ", or move their text into a turn that it writes",
}


class Conversation(NamedTuple):
    """Messages, and a function that renders them.

    Args:
        messages: Prompt and completion.
        tools: JSON schemas of the tools, or None.
        write: (messages, whether to open the next answer, tools) -> text.
    """

    messages: Messages
    tools: Messages | None
    write: Callable[[Messages, bool, Messages | None], str]

    def text(self, size: int) -> str:
        """Render the first messages, as a conversation that ends there."""
        return self.write(self.messages[:size], False, self.tools)

    def opened(self, size: int) -> str:
        """Render the first messages and the opening of an answer, as seen by
        `generate`."""
        return self.write(self.messages[:size], True, self.tools)

    def segments(
        self, whole: str, first: int, prompt: str, stand_ins: StandIns
    ) -> list[Segment]:
        """Split the text after the prompt into scored answers and the rest.

        Works on the whole conversation, because templates write a turn
        differently once others follow: Qwen3 puts an empty `<think>` block
        before the last answer only. An answer begins where the text that
        `generate` would see before it ends.

        Args:
            whole: All messages, rendered.
            first: Index of the first message after the prompt.
            prompt: The rendered text that `generate` sees before it.
            stand_ins: Stand-ins used in the texts.

        Raises:
            ValueError: The template changes earlier text once turns follow.
        """
        parts: list[Segment] = []
        end = _behind(whole, prompt)
        for index in range(first, len(self.messages)):
            if self.messages[index]["role"] != "assistant":
                continue
            before = prompt if index == first else self.opened(index)
            start = _behind(whole, before)
            if start > end:
                parts.append((whole[end:start], False))
            end = len(whole)
            if index + 1 < len(self.messages):
                end = start + self._length_of_turn(
                    index, before, whole[start:], stand_ins
                )
            parts.append((whole[start:end], True))
        if end < len(whole):
            parts.append((whole[end:], False))
        return parts or [("", False)]

    def _length_of_turn(
        self, index: int, before: str, after: str, stand_ins: StandIns
    ) -> int:
        """Characters of an answer that others follow: up to its last control
        token, since no model writes the line break after it."""
        alone = self.text(index + 1)
        alone = alone[_behind(alone, before) :]
        cut = next(
            (i for i in range(len(alone)) if after.startswith(alone[i:])),
            len(alone),
        )
        left_out = alone[:cut]
        # An empty reasoning block may be left out; words may not.
        if cut == len(alone) or re.sub(r"<[^<>]*>|\s", "", left_out):
            raise UserError(
                "the chat template leaves out a part of an answer once a later "
                f"turn follows. Received: {left_out[:60]!r}. End the "
                "completion there, or make a row of each answer."
            )
        turn = alone[cut:]
        ends = [match.end() for match in stand_ins.control.finditer(turn)]
        if ends and not turn[ends[-1] :].strip():
            turn = turn[: ends[-1]]
        return len(turn)


def check_taken(
    conversation: Conversation, text: str, opened: bool, first: int = 0
) -> None:
    """Raise if a template leaves out words, tools, calls or reasoning.

    Args:
        conversation: The whole conversation.
        text: The text that the template rendered.
        opened: Whether the text opens the next answer.
        first: Index of the first message to check.

    Raises:
        ValueError: The template renders the same text without them.
    """
    for what, other in _without(conversation, text, opened, first):
        if _writes(other, text, opened):
            remedy = REMEDIES.get(what.split()[0], "")
            raise UserError(
                f"The chat template leaves out {what}: it writes the same "
                "text without. Use the chat_template that the model was "
                f"trained with{remedy}."
            )
    if opened:
        return
    for index in range(first, len(conversation.messages) - 1):
        if _holds_reasoning(conversation.messages[index]):
            # `segments` judges whether it may be dropped once others follow.
            ended = conversation._replace(
                messages=conversation.messages[: index + 1]
            )
            check_taken(ended, ended.text(index + 1), False, index)


def unread_fields(conversation: Conversation) -> set[str]:
    """Message keys, other than those of words and calls, that do not affect
    the text: ids, scores, and which call a tool's result answers."""
    messages = conversation.messages
    names = {name for message in messages for name in message} - WRITTEN_KEYS
    if not names:
        return set()
    text = conversation.text(len(messages))

    def is_same_without(left_out: set[str]) -> bool:
        fewer = [
            {k: v for k, v in message.items() if k not in left_out}
            for message in messages
        ]
        return _writes(conversation._replace(messages=fewer), text, False)

    if is_same_without(names):
        return names
    return {name for name in names if is_same_without({name})}


def _writes(conversation: Conversation, text: str, opened: bool) -> bool:
    try:
        messages = conversation.messages
        return conversation.write(messages, opened, conversation.tools) == text
    except UserError:
        # Rejecting the rest shows that the template reads what was removed.
        return False


def _holds_reasoning(message: Mapping[str, Any]) -> bool:
    if message.get("role") != "assistant":
        return False
    words = message["content"].rpartition(END_OF_REASONING)[0]
    return bool(words.strip()) or any(map(message.get, REASONING_KEYS))


def _without(
    conversation: Conversation, text: str, opened: bool, first: int
) -> Iterator[tuple[str, Conversation]]:
    """Each part that must not be lost, and the conversation without it."""
    messages = conversation.messages
    if conversation.tools and opened:
        yield "the tools", conversation._replace(tools=None)
    for index in range(first, len(messages)):
        message = messages[index]

        def replaced(*other: dict[str, Any], at: int = index) -> Conversation:
            return conversation._replace(
                messages=[*messages[:at], *other, *messages[at + 1 :]]
            )

        role = message.get("role")
        if role not in ROLES_OF_ALL:
            yield f"messages of role {role!r}", replaced()
        names = ["tool_calls", "function_call"]
        # Results are in order: many templates omit which call they answer.
        names += ["name"] if role != "tool" else []
        # Templates drop the reasoning of earlier turns on purpose.
        if index == len(messages) - 1 and not opened:
            names += REASONING_KEYS
            words, _, answer = message["content"].rpartition(END_OF_REASONING)
            if words.strip():
                yield (
                    "the reasoning in an answer",
                    replaced({**message, "content": answer}),
                )
        for name in names:
            if message.get(name):
                rest = {k: v for k, v in message.items() if k != name}
                yield f"{name} of the {role}", replaced(rest)
    yield from _with_other_words(conversation, text, opened, first)


def _with_other_words(
    conversation: Conversation, text: str, opened: bool, first: int
) -> Iterator[tuple[str, Conversation]]:
    """Conversations with altered words in turns that may not be rendered.

    All turns are marked at once; only suspects are then tried one by one.
    """
    messages = conversation.messages
    marked = {
        index: {**messages[index], "content": f"{content}turn-{index}-ends"}
        for index in range(first, len(messages))
        if isinstance(content := messages[index].get("content"), str)
        and content.strip()
    }
    probe = [marked.get(i, message) for i, message in enumerate(messages)]
    try:
        written = conversation.write(probe, opened, conversation.tools)
    except UserError:
        written = ""
    for index, message in marked.items():
        mark = f"turn-{index}-ends"
        if mark in text or mark not in written:
            other = [*messages[:index], message, *messages[index + 1 :]]
            yield (
                f"messages of role {message['role']!r}",
                conversation._replace(messages=other),
            )


def _behind(whole: str, before: str) -> int:
    """Offset in `whole` at which `before`, the text `generate` saw, ends.

    Whitespace may differ: Hermes' template writes a line break after a tool's
    result once an answer follows.

    Raises:
        ValueError: The conversation does not begin with that text.
    """
    if whole.startswith(before):
        return len(before)
    i = j = 0
    while j < len(before):
        if whole[i : i + 1] == before[j]:
            i, j = i + 1, j + 1
        elif whole[i : i + 1].isspace():
            i += 1
        elif before[j].isspace():
            j += 1
        else:
            raise UserError(
                "the chat template writes the prompt differently once the "
                "answer follows. Received a prompt that ends "
                f"{before[-40:]!r}, and with the answer "
                f"{whole[i : i + 40]!r} where they part. Use a template, "
                "or chat_template_kwargs, that only append."
            )
    return i
