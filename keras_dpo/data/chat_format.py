"""`ChatFormat`: the chat template in use, and its variables."""

import datetime
import hashlib
from collections.abc import Mapping
from typing import Any

from keras_dpo.data import chat_templates
from keras_dpo.data.chat_templates import Messages
from keras_dpo.data.control_tokens import StandIns
from keras_dpo.data.tokenizers import TextTokenizer
from keras_dpo.errors import UserError

# Template variables that are set for each prompt.
SET_BY_US = ("messages", "tools", "add_generation_prompt", "strftime_now")


class ChatFormat:
    """Renders messages as text; see `DPOPreprocessor` for the arguments."""

    def __init__(
        self,
        tokenizer: TextTokenizer | None,
        chat_template: str | None,
        chat_template_kwargs: Mapping[str, Any] | None,
        date: str | None,
    ) -> None:
        _check_template(chat_template, chat_template_kwargs)
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.date = _iso_date(date)

    @property
    def template(self) -> str:
        """The Jinja source in use.

        Raises:
            ValueError: There is no template.
        """
        choice = self.chat_template
        if choice == "auto" and self.tokenizer is not None:
            choice = self.tokenizer.chat_template
        if choice is None or choice == "auto":
            raise UserError(
                "Messages need a chat template, and neither the tokenizer nor "
                "its family has one. Pass chat_template=, one of "
                f"{', '.join(chat_templates.TEMPLATES)} or Jinja source."
            )
        return chat_templates.TEMPLATES.get(choice, choice)

    def describe_template(self) -> str:
        """Short description of the chat template in use."""
        if not self.has_template():
            return "none; message lists cannot be rendered"
        if self.chat_template == "auto":
            return "the tokenizer's own"
        names = [
            n for n, x in chat_templates.TEMPLATES.items() if self.template == x
        ]
        if names:
            return names[0]
        digest = hashlib.blake2b(self.template.encode(), digest_size=4)
        return f"given as Jinja source (hash {digest.hexdigest()})"

    def _template_for(self, tools: Any) -> str:
        """The template in use, or the tokenizer's own template for tools."""
        own = None if self.tokenizer is None else self.tokenizer.tool_template
        if tools and own and self.chat_template == "auto":
            return own
        return self.template

    @property
    def written_date(self) -> str | None:
        """The date, if the template in use writes it."""
        if not self.has_template():
            return None
        in_use = self.template + self._template_for(True)
        return self.date if chat_templates.writes_date(in_use) else None

    def has_template(self) -> bool:
        """Whether message lists can be rendered."""
        try:
            return bool(self.template)
        except UserError:
            return False

    def render(
        self,
        messages: Messages,
        opens: bool,
        stand_ins: StandIns,
        tools: Messages | None = None,
    ) -> str:
        """Render messages, with stand-ins for control tokens they spell."""
        # Parse before escaping: JSON may spell a token in its own escapes.
        parsed = [chat_templates.parse_arguments(m) for m in messages]
        return chat_templates.render(
            self._template_for(tools),
            stand_ins.escape(parsed),
            opens,
            {} if self.tokenizer is None else self.tokenizer.special_texts,
            stand_ins.escape(tools),
            datetime.date.fromisoformat(self.date),
            self.chat_template_kwargs,
        )


def _check_template(
    chat_template: str | None, options: Mapping[str, Any] | None
) -> None:
    known = (None, "auto", *chat_templates.TEMPLATES)
    if chat_template not in known and not (
        isinstance(chat_template, str)
        and chat_templates.is_source(chat_template)
    ):
        raise UserError(
            "`chat_template` must be 'auto', one of "
            f"{', '.join(chat_templates.TEMPLATES)}, or Jinja source with "
            f"'{{{{' or '{{%'. Received: {chat_template!r}."
        )
    if options is not None and not isinstance(options, Mapping):
        raise UserError(
            "`chat_template_kwargs` must be a mapping such as "
            f"{{'enable_thinking': False}}. Received: {options!r}."
        )
    for name in options or ():
        if name in SET_BY_US or not isinstance(name, str):
            raise UserError(
                f"`chat_template_kwargs` cannot set {name!r}, which every "
                "prompt has of its own. Leave it out."
            )


def _iso_date(date: str | None) -> str:
    """The date in ISO format; None is today."""
    if date is None:
        return datetime.date.today().isoformat()
    try:
        return datetime.date.fromisoformat(date).isoformat()
    except (TypeError, ValueError) as error:
        raise UserError(
            f"`date` must be a day such as '2026-11-28'. Received: {date!r}."
        ) from error
