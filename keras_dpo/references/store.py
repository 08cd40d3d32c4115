"""Reference log-probs on disk, computed once.

A store is a directory named after the content it was computed from: the
reference's weights, the token ids, the number types and the layout. It is
written part by part, each beside its place and renamed, so that a run that is
killed goes on with the next part.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np

from keras_dpo.data.pairs import TokenizedPairs
from keras_dpo.distribution.locks import locked
from keras_dpo.distribution.processes import on_any_process, to_host
from keras_dpo.errors import UserError
from keras_dpo.utils.files import write_beside
from keras_dpo.utils.messages import say

# Raised when stores of an earlier version must not be read.
LAYOUT = "2"
PAIRS_PER_PART = 256


def hash_weights(variables: Iterable[keras.Variable]) -> str:
    """A hash of every value, in order."""
    return hash_arrays(variable.value for variable in variables)


def hash_arrays(arrays: Iterable[Any]) -> str:
    """A hash of every array's shape, type and bytes, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        value = np.ascontiguousarray(to_host(array))
        digest.update(f"{value.shape} {value.dtype}".encode())
        digest.update(value.reshape(-1).view("uint8").data)
    return digest.hexdigest()


class ReferenceStore:
    """Per-token reference log-probs of one dataset.

    Args:
        root: Where stores lie, one directory each.
        pairs: The dataset's pairs.
        content: What the log-probs depend on beyond the token ids, by name.
        strict: Whether a store of the same token ids and other content is an
            error: the user named the directory.

    Raises:
        ValueError: `strict`, and the directory holds such a store.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        pairs: TokenizedPairs,
        content: dict[str, str],
        strict: bool = False,
    ) -> None:
        self._content = {
            **content,
            "token_ids": pairs.hash_token_ids(),
            "layout": LAYOUT,
        }
        text = json.dumps(self._content, sort_keys=True).encode()
        name = hashlib.blake2b(text, digest_size=12).hexdigest()
        root = pathlib.Path(root).expanduser()
        self.directory = root / f"reference-{name}"
        if strict and not self.directory.exists():
            self._refuse_stale(root)
        self._splits = pairs.lengths[:, 1]
        self._widths = pairs.lengths[:, 1:].sum(axis=1)

    def _refuse_stale(self, root: pathlib.Path) -> None:
        for path in sorted(root.glob("reference-*/content.json")):
            content = json.loads(path.read_text())
            if content.get("token_ids") != self._content["token_ids"]:
                continue
            changed = [
                name
                for name, value in self._content.items()
                if content.get(name) != value
            ]
            if changed == ["number types"]:
                # The same reference, rounded otherwise: both are kept.
                continue
            raise UserError(
                f"{path.parent} holds reference log-probs of these pairs, but "
                f"with other {' and '.join(changed)}. Remove it, or choose "
                "another reference_cache."
            )

    @property
    def num_parts(self) -> int:
        """Files that make up the store."""
        return -(-len(self._widths) // PAIRS_PER_PART)

    @property
    def is_whole(self) -> bool:
        """Whether every part is there, for every process."""
        return not self._missing()

    def _missing(self, parts: Sequence[int] | None = None) -> list[int]:
        """Parts that a process does not find: all must compute together."""
        parts = range(self.num_parts) if parts is None else parts
        there = [self._path(n).exists() for n in parts]
        gone = on_any_process(~np.array(there))
        return [n for n, is_gone in zip(parts, gone, strict=True) if is_gone]

    def fill(
        self, compute: Callable[[int], Iterable[tuple[int, np.ndarray]]]
    ) -> None:
        """Compute and write the parts that are not there yet.

        Args:
            compute: From a part's number to the place in the part of each of
                its pairs, with its log-probs `(2, tokens)`.
        """
        if self.is_whole:
            say(f"Reference log-probs: read from {self.directory}")
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        write_beside(
            self.directory / "content.json",
            json.dumps(self._content, indent=1).encode(),
        )
        for n in self._missing():
            # Another run may fill the same store: what it has written, or is
            # writing, is read.
            with locked(self.directory, "A reference store", wait=True):
                if self._missing([n]):
                    self._write_part(n, compute(n))

    def _write_part(
        self, n: int, log_probs: Iterable[tuple[int, np.ndarray]]
    ) -> None:
        indices = self.indices(n)
        say(
            f"Reference log-probs: pairs {indices[0]:,} to "
            f"{indices[-1] + 1:,} of {len(self._widths):,}"
        )
        ends = np.cumsum(self._widths[indices])
        flat = np.zeros(ends[-1], "float32")
        for place, values in log_probs:
            index = indices[place]
            end, chosen = ends[place], self._splits[index]
            start = end - self._widths[index]
            flat[start : start + chosen] = values[0, :chosen]
            rejected = end - start - chosen
            flat[start + chosen : end] = values[1, :rejected]
        write_beside(self._path(n), flat.tobytes())

    def __getitem__(self, index: int) -> np.ndarray:
        """Log-probs of a pair, `(2, tokens)`, zero beyond a completion."""
        n = index // PAIRS_PER_PART
        widths, path = self._widths[self.indices(n)], self._path(n)
        if path.stat().st_size != 4 * widths.sum():
            raise UserError(
                f"{path} is damaged: it holds {path.stat().st_size} bytes, "
                f"not {4 * widths.sum()}. Remove it to compute it again."
            )
        # Not mapped: a large store has more parts than a process may open.
        flat = np.fromfile(
            path,
            "float32",
            self._widths[index],
            offset=4 * widths[: index % PAIRS_PER_PART].sum(),
        )
        chosen, rejected = np.split(flat, [self._splits[index]])
        values = np.zeros((2, max(len(chosen), len(rejected))), "float32")
        values[0, : len(chosen)] = chosen
        values[1, : len(rejected)] = rejected
        return values

    def indices(self, n: int) -> np.ndarray:
        """The pairs of a part."""
        first = n * PAIRS_PER_PART
        return np.arange(first, min(first + PAIRS_PER_PART, len(self._widths)))

    def _path(self, n: int) -> pathlib.Path:
        return self.directory / f"part-{n:06d}.float32"
