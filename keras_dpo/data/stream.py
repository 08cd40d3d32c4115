"""`PreferenceStream`: pairs of a source that is read while training."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from keras_dpo.data.batches import DEFAULT_BUCKETS
from keras_dpo.data.dataset import DEFAULT_BATCH_SIZE, PreferenceDataset
from keras_dpo.data.order import BALANCED_BATCHES
from keras_dpo.data.packing import Packing
from keras_dpo.data.pairs import TokenizedPairs
from keras_dpo.data.preprocessor import DPOPreprocessor
from keras_dpo.data.sources import has_length, open_rows
from keras_dpo.data.tokenized import Tokenized
from keras_dpo.errors import UserError
from keras_dpo.utils.arrays import BLOCK, round_up

# Growth of row lengths: a row longer than all before it takes the next length,
# which costs a compilation.
LENGTH_GROWTH = 1.5
STARTS_KEPT = 3


class Start(NamedTuple):
    """Start of a window: a pass through the source, and a row in it."""

    number: int
    row: int


class PreferenceStream(PreferenceDataset):
    """Preference pairs that are streamed while training.

    The source may be endless, or larger than the disk. Windows of 64 batches
    are read, tokenised and shuffled, one at a time; a source that ends is read
    again. Batch shapes follow from the preprocessor's limits, since the lengths
    of later pairs are unknown.

    Args:
        source: Any source that `data.sources.open_rows` opens. An iterator can
            be read only once, so that a backup cannot resume it.
        preprocessor: A `DPOPreprocessor`; its limits apply to rows of token
            ids, too.
        batch_size: Pairs per batch.
        steps_per_epoch: Batches per epoch; each epoch continues through the
            source.
        shuffle: Whether pairs are shuffled within a window.
        seed: Random seed for shuffling.
        split: Split to read, such as `"train[:10%]"`.
        column_map: Our field name -> the data's column name.
        verbose: Whether to print what was found in the first window.

    Raises:
        ValueError: A row is broken or longer than the limits, or there is no
            pair.
    """

    def __init__(
        self,
        source: Any,
        preprocessor: DPOPreprocessor | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        *,
        steps_per_epoch: int,
        shuffle: bool = True,
        seed: int = 0,
        split: str | None = None,
        column_map: dict[str, str] | None = None,
        verbose: bool = True,
    ) -> None:
        if steps_per_epoch < 1:
            raise UserError(
                "`steps_per_epoch` must be at least 1. Received: "
                f"{steps_per_epoch!r}."
            )
        limits = preprocessor or DPOPreprocessor()
        self.longest_completion = limits.max_completion_length or (
            limits.max_length - (limits.max_prompt_length or 1)
        )
        self._window = 0
        # Check to run on every window.
        self._check: Callable[[Any], None] | None = None
        super().__init__(
            open_rows(source, split, streaming=True),
            limits,
            batch_size,
            shuffle=shuffle,
            seed=seed,
            column_map=column_map,
            verbose=verbose,
        )
        self.steps_per_epoch = steps_per_epoch
        self.shapes = _shapes_of(limits.max_length, self.longest_completion)

    def _read_pairs(self, verbose: bool) -> TokenizedPairs:
        self._windows = _Windows(self, self.batch_size * BALANCED_BATCHES)
        pairs, self.report.rows = self._windows.get(0)
        self._check_lengths(pairs)
        return pairs

    @property
    def longest_sequence(self) -> int:
        """Maximum tokens of a prompt and completion."""
        return self.preprocessor.max_length

    @property
    def batches_per_pass(self) -> int:
        """Batches of a window."""
        return self._windows.size // self.batch_size

    def batch_indices(self, index: int) -> np.ndarray:
        try:
            return super().batch_indices(index)
        except IndexError as error:
            rows = self._reader.rows
            raise UserError(
                f"{rows.name} is an iterator, and ended after "
                f"{self.report.num_rows} rows; training needs more. Pass a "
                "dataset that can be read again, or fewer steps."
            ) from error

    def _order(self, number: int) -> Any:
        self._enter(number)
        return super()._order(number)

    def _enter(self, number: int) -> None:
        """Load a window's pairs."""
        if number == self._window:
            return
        self._window, self._cached_order = number, None
        self.pairs, self.report.rows = self._windows.get(number)
        self._check_lengths(self.pairs)
        self._read_reference()
        if self.packing is not None:
            lengths = self.pairs.lengths
            self.packed_lengths = self.packing.pair_lengths(lengths)
        if self._check is not None:
            self._check(self)

    def _check_lengths(self, pairs: TokenizedPairs) -> None:
        """Raise if rows of token ids are over the limits."""
        if not len(pairs):
            return
        for name, lengths, limit in (
            ("max_length", pairs.sequence_lengths, self.longest_sequence),
            (
                "max_completion_length",
                pairs.completion_lengths,
                self.longest_completion,
            ),
        ):
            longest = lengths.argmax()
            if lengths[longest] > limit:
                raise UserError(
                    f"Row {self.report.rows[longest]} has {lengths[longest]} "
                    f"tokens, and {name} of the stream's preprocessor is "
                    f"{limit}. Raise it, or leave the row out."
                )

    def check(self, raise_if_unfit: Callable[[Any], None]) -> None:
        self._enter(0)
        super().check(raise_if_unfit)
        self._check = raise_if_unfit

    def packed(self, packing: Packing, epochs: int = 1) -> "PreferenceDataset":
        """A copy packed in rows, of lengths for all that the limits allow."""
        other = self.longest_completion
        if not packing.share_prompt:
            other = self.longest_sequence
        longest = self.longest_sequence + other
        packing = dataclasses.replace(packing, longest_pair=longest)
        dataset = super().packed(packing)
        packing = dataset.packing or packing
        lengths = list(packing.lengths)
        rows = packing.num_rows(self.batch_size)
        most = longest * (self.batch_size // rows)
        while lengths[-1] < most:
            grown = min(LENGTH_GROWTH * lengths[-1], most)
            lengths.append(round_up(math.ceil(grown), BLOCK))
        dataset.packing = dataclasses.replace(packing, lengths=tuple(lengths))
        return dataset

    def get_state(self) -> dict[str, Any]:
        """Positions in the source where the last windows begin."""
        starts = sorted(self._windows.starts.items())[-STARTS_KEPT:]
        return {"starts": [[number, *start] for number, start in starts]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume from there, without tokenising earlier rows."""
        for number, *start in state["starts"]:
            self._windows.starts[number] = Start(*start)


class _Windows:
    """A stream's windows in order; the last two are cached."""

    def __init__(self, stream: PreferenceStream, size: int) -> None:
        self._stream, self.size = stream, size
        self.starts = {0: Start(0, 0)}
        self._kept: dict[int, tuple[TokenizedPairs, list[int]]] = {}
        # The next window to read, once reading has begun.
        self._next: int | None = None
        self._pairs: Iterator[tuple[int, Tokenized]] = iter(())

    def get(self, number: int) -> tuple[TokenizedPairs, list[int]]:
        """A window's pairs, and the numbers of their rows."""
        if number in self._kept:
            return self._kept[number]
        if number != self._next:
            known = max(n for n in self.starts if n <= number)
            self._begin(self.starts[known])
            self._next = known
        for n in range(self._next, number + 1):
            self._kept = {m: w for m, w in self._kept.items() if m == n - 1}
            self._kept[n] = self._read()
            self._next = n + 1
            self.starts[n + 1] = self._place
        return self._kept[number]

    def _begin(self, start: Start) -> None:
        rows = self._stream._reader.rows
        if self._next is not None and rows.is_iterator:
            raise UserError(
                f"{rows.name} is an iterator, which cannot be read again from "
                f"row {start.row}. Pass a dataset that can, or fewer steps."
            )
        self._place = start
        self._pairs = self._stream._reader.each_pair(start.row)

    def _read(self) -> tuple[TokenizedPairs, list[int]]:
        rows: list[int] = []
        return TokenizedPairs(self._take(rows)), rows

    def _take(self, rows: list[int]) -> Iterator[Tokenized]:
        begun = self._place.number
        while len(rows) < self.size:
            found = next(self._pairs, None)
            if found is not None:
                rows.append(found[0])
                self._place = Start(self._place.number, found[0] + 1)
                yield found[1]
            elif not rows and self._place.number > begun:
                # A whole pass without a single pair.
                return
            elif rows and self._stream._reader.rows.is_iterator:
                # A last, shorter window.
                return
            else:
                self._begin(Start(self._place.number + 1, 0))


def _shapes_of(length: int, completion: int) -> list[tuple[int, int]]:
    """(length, tokens) of each bucket up to the limits."""
    lengths = [b for b in DEFAULT_BUCKETS if b < length]
    lengths.append(round_up(length, BLOCK))
    tokens = round_up(completion, 32)
    return [(length, min(tokens, length)) for length in lengths]


def make_dataset(
    source: Any,
    preprocessor: DPOPreprocessor | None,
    batch_size: int | None,
    shuffle: bool,
    steps: int | None = None,
) -> PreferenceDataset:
    """Return the source if it is a dataset, or else make one of it."""
    if isinstance(source, PreferenceDataset):
        if batch_size not in (None, source.batch_size):
            raise UserError(
                "The PreferenceDataset already has a batch size. Received: "
                f"batch_size={batch_size}, dataset.batch_size="
                f"{source.batch_size}. Leave batch_size out."
            )
        dataset = source
    elif steps is not None and not has_length(source):
        return PreferenceStream(
            source,
            preprocessor,
            batch_size or DEFAULT_BATCH_SIZE,
            steps_per_epoch=steps,
            shuffle=shuffle,
        )
    else:
        dataset = PreferenceDataset(
            source,
            preprocessor,
            batch_size or DEFAULT_BATCH_SIZE,
            shuffle=shuffle,
        )
    if steps is not None:
        dataset = copy.copy(dataset)
        dataset.steps_per_epoch = steps
    return dataset


def need_an_end(dataset: PreferenceDataset, why: str) -> None:
    """Raise if a dataset is a stream."""
    if isinstance(dataset, PreferenceStream):
        raise UserError(
            f"{why}, and a stream is not read to its end. Pass a "
            "PreferenceDataset, or a source that ends and no number of steps."
        )
