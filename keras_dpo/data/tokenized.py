"""`Tokenized`: one record as token ids."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Tokenized(NamedTuple):
    """One record as token ids.

    Args:
        prompt_ids: With BOS and the template's opening of the answer.
        chosen_ids: With its end token, unless it was cut.
        rejected_ids: Likewise.
        chosen_scored: False where a user turn inside the completion stands;
            None: all is scored.
        rejected_scored: Likewise.
        extras: weight, margin and reference log-probs, where given.
        notes: What was done to it: names of counts.
        dropped: Why it must be dropped, or None.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_scored: list[bool] | None = None
    rejected_scored: list[bool] | None = None
    extras: Mapping[str, float] = MappingProxyType({})
    notes: tuple[str, ...] = ()
    dropped: str | None = None
