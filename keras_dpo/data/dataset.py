"""`PreferenceDataset`: batches of static shapes from preference records."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np

from keras_dpo.data.batches import (
    SUM_FIELDS,
    SummedReference,
    choose_shapes,
    completion_arrays,
    padded_ids,
    stored_arrays,
)
from keras_dpo.data.order import balanced_batches, batches_of_buckets
from keras_dpo.data.packing import Packing, choose_lengths, pack_batch
from keras_dpo.data.pairs import TokenizedPairs
from keras_dpo.data.preprocessor import DPOPreprocessor
from keras_dpo.data.reading import PairReader
from keras_dpo.data.records import DataReport
from keras_dpo.data.sources import open_rows
from keras_dpo.data.values import Record
from keras_dpo.distribution.processes import (
    WHOLE_BATCH,
    BatchShare,
    own_share,
)
from keras_dpo.errors import UserError
from keras_dpo.utils.arrays import round_up
from keras_dpo.utils.messages import say

DEFAULT_BATCH_SIZE = 16


class PreferenceDataset(keras.utils.PyDataset):
    """Preference pairs, tokenised once, in batches of few shapes.

    Batch i of epoch e is a pure function of (seed, e, i). Pairs of one bucket
    share a batch; pairs left over in a bucket fill up the next longer one, so
    that every pair is seen once an epoch. A short last batch is padded with
    empty rows of weight 0.

    Args:
        source: Any source that `data.sources.open_rows` opens.
        preprocessor: A `DPOPreprocessor`. None: the rows hold token ids.
        batch_size: Pairs per batch.
        shuffle: Whether the order changes from epoch to epoch.
        seed: Random seed for shuffling.
        split: Split to read, such as `"train[:10%]"`.
        column_map: Our field name -> the data's column name.
        ranked: For scored lists, `"best_vs_worst"` or `"all"` pairs.
        buckets: Ascending lengths, in tokens, that rows are padded to. None:
            powers of two from 64 up to the longest pair.
        verbose: Whether to print what was found, dropped and truncated.

    Raises:
        ValueError: A row is broken, or no pair is left.

    Example:

    >>> dataset = PreferenceDataset(
    ...     [{"prompt_ids": [5, 6], "chosen_ids": [7, 2],
    ...       "rejected_ids": [8, 9, 2]}], batch_size=1, verbose=False)
    >>> dataset[0]["token_ids"].shape
    (1, 2, 64)
    """

    def __init__(
        self,
        source: Any,
        preprocessor: DPOPreprocessor | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        *,
        shuffle: bool = True,
        seed: int = 0,
        split: str | None = None,
        column_map: dict[str, str] | None = None,
        ranked: str = "best_vs_worst",
        buckets: Sequence[int] | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(
                f"`batch_size` must be at least 1. Received: {batch_size!r}."
            )
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.steps_per_epoch: int | None = None
        # First batch of the current epoch; above 0 when resuming inside it.
        self.first_batch = 0
        self.preprocessor = preprocessor or DPOPreprocessor()
        self._reader = PairReader(
            open_rows(source, split), self.preprocessor, column_map, ranked
        )
        self.pairs = self._read_pairs(verbose)
        if verbose:
            for line in self.report.lines():
                say(line)
        if not self.num_pairs:
            raise UserError(
                f"No pair is left of {self.report.num_rows} rows. Dropped: "
                + "; ".join(
                    f"{len(rows)} {cause} (row {rows[0]})"
                    for cause, rows in self.report.dropped.items()
                )
                + "."
            )
        self.shapes = choose_shapes(self.pairs, buckets)
        self.packing: Packing | None = None
        self._reference: Any = None
        self.packed_lengths = np.zeros(0, int)
        self._cached_order: tuple[int, list[np.ndarray]] | None = None
        self._read_reference()

    def _read_pairs(self, verbose: bool) -> TokenizedPairs:
        rows = self._reader.rows
        if rows.is_endless:
            raise UserError(
                f"{rows.name} has no end. Give fit steps_per_epoch, or make a "
                "data.PreferenceStream of it."
            )
        return self._reader.read_all(verbose)

    @property
    def report(self) -> DataReport:
        """Report of what was found in the data, dropped and truncated."""
        return self._reader.report

    @property
    def records(self) -> list[Record]:
        """The first records trained on with a whole prompt, as text."""
        return self._reader.records

    # --- Order --------------------------------------------------------------

    @property
    def num_pairs(self) -> int:
        """Number of pairs kept."""
        return len(self.pairs)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with its longer completion."""
        return int(self.pairs.sequence_lengths.max())

    @property
    def num_batches(self) -> int:
        """Batches left in the current epoch."""
        return self.batches_per_epoch - self.first_batch

    @property
    def batches_per_epoch(self) -> int:
        """Batches of a whole epoch."""
        return self.steps_per_epoch or self.batches_per_pass

    @property
    def batches_per_pass(self) -> int:
        """Batches of one pass over all pairs."""
        return -(-self.num_pairs // self.batch_size)

    def __len__(self) -> int:
        return self.num_batches

    def batch_indices(self, index: int) -> np.ndarray:
        """Indices of the pairs in batch `index` of the current epoch."""
        step = self.epoch * self.batches_per_epoch + index
        number, index = divmod(step, self.batches_per_pass)
        return self._order(number)[index]

    def all_batches(self) -> list[np.ndarray]:
        """Indices of the pairs of every batch of the first pass."""
        return self._order(0)

    def _order(self, number: int) -> list[np.ndarray]:
        """The batches of one pass through the data."""
        number = number if self.shuffle else 0
        if self._cached_order is None or self._cached_order[0] != number:
            self._cached_order = number, self._draw_order(number)
        return self._cached_order[1]

    def _draw_order(self, number: int) -> list[np.ndarray]:
        random = np.random.default_rng([self.seed, number])
        order = np.arange(self.num_pairs)
        if self.shuffle:
            order = random.permutation(order)
        if self.packing is not None:
            batches = balanced_batches(
                order, self.packed_lengths, self.batch_size, self.packing
            )
        else:
            buckets = self.buckets_of(order)
            batches = batches_of_buckets(order, buckets, self.batch_size)
        if self.shuffle:
            # A pair's batch depends on its length: the batch's place in the
            # epoch must not.
            batches = [batches[i] for i in random.permutation(len(batches))]
        return batches

    def buckets_of(self, indices: np.ndarray) -> np.ndarray:
        """Index into `shapes` that each pair is padded to, `(pairs,)`."""
        pairs = self.pairs[indices]
        sizes = np.stack([pairs.sequence_lengths, pairs.completion_lengths])
        # The first shape that holds both.
        fits = sizes <= np.array(self.shapes)[:, :, None]
        return fits.all(axis=1).argmax(axis=0)

    def in_input_order(
        self, outputs: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Reorder outputs to one value per input row; NaN where dropped."""
        indices: list[np.ndarray] = []
        kept: list[int] = []
        for i in range(self.num_batches):
            batch = self.batch_indices(i)
            indices.append(batch)
            kept += range(i * self.batch_size, i * self.batch_size + len(batch))
        rows = np.array(self.report.rows)[np.concatenate(indices)]
        ordered = {}
        for name, values in outputs.items():
            if len(set(self.report.rows)) < len(self.report.rows):
                # Ranked lists give several pairs per row: one value per pair.
                full = np.full(self.num_pairs, np.nan, values.dtype)
                full[np.concatenate(indices)] = values[kept]
            else:
                full = np.full(self.report.num_rows, np.nan, values.dtype)
                full[rows] = values[kept]
            ordered[name] = full
        return ordered

    # --- Batches ------------------------------------------------------------

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        indices = self.batch_indices(self.first_batch + index)
        return self.make_batch(indices, own_share())

    def make_batch(
        self, indices: Iterable[int], share: BatchShare = WHOLE_BATCH
    ) -> dict[str, np.ndarray]:
        """Arrays of the given pairs, padded to one of `shapes` or packed.

        Args:
            indices: Indices of the batch's pairs.
            share: Part of the rows to make, padded like the whole batch.

        Returns:
            `token_ids` `(pairs, 2, length)`, or the rows of `pack_batch`;
            `completion_ids` and `completion_mask` `(pairs, 2, tokens)`;
            `prompt_lengths` and `completion_lengths` `(pairs, 2)`; `weight`
            and `margin` `(pairs,)`; with a stored reference
            `reference_log_probs` `(pairs, 2, tokens)`.
        """
        every = np.asarray(list(indices))
        own = share.of(self.batch_size)
        size = own.stop - own.start
        pairs = [self.pairs[i] for i in every[own]]
        if self.packing is None:
            length, tokens = self.shapes[self.buckets_of(every).max()]
            batch = padded_ids(pairs, size, length)
        else:
            tokens = self.shapes[-1][1]
            length = self.packing.row_length(self._longest_row(every))
            devices = self.packing.devices * size // self.batch_size
            packing = dataclasses.replace(self.packing, devices=devices)
            batch = pack_batch(packing, pairs, size, tokens, length)
        batch |= completion_arrays(pairs, size, tokens)
        if self._reference is not None:
            stored = [self._reference[i] for i in every[own]]
            batch["reference_log_probs"] = stored_arrays(stored, size, tokens)
        return batch

    def view(self) -> "PreferenceDataset":
        """A shallow copy with a position of its own, at the start."""
        dataset = copy.copy(self)
        dataset.epoch = dataset.first_batch = 0
        dataset._cached_order = None
        return dataset

    def packed(self, packing: Packing, epochs: int = 1) -> "PreferenceDataset":
        """A copy with the same pairs packed in rows.

        Args:
            packing: The layout. If it has no lengths, they are chosen here.
            epochs: Number of epochs that the lengths are chosen for.
        """
        dataset = copy.copy(self)
        dataset._cached_order = None
        dataset.packed_lengths = packing.pair_lengths(self.pairs.lengths)
        if packing.longest_pair is None:
            longest = int(dataset.packed_lengths.max())
            packing = dataclasses.replace(packing, longest_pair=longest)
        dataset.packing = packing
        if not packing.lengths:
            # Further epochs have about the same lengths.
            lengths = choose_lengths(dataset.row_totals(min(epochs, 3)))
            dataset.packing = dataclasses.replace(packing, lengths=lengths)
        return dataset

    def row_totals(self, epochs: int = 1) -> np.ndarray:
        """Tokens of the longest row of each batch, `(batches,)`."""
        return np.array(
            [
                self._longest_row(batch)
                for number in range(epochs if self.shuffle else 1)
                for batch in self._order(number)
            ]
        )

    def _longest_row(self, indices: np.ndarray) -> int:
        """Tokens of the longest row of a batch of these pairs."""
        packing = self.packing or Packing()
        lengths = self.packed_lengths[indices]
        return packing.longest_row(lengths, self.batch_size)

    def describe_rows(self) -> str:
        """One line on the layout of batches in rows, and what it saves."""
        packing, totals = self.packing or Packing(), self.row_totals()
        real = self.packed_lengths.sum()
        rows = packing.num_rows(self.batch_size)
        computed = rows * sum(packing.row_length(total) for total in totals)
        separate = dataclasses.replace(packing, share_prompt=False)
        apart = separate.pair_lengths(self.pairs.lengths).sum()
        lengths = ", ".join(f"{length:,}" for length in packing.lengths)
        text = (
            f"Rows of {lengths} tokens, {rows} a batch, "
            f"{1 - real / computed:.1%} padding"
        )
        if packing.share_prompt:
            text += f"; prompts once per pair: {1 - real / apart:.0%} less"
        return text

    # --- Stored reference log-probs -------------------------------------------

    @property
    def has_reference(self) -> bool:
        """Whether every pair has reference log-probs."""
        return self._reference is not None

    def _read_reference(self) -> None:
        """Use the records' whole-completion log-probs, if given."""
        sums = np.stack([self.pairs.extra(name) for name in SUM_FIELDS])
        given = ~np.isnan(sums).any(axis=0)
        self.reference_is_summed = bool(given.any())
        if not given.any():
            return
        if not given.all():
            raise UserError(
                "Reference log-probs must be there for every row or for none. "
                f"Received: none for row {self.report.rows[given.argmin()]}, "
                f"some for row {self.report.rows[given.argmax()]}."
            )
        self._reference = SummedReference(self.pairs)

    def use_reference(self, stored: Any) -> None:
        """Use the reference log-probs `stored[pair]`, `(2, tokens)`."""
        self._reference = stored
        self.reference_is_summed = False

    def parts(self, indices: list[np.ndarray], tokens: int) -> list[Any]:
        """Unshuffled datasets of subsets of the pairs, in larger batches.

        Args:
            indices: Indices of each part's pairs.
            tokens: Approximate tokens per batch; never fewer pairs than now.
        """
        size = max(self.batch_size, tokens // self._mean_pair_length())
        parts = []
        for part in indices:
            dataset = copy.copy(self)
            dataset.shuffle = False
            dataset.pairs = self.pairs[part]
            dataset.batch_size = round_up(size, self.batch_size)
            dataset._reference = None
            dataset._cached_order = None
            parts.append(dataset)
        return parts

    def _mean_pair_length(self) -> int:
        return int(2 * self.pairs.sequence_lengths.mean())

    # --- Resuming ----------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """State for a backup beyond the position in the data, as JSON."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_state` returned."""

    # --- Checks -------------------------------------------------------------

    def check(self, raise_if_unfit: Callable[[Any], None]) -> None:
        """Run a check on this dataset, which raises if it does not fit.

        A stream runs it again on every window that training reaches.
        """
        raise_if_unfit(self)
