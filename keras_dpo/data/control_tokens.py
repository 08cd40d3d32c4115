"""Stand-ins that keep control tokens spelled in the data as plain text."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from keras_dpo.errors import UserError

# Private-use planes 15 and 16, less the two noncharacters that end a plane.
PRIVATE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_ANY_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")


class StandIns:
    """Characters that replace spelled control tokens while text is rendered.

    Args:
        names: Texts of the control tokens.
        taken: Characters of the data, which cannot be stand-ins.
    """

    def __init__(
        self, names: Iterable[str], taken: frozenset[str] = frozenset()
    ) -> None:
        self._names = sorted(names, key=len, reverse=True)
        self.control = re.compile(
            "|".join(map(re.escape, self._names)) or r"(?!)"
        )
        free = (
            chr(code)
            for plane in PRIVATE
            for code in plane
            if chr(code) not in taken
        )
        self._characters = dict(zip(self._names, free, strict=False))
        if len(self._characters) < len(self._names):
            raise UserError(
                "Texts must leave some private characters (U+F0000 and above) "
                f"unused. Received: {len(taken)} of them in 512 rows or fewer."
            )
        self._meant = {c: name for name, c in self._characters.items()}
        spelled = "".join(self._meant)
        self.pattern = re.compile(f"([{spelled}])" if spelled else r"((?!))")

    def avoiding(self, values: Iterable[Any]) -> "StandIns":
        """Stand-ins that occur nowhere in these values."""
        taken = {
            character
            for text in _strings(values)
            for character in _ANY_PRIVATE.findall(text)
        }
        return StandIns(self._names, frozenset(taken)) if taken else self

    def escape(self, value: Any) -> Any:
        """Replace control tokens in all strings of a value, keys included."""
        if isinstance(value, str):
            return self.control.sub(
                lambda match: self._characters[match.group()], value
            )
        if isinstance(value, Mapping):
            return {
                self.escape(key): self.escape(item)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.escape(item) for item in value]
        return value

    def name(self, piece: str) -> str | None:
        """The control token that a piece of `pattern.split` stands for."""
        return self._meant.get(piece)


def _strings(values: Iterable[Any]) -> Iterable[str]:
    """Every string in nested lists and mappings, keys included."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _strings(value)
            yield from _strings(value.values())
        elif isinstance(value, list | tuple):
            yield from _strings(value)
