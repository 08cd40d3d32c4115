"""`PreferenceDataset`: records in, batches of static shapes out."""

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np

from keras_dpo.data.packing import (
    Packing,
    choose_lengths,
    deal,
    pack_batch,
    round_up,
)
from keras_dpo.data.records import normalize_records
from keras_dpo.data.sources import read_rows
from keras_dpo.messages import say
from keras_dpo.preprocessor import DPOPreprocessor, Tokenized, count_notes

DEFAULT_BATCH_SIZE = 16
DEFAULT_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
# Batches whose pairs are dealt among them, so that all are about as long.
BALANCED_BATCHES = 64


class PreferenceDataset(keras.utils.PyDataset):
    """Preference pairs, tokenised once, in batches of few shapes.

    Batch i of epoch e is a pure function of (seed, e, i). Pairs of one bucket
    share a batch; the pairs left over in a bucket fill up the next longer one,
    so that every pair is seen once an epoch. A short last batch is filled up
    with empty rows of weight 0.

    Args:
        source: What `data.read_rows` reads.
        preprocessor: A `DPOPreprocessor`. None: the rows hold token ids.
        batch_size: Pairs per batch.
        shuffle: Whether the order changes from epoch to epoch.
        seed: Of the order.
        split: Such as `"train[:10%]"`.
        column_map: Our field name -> the data's column name.
        ranked: For scored lists, `"best_vs_worst"` or `"all"` pairs.
        buckets: Ascending lengths, in tokens, that rows are padded to. None:
            powers of two from 64 up to the longest pair.
        verbose: Whether to print what was found, dropped and cut.

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
            raise ValueError(
                f"`batch_size` must be at least 1. Received: {batch_size!r}."
            )
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.steps_per_epoch: int | None = None
        # Of the current epoch; above 0 where a run goes on inside it.
        self.first_batch = 0
        self.preprocessor = preprocessor or DPOPreprocessor()
        rows = read_rows(source, split)
        records, self.report = normalize_records(rows, column_map, ranked)
        tokenized = self.preprocessor.tokenize(records, progress=verbose)
        self.pairs = self._keep(tokenized, records)
        if verbose:
            for line in self.report.lines():
                say(line)
        if not self.pairs:
            raise ValueError(
                f"No pair is left of {self.report.num_rows} rows. Dropped: "
                + "; ".join(
                    f"{len(rows)} {cause} (row {rows[0]})"
                    for cause, rows in self.report.dropped.items()
                )
                + "."
            )
        self.shapes = _choose_shapes(self.pairs, buckets)
        self.packing: Packing | None = None
        self._reference: Any = None
        self.packed_lengths = np.zeros(0, int)
        self._cached_order: tuple[int, list[np.ndarray]] | None = None
        self._read_reference()

    def _keep(
        self, tokenized: list[Tokenized], records: list[Any]
    ) -> list[Tokenized]:
        """Drop what cannot be trained on, and write it into the report."""
        pairs, rows, self.records = [], [], []
        for row, record, number in zip(
            tokenized, records, self.report.rows, strict=True
        ):
            if row.dropped is not None:
                self.report.drop(row.dropped, number)
                continue
            pairs.append(row)
            rows.append(number)
            self.records.append(record)
        self.report.rows = rows
        for cause, number in count_notes(pairs).items():
            self.report.count(f"rows with {cause}", number)
        return pairs

    # --- Order --------------------------------------------------------------

    @property
    def num_pairs(self) -> int:
        """Pairs kept."""
        return len(self.pairs)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with its longer completion."""
        return max(_lengths(pair)[0] for pair in self.pairs)

    @property
    def num_batches(self) -> int:
        """Batches that the current epoch still has."""
        return self.batches_per_epoch - self.first_batch

    @property
    def batches_per_epoch(self) -> int:
        """Batches of a whole epoch."""
        return self.steps_per_epoch or self.batches_per_pass

    @property
    def batches_per_pass(self) -> int:
        """Batches that hold every pair once."""
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
            batches = self._balanced(order, self.packing)
            if not self.shuffle:
                return batches
            # Which batch of its window a pair is dealt to follows from its
            # length: when the batch comes must not.
            return [batches[i] for i in random.permutation(len(batches))]
        bucket_of = np.array([self._bucket(pair) for pair in self.pairs])
        batches, left = [], np.array([], int)
        for bucket in range(len(self.shapes)):
            members = np.concatenate([left, order[bucket_of[order] == bucket]])
            full = len(members) // self.batch_size * self.batch_size
            batches += np.split(members[:full], full // self.batch_size or 1)
            left = members[full:]
        batches = [batch for batch in (*batches, left) if len(batch)]
        if self.shuffle:
            batches = [batches[i] for i in random.permutation(len(batches))]
        return batches

    def _balanced(
        self, order: np.ndarray, packing: Packing
    ) -> list[np.ndarray]:
        """Batches of about as many tokens, pairs that do not fill one last.

        Every pair is in one batch and every batch has as many pairs, so the
        expectation of a step is that of batches drawn at random.
        """
        lengths = self.packed_lengths
        full = len(order) // self.batch_size
        batches = []
        for first in range(0, full, BALANCED_BATCHES):
            last = min(first + BALANCED_BATCHES, full)
            window = order[first * self.batch_size : last * self.batch_size]
            batches += [
                window[part] for part in deal(lengths[window], last - first)
            ]
        batches = [b[packing.order(lengths[b])] for b in batches]
        rest = order[full * self.batch_size :]
        return [*batches, rest] if len(rest) else batches

    def bucket_of(self, index: int) -> int:
        """Which of `shapes` a pair is padded to."""
        return self._bucket(self.pairs[index])

    def _bucket(self, pair: Tokenized) -> int:
        length, tokens = _lengths(pair)
        return next(
            i
            for i, shape in enumerate(self.shapes)
            if length <= shape[0] and tokens <= shape[1]
        )

    def in_input_order(
        self, outputs: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Rows of all batches -> one value per input row; NaN: dropped."""
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
                # Ranked lists give several pairs a row: one value per pair.
                full = np.full(self.num_pairs, np.nan, values.dtype)
                full[np.concatenate(indices)] = values[kept]
            else:
                full = np.full(self.report.num_rows, np.nan, values.dtype)
                full[rows] = values[kept]
            ordered[name] = full
        return ordered

    # --- Batches ------------------------------------------------------------

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        from keras_dpo.distribution import local_part

        indices = self.batch_indices(self.first_batch + index)
        return local_part(self.make_batch(indices))

    def make_batch(self, indices: Iterable[int]) -> dict[str, np.ndarray]:
        """Arrays of the given pairs, padded to a shape of the list.

        Returns:
            `token_ids` `(pairs, 2, length)`; `completion_ids` and
            `completion_mask` `(pairs, 2, tokens)`; `prompt_lengths` and
            `completion_lengths` `(pairs, 2)`; `weight` and `margin`
            `(pairs,)`; with a stored reference `reference_log_probs` `(pairs,
            2, tokens)`.
        """
        indices = list(indices)
        pairs = [self.pairs[i] for i in indices]
        size = self.batch_size
        batch: dict[str, np.ndarray]
        if self.packing is None:
            length, tokens = self.shapes[max(self._bucket(p) for p in pairs)]
            token_ids = np.zeros((size, 2, length), "int32")
            batch = {"token_ids": token_ids}
        else:
            tokens = self.shapes[-1][1]
            batch = pack_batch(self.packing, pairs, size, tokens)
        batch |= {
            "completion_ids": np.zeros((size, 2, tokens), "int32"),
            "completion_mask": np.zeros((size, 2, tokens), "int32"),
            # Empty rows have one prompt token, so that none is all padding.
            "prompt_lengths": np.ones((size, 2), "int32"),
            "completion_lengths": np.zeros((size, 2), "int32"),
            "weight": np.zeros(size, "float32"),
            "margin": np.zeros(size, "float32"),
        }
        for row, pair in enumerate(pairs):
            batch["weight"][row] = pair.extras.get("weight", 1.0)
            batch["margin"][row] = pair.extras.get("margin", 0.0)
            batch["prompt_lengths"][row] = len(pair.prompt_ids)
            for side, ids, scored in _sides(pair):
                if self.packing is None:
                    whole = [*pair.prompt_ids, *ids]
                    token_ids[row, side, : len(whole)] = whole
                batch["completion_ids"][row, side, : len(ids)] = ids
                batch["completion_lengths"][row, side] = len(ids)
                flags = 1 if scored is None else scored
                batch["completion_mask"][row, side, : len(ids)] = flags
        if self._reference is not None:
            log_probs = np.zeros((size, 2, tokens), "float32")
            for row, i in enumerate(indices):
                stored = self._reference[i]
                log_probs[row, :, : stored.shape[1]] = stored
            batch["reference_log_probs"] = log_probs
        return batch

    def packed(self, packing: Packing, epochs: int = 1) -> "PreferenceDataset":
        """The same pairs in rows; the dataset itself stays as it is.

        Args:
            packing: The layout. If it has no lengths, they are chosen here.
            epochs: How many the lengths are chosen for.
        """
        dataset = copy.copy(self)
        dataset._cached_order = None
        dataset.packed_lengths = packing.pair_lengths(self.pairs)
        if packing.longest_pair is None:
            longest = int(dataset.packed_lengths.max())
            packing = dataclasses.replace(packing, longest_pair=longest)
        dataset.packing = packing
        if not packing.lengths:
            # More epochs hold about the same lengths.
            lengths = choose_lengths(dataset.row_totals(min(epochs, 3)))
            dataset.packing = dataclasses.replace(packing, lengths=lengths)
        return dataset

    def row_totals(self, epochs: int = 1) -> np.ndarray:
        """Tokens of the longest row of each batch, `(batches,)`."""
        totals = []
        row_of = (self.packing or Packing()).row_of(self.batch_size)
        for number in range(epochs if self.shuffle else 1):
            for batch in self._order(number):
                rows = row_of[: len(batch)]
                tokens = np.bincount(rows, self.packed_lengths[batch])
                totals.append(tokens.max())
        return np.array(totals, int)

    def describe_rows(self) -> str:
        """One line: how batches are laid out, and what that saves."""
        packing, totals = self.packing or Packing(), self.row_totals()
        real = self.packed_lengths.sum()
        rows = packing.num_rows(self.batch_size)
        computed = rows * sum(packing.row_length(total) for total in totals)
        separate = dataclasses.replace(packing, share_prompt=False)
        apart = separate.pair_lengths(self.pairs).sum()
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
        """Take whole-completion log-probs from the records."""
        names = ("reference_chosen_log_prob", "reference_rejected_log_prob")
        given = [
            i
            for i, pair in enumerate(self.pairs)
            if all(name in pair.extras for name in names)
        ]
        self.reference_is_summed = bool(given)
        if not given:
            return
        if len(given) < self.num_pairs:
            lacking = next(i for i in range(self.num_pairs) if i not in given)
            raise ValueError(
                "Reference log-probs must be there for every row or for none. "
                f"Received: none for row {self.report.rows[lacking]}, some for "
                f"row {self.report.rows[given[0]]}."
            )
        self._reference = []
        for pair in self.pairs:
            # A sum stands at the first scored token: sums come out right.
            stored = np.zeros((2, max(_lengths(pair)[1], 1)), "float32")
            for side, _, scored in _sides(pair):
                first = 0 if scored is None else scored.index(True)
                stored[side, first] = pair.extras[names[side]]
            self._reference.append(stored)

    def use_reference(self, stored: Any) -> None:
        """Take reference log-probs from `stored[pair]`, `(2, tokens)`."""
        self._reference = stored
        self.reference_is_summed = False

    def parts(self, indices: list[np.ndarray], tokens: int) -> list[Any]:
        """Some of the pairs each, in order, in batches of their own size.

        Args:
            indices: Of each part's pairs.
            tokens: About as many per batch; never fewer pairs than now.
        """
        size = max(self.batch_size, tokens // self._mean_pair_length())
        parts = []
        for part in indices:
            dataset = copy.copy(self)
            dataset.shuffle = False
            dataset.pairs = [self.pairs[i] for i in part]
            dataset.batch_size = round_up(size, self.batch_size)
            dataset._reference = None
            dataset._cached_order = None
            parts.append(dataset)
        return parts

    def _mean_pair_length(self) -> int:
        lengths = [_lengths(pair)[0] for pair in self.pairs]
        return 2 * sum(lengths) // len(lengths)

    # --- Checks -------------------------------------------------------------

    def check_fits(self, model: Any, micro_batches: int = 1) -> None:
        """Raise where this data cannot go through the model.

        Raises:
            ValueError: A token id is beyond the embedding, the batch does not
                divide, or the loss needs what the data lacks.
        """
        from keras_dpo.distribution import data_parallel_size
        from keras_dpo.reference import PrecomputedReference, vocabulary_size

        parts = micro_batches * data_parallel_size()
        if self.batch_size % parts:
            raise ValueError(
                "The batch must divide into micro-batches and devices. "
                f"Received: batch_size={self.batch_size}, {micro_batches} "
                f"accumulation steps x {data_parallel_size()} data-parallel "
                f"devices. Use a multiple of {parts}."
            )
        vocabulary = vocabulary_size(model.policy)
        tokenizer = self.preprocessor.tokenizer
        if vocabulary is not None:
            if tokenizer and tokenizer.vocabulary_size > vocabulary:
                raise ValueError(
                    "The tokenizer is larger than the policy's embedding. "
                    f"Received: {tokenizer.vocabulary_size} tokens, "
                    f"{vocabulary} rows. Use the policy's own tokenizer."
                )
            for row, pair in zip(self.report.rows, self.pairs, strict=True):
                largest = max(map(max, (pair.prompt_ids, *pair[1:3])))
                if largest >= vocabulary:
                    raise ValueError(
                        f"Row {row} holds token id {largest}, beyond the "
                        f"policy's vocabulary of {vocabulary}."
                    )
        loss = model.preference_loss
        weights = {pair.extras.get("weight", 1.0) for pair in self.pairs}
        if loss.sorts_pairs and weights != {1.0}:
            raise ValueError(
                f"{type(loss).__name__} sorts the pairs of a batch, so "
                "per-pair weights would go to the wrong pairs. Remove the "
                "`weight` column or use another loss."
            )
        stored = isinstance(model.reference, PrecomputedReference)
        if stored and self.reference_is_summed and loss.needs_token_log_probs:
            raise ValueError(
                "ld_alpha needs reference log-probs of every token, and the "
                "data holds those of whole completions. Leave ld_alpha out, "
                "or let the reference be computed."
            )


def make_dataset(
    source: Any,
    preprocessor: DPOPreprocessor | None,
    batch_size: int | None,
    shuffle: bool,
    steps: int | None = None,
) -> PreferenceDataset:
    """The dataset itself, or one made of what `fit` was given."""
    if isinstance(source, PreferenceDataset):
        if batch_size not in (None, source.batch_size):
            raise ValueError(
                "The PreferenceDataset already has a batch size. Received: "
                f"batch_size={batch_size}, dataset.batch_size="
                f"{source.batch_size}. Leave batch_size out."
            )
        dataset = source
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


def _sides(pair: Tokenized) -> list[tuple[int, list[int], Any]]:
    return [
        (0, pair.chosen_ids, pair.chosen_scored),
        (1, pair.rejected_ids, pair.rejected_scored),
    ]


def _lengths(pair: Tokenized) -> tuple[int, int]:
    """(prompt with longer completion, longer completion), in tokens."""
    tokens = max(len(pair.chosen_ids), len(pair.rejected_ids))
    return len(pair.prompt_ids) + tokens, tokens


def _choose_shapes(
    pairs: list[Tokenized], buckets: Sequence[int] | None
) -> list[tuple[int, int]]:
    """(length, tokens) of each bucket in use, ascending in both."""
    lengths = [_lengths(pair) for pair in pairs]
    longest = max(length for length, _ in lengths)
    if buckets is None:
        buckets = [b for b in DEFAULT_BUCKETS if b < longest]
        # Past the last power of two, the next multiple of 64.
        rounded = round_up(longest, 64)
        larger = [b for b in DEFAULT_BUCKETS if b >= longest]
        buckets = [*buckets, min([rounded, *larger])]
    buckets = sorted(buckets)
    if longest > buckets[-1]:
        raise ValueError(
            "The longest bucket must hold the longest pair. Received: "
            f"buckets={list(buckets)}, longest pair={longest} tokens. Add a "
            "bucket or lower max_length."
        )
    shapes: list[tuple[int, int]] = []
    lower = 0
    for bucket in buckets:
        inside = [t for length, t in lengths if lower < length <= bucket]
        lower = bucket
        if inside:
            tokens = min(round_up(max(inside), 32), bucket)
            # Leftovers of a shorter bucket must fit, too.
            tokens = max([tokens, *(shape[1] for shape in shapes)])
            shapes.append((bucket, tokens))
    return shapes
