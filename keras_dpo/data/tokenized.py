"""`Tokenized`: one record as token ids."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Tokenized(NamedTuple):
    """One record as token ids.

    Args:
        prompt_ids: Prompt with BOS and the template's opening of the answer.
        chosen_ids: Chosen completion with its end token, unless truncated.
        rejected_ids: Rejected completion, likewise.
        chosen_scored: False at tokens inside the completion that are not the
            assistant's; None if all are scored.
        rejected_scored: Likewise for the rejected completion.
        extras: weight, margin and reference log-probs, if given.
        notes: Changes made to the record, counted by name in the report.
        dropped: Reason to drop the record, or None.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_scored: list[bool] | None = None
    rejected_scored: list[bool] | None = None
    extras: Mapping[str, float] = MappingProxyType({})
    notes: tuple[str, ...] = ()
    dropped: str | None = None
