"""Tokenised pairs, any number of them: their token ids spill to disk."""

import copy
import hashlib
import io
import math
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from keras_dpo.data.records import EXTRA_FIELDS
from keras_dpo.data.tokenized import Tokenized
from keras_dpo.utils.files import cache_directory

# Bytes of token ids above which they spill to a file.
HELD_IN_MEMORY = 2**26
HASHED_AT_ONCE = 2**24


class TokenizedPairs(Sequence[Tokenized]):
    """Tokenised pairs; some 80 bytes each in memory, whatever their length.

    Token ids are one int32 array, memory-mapped from an unnamed file in the
    cache directory once it is large; a token that is not scored is stored as
    `~id`, which is negative.

    Args:
        pairs: Pairs, iterated once.

    Attributes:
        lengths: Tokens of prompt, chosen and rejected, `(pairs, 3)`.
        largest_ids: The largest token id of each pair, `(pairs,)`.
        prompt_keys: Hash of each prompt, `(pairs,)`.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, pairs: Iterable[Tokenized]) -> None:
        lengths, largest, keys = array("q"), array("q"), array("Q")
        extras = {name: array("d") for name in EXTRA_FIELDS}
        file = _TokenFile()
        for pair in pairs:
            prompt = np.asarray(pair.prompt_ids, "int32")
            chosen = _marked(pair.chosen_ids, pair.chosen_scored)
            rejected = _marked(pair.rejected_ids, pair.rejected_scored)
            lengths.extend(map(len, (prompt, chosen, rejected)))
            largest.append(max(map(max, pair[:3])))
            keys.append(_key(prompt))
            for name, values in extras.items():
                values.append(pair.extras.get(name, math.nan))
            file.write(np.concatenate([prompt, chosen, rejected]))
        self._ids = file.read_back()
        self.lengths = np.array(lengths).reshape(-1, 3)
        self.largest_ids = np.array(largest)
        self.prompt_keys = np.array(keys)
        self._extras = {name: np.array(v) for name, v in extras.items()}
        ends = np.cumsum(self.lengths.sum(axis=1))
        self._starts = ends - self.lengths.sum(axis=1)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        """One pair, or a view of the pairs of a slice or array of indices."""
        if isinstance(index, slice | np.ndarray):
            return self._view(index)
        prompt, chosen, rejected = self.lengths[index].tolist()
        start = self._starts[index]
        ids = self._ids[start : start + prompt + chosen + rejected]
        extras = {name: v[index].item() for name, v in self._extras.items()}
        sides = np.split(ids[prompt:], [chosen])
        completions = [np.where(s < 0, ~s, s).tolist() for s in sides]
        scored = [None if (s >= 0).all() else (s >= 0).tolist() for s in sides]
        return Tokenized(
            ids[:prompt].tolist(),
            completions[0],
            completions[1],
            scored[0],
            scored[1],
            {name: v for name, v in extras.items() if not math.isnan(v)},
        )

    def _view(self, index: Any) -> "TokenizedPairs":
        view = copy.copy(self)
        for name in ("lengths", "largest_ids", "prompt_keys", "_starts"):
            setattr(view, name, getattr(self, name)[index])
        view._extras = {name: v[index] for name, v in self._extras.items()}
        return view

    @property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens of the prompt with the longer completion, `(pairs,)`."""
        return self.lengths[:, 0] + self.completion_lengths

    @property
    def completion_lengths(self) -> np.ndarray:
        """Tokens of the longer completion, `(pairs,)`."""
        return self.lengths[:, 1:].max(axis=1)

    def extra(self, name: str) -> np.ndarray:
        """One of `EXTRA_FIELDS`, `(pairs,)`; NaN where it was not given."""
        return self._extras[name]

    def shared_prompts(self, others: "TokenizedPairs") -> int:
        """Number of distinct prompts in both."""
        return len(np.intersect1d(self.prompt_keys, others.prompt_keys))

    def hash_token_ids(self) -> str:
        """Hash of all prompts, completions and what is scored, in order."""
        digest = hashlib.blake2b(self.lengths.tobytes(), digest_size=16)
        sizes = self.lengths.sum(axis=1)
        if np.array_equal(self._starts, np.cumsum(sizes) - sizes):
            parts: Any = np.split(
                self._ids[: sizes.sum()],
                range(HASHED_AT_ONCE, int(sizes.sum()), HASHED_AT_ONCE),
            )
        else:
            starts = zip(self._starts, sizes, strict=True)
            parts = (self._ids[start : start + size] for start, size in starts)
        for part in parts:
            digest.update(part.tobytes())
        return digest.hexdigest()

    def hash_extras(self) -> str:
        """Hash of the weights, margins and given log-probs, in order."""
        digest = hashlib.blake2b(digest_size=16)
        for values in self._extras.values():
            digest.update(values.tobytes())
        return digest.hexdigest()


def lengths_of(pairs: Sequence[Tokenized]) -> np.ndarray:
    """Tokens of prompt, chosen and rejected, `(pairs, 3)`."""
    return np.array([list(map(len, pair[:3])) for pair in pairs])


def _marked(ids: list[int], scored: list[bool] | None) -> np.ndarray:
    array = np.asarray(ids, "int32")
    return array if scored is None else np.where(scored, array, ~array)


def _key(prompt: np.ndarray) -> int:
    digest = hashlib.blake2b(prompt.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class _TokenFile:
    """Buffer of token ids that spills to an unnamed file once it is large."""

    def __init__(self) -> None:
        self._file: Any = io.BytesIO()

    def write(self, ids: np.ndarray) -> None:
        held = isinstance(self._file, io.BytesIO)
        try:
            if held and self._file.tell() > HELD_IN_MEMORY:
                self._move_to_disk()
            self._file.write(ids.data)
        except OSError as error:
            raise OSError(
                f"Token ids cannot be written to {cache_directory()}: "
                f"{error.strerror}. Make room, or set KERAS_DPO_CACHE to "
                "another directory."
            ) from error

    def _move_to_disk(self) -> None:
        directory = cache_directory()
        directory.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=directory)
        file.write(self._file.getbuffer())
        self._file = file

    def read_back(self) -> np.ndarray:
        if isinstance(self._file, io.BytesIO):
            return np.frombuffer(self._file.getvalue(), "int32")
        # The memory map keeps the file alive until it is released.
        with self._file:
            self._file.flush()
            return np.memmap(self._file, "int32", mode="r")
