"""Tokenises records exactly as the model will see them at inference."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras

from keras_dpo.data import chat_templates
from keras_dpo.data.chat_format import ChatFormat
from keras_dpo.data.chat_templates import Messages
from keras_dpo.data.control_tokens import StandIns
from keras_dpo.data.conversations import (
    Conversation,
    Segment,
    check_taken,
    unread_fields,
)
from keras_dpo.data.encoding import encode, with_bos, with_end
from keras_dpo.data.limits import Limits
from keras_dpo.data.records import EXTRA_FIELDS, ID_FIELDS
from keras_dpo.data.tokenized import Tokenized
from keras_dpo.data.tokenizers import (
    HuggingFaceTokenizer,
    TextTokenizer,
    as_text_tokenizer,
)
from keras_dpo.data.values import SYSTEM_ROLES, Record
from keras_dpo.errors import UserError

RECORDS_AT_ONCE = 512

# A string, a conversation, or a mapping with `prompt` and `tools`.
Prompt = str | Messages | Record


class DPOPreprocessor:
    """Turns records of text, messages or ids into token ids within limits.

    Strings are used as they are; message lists are rendered by the chat
    template; rows of ids pass through unchanged, whatever their length.

    Args:
        tokenizer: A Hugging Face fast tokenizer, a Keras-Hub tokenizer, or a
            directory with a `tokenizer.json`. None: records hold ids already.
        max_length: Tokens of prompt and completion together.
        max_prompt_length: Tokens of the prompt, truncated from the left, for
            chats by whole turns. None: what `max_length` leaves.
        max_completion_length: Tokens of a completion, truncated from the
            right, then without an end token. None: `max_length` less
            `max_prompt_length`, or less the prompt's own length.
        chat_template: `"auto"`, the tokenizer's own or its family's; the name
            of one in `chat_templates.TEMPLATES`; or Jinja source.
        on_overflow: What to do with text over the limits: `"truncate"`,
            `"drop"` or `"error"`.
        chat_template_kwargs: Further variables of the template, such as
            `{"enable_thinking": False}`.
        date: Date for templates that write it, such as `"2026-11-28"`. None:
            the day the preprocessor is made.

    Raises:
        ValueError: The limits contradict each other, or an option is unknown.

    Example:

    ```python
    preprocessor = keras_dpo.DPOPreprocessor("path/to/model", max_length=1024)
    model = keras_dpo.DPOModel(policy, preprocessor=preprocessor)
    ```
    """

    def __init__(
        self,
        tokenizer: Any = None,
        max_length: int = 512,
        max_prompt_length: int | None = 256,
        max_completion_length: int | None = None,
        chat_template: str | None = "auto",
        on_overflow: str = "truncate",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        date: str | None = None,
    ) -> None:
        self.limits = Limits(
            max_length, max_prompt_length, max_completion_length, on_overflow
        )
        self.tokenizer: TextTokenizer | None = (
            None if tokenizer is None else as_text_tokenizer(tokenizer)
        )
        self.format = ChatFormat(
            self.tokenizer, chat_template, chat_template_kwargs, date
        )
        # Only the template may write control ids.
        tokens = {} if self.tokenizer is None else self.tokenizer.control_tokens
        self._control_ids = set(tokens.values())
        self._stand_ins = StandIns(tokens)

    @classmethod
    def from_policy(
        cls, policy: keras.Model, **options: Any
    ) -> "DPOPreprocessor":
        """Make a preprocessor with the policy's own tokenizer, if any."""
        tokenizer = getattr(policy, "_huggingface_tokenizer", None)
        if tokenizer is None:
            theirs = getattr(policy, "preprocessor", None)
            tokenizer = getattr(theirs, "tokenizer", None)
        own = dict(getattr(policy, "_chat_format", {}))
        own.setdefault("family", chat_templates.family_template(policy))
        trained: Any = getattr(policy, "_trained_with", None)
        if trained is not None:
            tokenizer = trained.tokenizer
            own |= trained.chat_format
        return cls.from_chat_format(tokenizer, own, **options)

    @property
    def chat_format(self) -> dict[str, Any]:
        """Chat settings that the tokenizer itself does not hold:
        `chat_template` and `chat_template_kwargs`."""
        found: dict[str, Any] = {}
        if self.format.chat_template != "auto" and self.has_template():
            found["chat_template"] = self.format.template
        if self.format.chat_template_kwargs:
            found["chat_template_kwargs"] = self.format.chat_template_kwargs
        return found

    def check_can_be_saved(self, policy: keras.Model) -> None:
        """Raise if a config could not restore the tokenizer."""
        theirs = getattr(getattr(policy, "preprocessor", None), "tokenizer", 0)
        own = getattr(self.tokenizer, "tokenizer", None)
        is_hugging_face = isinstance(self.tokenizer, HuggingFaceTokenizer)
        if self.tokenizer is not None and not is_hugging_face:
            if own is not theirs:
                raise UserError(
                    "A Keras-Hub tokenizer is saved with the policy that it "
                    "belongs to. Received: one that the policy's own "
                    "preprocessor does not hold. Make the policy with it, or "
                    "pass the model's tokenizer.json."
                )

    @classmethod
    def from_chat_format(
        cls, tokenizer: Any, own: Mapping[str, Any], **options: Any
    ) -> "DPOPreprocessor":
        """Make a preprocessor with a preset's chat format, unless overridden.

        Args:
            tokenizer: As for the class; its template overrides the family's.
            own: The preset's `chat_template` and `chat_template_kwargs`, if it
                was trained with such, and the name of its `family`'s template,
                which comes last.
            **options: Further arguments of the class.
        """
        tokenizer = None if tokenizer is None else as_text_tokenizer(tokenizer)
        if options.get("chat_template", "auto") == "auto" and tokenizer:
            template = own.get("chat_template")
            if template is None and tokenizer.chat_template is None:
                template = own.get("family")
            options["chat_template"] = template or "auto"
        if options.get("chat_template_kwargs") is None:
            options["chat_template_kwargs"] = own.get("chat_template_kwargs")
        return cls(tokenizer, **options)

    @property
    def end_ids(self) -> list[int]:
        """Ids that end an answer: EOS, and the template's end-of-turn token."""
        tokenizer = self.need_tokenizer()
        ends = [tokenizer.eos_id]
        if self.has_template():
            turns = [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
            ]
            text = self.format.render(turns, False, self._stand_ins)
            after = text.rpartition("b")[2]
            ends += [
                token
                for token in tokenizer.encode([after])[0]
                if token in self._control_ids
            ][:1]
        return list(dict.fromkeys(ends))

    def has_template(self) -> bool:
        """Whether message lists can be rendered."""
        return self.format.has_template()

    def describe_template(self) -> str:
        """Short description of the chat template in use."""
        return self.format.describe_template()

    @property
    def written_date(self) -> str | None:
        """The date, if the template in use writes it."""
        return self.format.written_date

    @property
    def template(self) -> str:
        """The Jinja source in use; raises if there is none."""
        return self.format.template

    @property
    def date(self) -> str:
        """The date that templates are given."""
        return self.format.date

    @property
    def max_length(self) -> int:
        """Maximum tokens of prompt and completion together."""
        return self.limits.max_length

    @property
    def max_prompt_length(self) -> int | None:
        """Maximum tokens of the prompt."""
        return self.limits.max_prompt_length

    @property
    def max_completion_length(self) -> int | None:
        """Maximum tokens of a completion."""
        return self.limits.max_completion_length

    # --- Text -> ids --------------------------------------------------------

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids that the model sees before it answers, as in `generate`.

        Args:
            prompt: A string, messages, or a mapping with messages as `prompt`
                and JSON schemas as `tools`.
        """
        record = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
        stand_ins = self._stand_ins.avoiding([record])
        text = self._prompt_text(record, stand_ins)
        tokenizer = self.need_tokenizer()
        return with_bos(tokenizer, encode(tokenizer, [text], stand_ins)[0])

    def tokenize(
        self, records: Iterable[Record], rows: Sequence[int] | None = None
    ) -> list[Tokenized]:
        """Token ids of every record, in order.

        Args:
            records: See `data.normalize_records`.
            rows: Row numbers for error messages. None: counted from 0.

        Raises:
            ValueError: A record is over a limit and `on_overflow="error"`, or
                needs a tokenizer or a template that is not there.
        """
        records = list(records)
        rows = range(len(records)) if rows is None else rows
        tokenized: list[Tokenized] = []
        for first in range(0, len(records), RECORDS_AT_ONCE):
            part = slice(first, first + RECORDS_AT_ONCE)
            tokenized += self._tokenize(records[part], rows[part])
        return tokenized

    def _tokenize(
        self, records: Sequence[Record], numbers: Sequence[int]
    ) -> list[Tokenized]:
        """Encode one chunk of records in a few batched calls."""
        stand_ins = self._stand_ins.avoiding(records)
        texts: list[str] = []
        plans: list[_Plan | None] = []
        for number, record in zip(numbers, records, strict=True):
            plan = None
            if "chosen_ids" not in record:
                try:
                    plan = self._plan(record, stand_ins)
                except UserError as error:
                    raise UserError(f"Row {number}: {error}") from error
            plans.append(plan)
            texts += plan.texts if plan else []
        encoded = iter(
            encode(self.need_tokenizer(), texts, stand_ins) if texts else ()
        )
        rows = []
        for record, plan in zip(records, plans, strict=True):
            if plan is None:
                # Ids pass through unchanged: no limits apply.
                prompt, chosen, rejected = (list(record[x]) for x in ID_FIELDS)
                row = Tokenized(prompt, chosen, rejected)
            else:
                ids = [next(encoded) for _ in plan.texts]
                row = self._assemble(plan, ids, stand_ins)
                if self.limits.prompt < len(row.prompt_ids):
                    row = self._shorten(record, row)
                row = self.limits.apply(row, self.need_tokenizer().bos_id)
            extras = {k: record[k] for k in EXTRA_FIELDS if k in record}
            dropped = self.limits.drop_cause(row)
            rows.append(row._replace(extras=extras, dropped=dropped))
        for number, row in zip(numbers, rows, strict=True):
            self.limits.check(number, row)
        return rows

    def _plan(self, record: Record, stand_ins: StandIns) -> "_Plan":
        """The texts to encode for one record."""
        prompt = self._prompt_text(record, stand_ins)
        # Text before the last control token cannot merge with the completion.
        tail = max(
            (match.start() for match in stand_ins.control.finditer(prompt)),
            default=0,
        )
        texts = [prompt, prompt[tail:]]
        segments = []
        unread: set[str] = set()
        for field in ("chosen", "rejected"):
            parts = self._segments(record, field, prompt, stand_ins)
            if not isinstance(record[field], str):
                turns = [*record["prompt"], *record[field]]
                conversation = self._conversation(turns, record, stand_ins)
                unread |= unread_fields(conversation)
            segments.append(parts)
            texts.append(prompt[tail:] + parts[0][0])
            texts += [text for text, _ in parts[1:]]
        escaped = any(stand_ins.pattern.search(text) for text in texts)
        return _Plan(texts, segments, escaped, sorted(unread))

    def _assemble(
        self, plan: "_Plan", parts: list[list[int]], stand_ins: StandIns
    ) -> Tokenized:
        """Join the ids of a plan's texts into one record."""
        prompt, tail, parts = parts[0], parts[1], parts[2:]
        tokenizer = self.need_tokenizer()
        notes = []
        if plan.escaped:
            notes.append("control tokens spelled in text, kept as text")
        notes += [
            f"message fields that the template does not read: {name}"
            for name in plan.unread
        ]
        completions: list[list[int]] = []
        scores: list[Any] = []
        for segments in plan.segments:
            joint, rest = parts[0], parts[1 : len(segments)]
            parts = parts[len(segments) :]
            if joint[: len(tail)] == tail:
                first = joint[len(tail) :]
            else:
                # The last prompt token would merge with the answer's first.
                notes.append("merges across the prompt's end broken")
                first = encode(tokenizer, [segments[0][0]], stand_ins)[0]
            pieces = [first, *rest]
            scored = [
                flag
                for piece, (_, flag) in zip(pieces, segments, strict=True)
                for _ in piece
            ]
            ids = with_end(
                tokenizer,
                self._control_ids,
                [token for piece in pieces for token in piece],
            )
            scored = (scored + [True])[: len(ids)]
            completions.append(ids)
            scores.append(None if all(scored) else scored)
        return Tokenized(
            with_bos(tokenizer, prompt),
            chosen_ids=completions[0],
            rejected_ids=completions[1],
            chosen_scored=scores[0],
            rejected_scored=scores[1],
            notes=tuple(notes),
        )

    def _prompt_text(self, record: Record, stand_ins: StandIns) -> str:
        prompt = record["prompt"]
        if isinstance(prompt, str):
            if record.get("tools"):
                raise UserError(
                    "Tools need a prompt of messages. Received: a string. Pass "
                    '[{"role": "user", "content": ...}].'
                )
            return stand_ins.escape(prompt)
        conversation = self._conversation(prompt, record, stand_ins)
        text = conversation.opened(len(prompt))
        check_taken(conversation, text, opened=True)
        return text

    def _segments(
        self, record: Record, field: str, prompt: str, stand_ins: StandIns
    ) -> list[Segment]:
        """The completion's text in parts, each scored or not."""
        completion = record[field]
        if isinstance(completion, str):
            return [(stand_ins.escape(completion), True)]
        turns = [*record["prompt"], *completion]
        conversation = self._conversation(turns, record, stand_ins)
        whole = conversation.text(len(turns))
        first = len(record["prompt"])
        check_taken(conversation, whole, opened=False, first=first)
        try:
            return conversation.segments(whole, first, prompt, stand_ins)
        except UserError as error:
            raise UserError(f"field {field!r}: {error}") from error

    def _conversation(
        self, turns: Messages, record: Record, stand_ins: StandIns
    ) -> Conversation:
        self.need_tokenizer()

        def write(
            messages: Messages, opens: bool, schemas: Messages | None
        ) -> str:
            return self.format.render(messages, opens, stand_ins, schemas)

        return Conversation(turns, record.get("tools"), write)

    def need_tokenizer(self) -> TextTokenizer:
        """Return the tokenizer; raises with a remedy if there is none."""
        if self.tokenizer is None:
            raise UserError(
                "Records of text need a tokenizer. Received: tokenizer=None. "
                "Pass DPOPreprocessor(tokenizer), or records with prompt_ids, "
                "chosen_ids and rejected_ids."
            )
        return self.tokenizer

    def _shorten(self, record: Record, row: Tokenized) -> Tokenized:
        """Drop the oldest turns of a chat whose prompt is too long."""
        turns = record["prompt"]
        if isinstance(turns, str):
            return row
        system = turns[:1] if turns[0]["role"] in SYSTEM_ROLES else []
        rest = turns[len(system) :]
        for start in range(1, len(rest)):
            if rest[start]["role"] != "user":
                continue
            kept = [*system, *rest[start:]]
            ids = self.prompt_ids({**record, "prompt": kept})
            if len(ids) <= self.limits.prompt:
                note = "prompts truncated at a turn"
                return row._replace(prompt_ids=ids, notes=(*row.notes, note))
        return row

    # --- Saving -------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Options, and the whole of a Hugging Face tokenizer."""
        tokenizer: Any = None
        if isinstance(self.tokenizer, HuggingFaceTokenizer):
            tokenizer = self.tokenizer.get_config()
        elif self.tokenizer is not None:
            tokenizer = "policy"
        return {
            "tokenizer": tokenizer,
            **dataclasses.asdict(self.limits),
            "chat_template": self.format.chat_template,
            "chat_template_kwargs": self.format.chat_template_kwargs,
            "date": self.format.date,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], policy: Any = None
    ) -> "DPOPreprocessor":
        """Restore from `get_config`; the policy holds a Keras-Hub tokenizer."""
        config = dict(config)
        tokenizer = config.pop("tokenizer")
        if tokenizer == "policy":
            tokenizer = policy.preprocessor.tokenizer
        elif tokenizer is not None:
            tokenizer = HuggingFaceTokenizer.from_config(tokenizer)
        return cls(tokenizer, **config)


class _Plan(NamedTuple):
    """Texts to encode for one record, and how to assemble the result."""

    texts: list[str]
    segments: list[list[Segment]]
    escaped: bool
    unread: list[str]
