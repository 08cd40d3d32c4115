"""On-disk cache of precomputed reference log-probs.

A store is a directory named by a hash of the content it was computed from: the
reference's weights, the token ids, the dtypes and the layout. Each part is
written atomically, so a killed run resumes with the next part.
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

# Incremented when stores of earlier versions become unreadable.
LAYOUT = "2"
PAIRS_PER_PART = 256


def hash_weights(variables: Iterable[keras.Variable]) -> str:
    """Hash the values of all variables, in order."""
    return hash_arrays(variable.value for variable in variables)


def hash_arrays(arrays: Iterable[Any]) -> str:
    """Hash the shape, dtype and bytes of all arrays, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        value = np.ascontiguousarray(to_host(array))
        digest.update(f"{value.shape} {value.dtype}".encode())
        digest.update(value.reshape(-1).view("uint8").data)
    return digest.hexdigest()


class ReferenceStore:
    """Per-token reference log-probs of one dataset, on disk.

    Args:
        root: Parent directory of all stores.
        pairs: The dataset's pairs.
        content: Hashes of what the log-probs depend on beyond the token ids,
            by name.
        strict: Whether a store of the same token ids with different content is
            an error, because the user named the directory.

    Raises:
        ValueError: `strict` is set, and the directory holds such a store.
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
                # The same reference at another precision; keep both.
                continue
            raise UserError(
                f"{path.parent} holds reference log-probs of these pairs, but "
                f"with other {' and '.join(changed)}. Remove it, or choose "
                "another reference_cache."
            )

    @property
    def num_parts(self) -> int:
        """Number of part files in the store."""
        return -(-len(self._widths) // PAIRS_PER_PART)

    @property
    def is_whole(self) -> bool:
        """Whether every part exists, as seen by every process."""
        return not self._missing()

    def _missing(self, parts: Sequence[int] | None = None) -> list[int]:
        """Parts that any process lacks, since all must compute together."""
        parts = range(self.num_parts) if parts is None else parts
        there = [self._path(n).exists() for n in parts]
        gone = on_any_process(~np.array(there))
        return [n for n, is_gone in zip(parts, gone, strict=True) if is_gone]

    def fill(
        self, compute: Callable[[int], Iterable[tuple[int, np.ndarray]]]
    ) -> None:
        """Compute and write the missing parts.

        Args:
            compute: A function from a part's number to each pair's place in
                the part and its log-probs `(2, tokens)`.
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
            # Another run may be filling the same store; reuse the parts that
            # it has written or is writing.
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
        """Log-probs of a pair, `(2, tokens)`, zero past each completion."""
        n = index // PAIRS_PER_PART
        widths, path = self._widths[self.indices(n)], self._path(n)
        if path.stat().st_size != 4 * widths.sum():
            raise UserError(
                f"{path} is damaged: it holds {path.stat().st_size} bytes, "
                f"not {4 * widths.sum()}. Remove it to compute it again."
            )
        # Not memory-mapped: a large store has more parts than the limit on
        # open files.
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
        """Indices of the pairs in a part."""
        first = n * PAIRS_PER_PART
        return np.arange(first, min(first + PAIRS_PER_PART, len(self._widths)))

    def _path(self, n: int) -> pathlib.Path:
        return self.directory / f"part-{n:06d}.float32"
