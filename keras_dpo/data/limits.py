"""`Limits`: maximum lengths of prompts and completions, and truncation."""

import dataclasses
from typing import Any

from keras_dpo.data.tokenized import Tokenized
from keras_dpo.errors import UserError


@dataclasses.dataclass(frozen=True)
class Limits:
    """Length limits in tokens; see `DPOPreprocessor` for the arguments.

    Raises:
        ValueError: The limits contradict each other.
    """

    max_length: int
    max_prompt_length: int | None
    max_completion_length: int | None
    on_overflow: str

    def __post_init__(self) -> None:
        for name in (
            "max_length",
            "max_prompt_length",
            "max_completion_length",
        ):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise UserError(
                    f"`{name}` must be at least 1. Received: {limit!r}."
                )
        if (self.max_prompt_length or 1) >= self.max_length:
            raise UserError(
                "`max_prompt_length` must leave room for a completion. "
                f"Received: max_prompt_length={self.max_prompt_length}, "
                f"max_length={self.max_length}. Raise max_length."
            )
        if self.on_overflow not in ("truncate", "drop", "error"):
            raise UserError(
                "`on_overflow` must be 'truncate', 'drop' or 'error'. "
                f"Received: {self.on_overflow!r}."
            )

    @property
    def prompt(self) -> int:
        """Maximum tokens of a prompt."""
        return self.max_prompt_length or self.max_length - 1

    def apply(self, row: Tokenized, bos: int | None) -> Tokenized:
        """Truncate what is over the limits, and note what was truncated."""
        notes = list(row.notes)
        limit = self.prompt
        prompt = row.prompt_ids
        if len(prompt) > limit:
            notes.append("prompts truncated inside a turn")
            kept = prompt[-limit:]
            if bos is not None and prompt[0] == bos:
                kept = [bos, *prompt[1:][-(limit - 1) :]] if limit > 1 else kept
            prompt = kept
        room = self.max_length - len(prompt)
        if self.max_completion_length is not None:
            room = min(room, self.max_completion_length)
        elif self.max_prompt_length is not None:
            room = min(room, self.max_length - self.max_prompt_length)
        changed: dict[str, Any] = {"prompt_ids": prompt}
        for name in ("chosen", "rejected"):
            ids = getattr(row, f"{name}_ids")
            if len(ids) > room:
                notes.append(f"{name} completions truncated")
                changed[f"{name}_ids"] = ids[:room]
                scored = getattr(row, f"{name}_scored")
                if scored is not None:
                    changed[f"{name}_scored"] = scored[:room]
        return row._replace(notes=tuple(notes), **changed)

    def drop_cause(self, row: Tokenized) -> str | None:
        """Why a row must be dropped, or None."""
        cut = any("truncated" in note for note in row.notes)
        if self.on_overflow == "drop" and cut:
            return "over the limits"
        if not row.prompt_ids:
            return "without a prompt"
        if not (row.chosen_ids and row.rejected_ids):
            return "without a completion"
        if row.chosen_ids == row.rejected_ids:
            return "identical after tokenising" + (" and cutting" * cut)
        for scored in (row.chosen_scored, row.rejected_scored):
            if scored is not None and not any(scored):
                return "without a scored token"
        return None

    def check(self, number: int, row: Tokenized) -> None:
        """Raise if a row was truncated and must not be."""
        if self.on_overflow == "error":
            self._check_whole(number, row)
        _check_references(number, row)

    def _check_whole(self, number: int, row: Tokenized) -> None:
        cut = [note for note in row.notes if "truncated" in note]
        if cut:
            raise UserError(
                f"Row {number} is over the limit: {cut[0]}. "
                f"Received: max_length={self.max_length}, "
                f"max_prompt_length={self.max_prompt_length}, "
                f"max_completion_length={self.max_completion_length}. "
                "Raise them, or set on_overflow='truncate'."
            )


def _check_references(number: int, row: Tokenized) -> None:
    """Raise if reference log-probs cover text that was truncated."""
    cut = any("truncated" in note for note in row.notes)
    given = any(name.startswith("reference") for name in row.extras)
    if cut and given and row.dropped is None:
        raise UserError(
            f"Row {number} is cut to the limits, and its reference log-probs "
            "are of the whole text. Raise max_length, set on_overflow='drop', "
            "or let the reference be computed."
        )
