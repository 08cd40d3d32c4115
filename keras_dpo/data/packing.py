"""Packs pairs into rows of tokens without padding, each prompt once.

A row is `[prompt | chosen | rejected] [prompt | chosen | rejected] ...`. A
token's segment determines what it may attend to, so only the end of a row is
padded.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from keras_dpo.data.pairs import lengths_of
from keras_dpo.data.tokenized import Tokenized
from keras_dpo.utils.arrays import BLOCK, SEGMENTS, round_up

# Rows that take about as long to compute as a row length takes to compile.
COMPILATION = 4


@dataclasses.dataclass(frozen=True)
class Packing:
    """Layout of a dataset's batches in rows.

    Args:
        micro_batches: Micro-batches per step.
        devices: Data-parallel devices.
        share_prompt: Whether a prompt is written once per pair.
        pack: Whether a row holds all pairs of a device and micro-batch, or
            one pair.
        lengths: Ascending row lengths, in tokens; a batch takes the first
            that holds its longest row.
        windows: Sizes of the layers' sliding windows.
        sequence_length: Tokens of the longest sequence, if attention runs on
            whole sequences; else None.
        longest_pair: Tokens of the longest pair in a row; it bounds the blocks
            that a block of tokens sees. None: no bound but the row.
    """

    micro_batches: int = 1
    devices: int = 1
    share_prompt: bool = True
    pack: bool = True
    lengths: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()
    sequence_length: int | None = None
    longest_pair: int | None = None

    def num_rows(self, pairs: int) -> int:
        """Number of rows of a batch of `pairs` pairs."""
        return self.micro_batches * self.devices if self.pack else pairs

    def row_of(self, pairs: int) -> np.ndarray:
        """The row of each pair, `(pairs,)`.

        A device holds consecutive pairs, and a micro-batch is a strided slice
        of them, as in `steps._micro_batches`: nothing moves between devices.
        """
        if not self.pack:
            return np.arange(pairs)
        place = np.arange(pairs)
        device = place // (pairs // self.devices)
        return device * self.micro_batches + place % self.micro_batches

    def pair_lengths(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens that each pair takes in a row, `(pairs,)`.

        Args:
            lengths: Tokens of prompt, chosen and rejected, `(pairs, 3)`.
        """
        return lengths @ [1 if self.share_prompt else 2, 1, 1]

    def longest_row(self, lengths: np.ndarray, pairs: int) -> int:
        """Tokens of the longest row of a batch.

        Args:
            lengths: Tokens of each pair present, at most `pairs` of them.
            pairs: Pairs of a full batch.
        """
        return int(
            np.bincount(self.row_of(pairs)[: len(lengths)], lengths).max()
        )

    def row_length(self, tokens: int) -> int:
        """The shortest row length that holds this many tokens."""
        fitting = [length for length in self.lengths if tokens <= length]
        return fitting[0] if fitting else round_up(tokens, BLOCK)

    def most_blocks(self, length: int) -> int:
        """Maximum key blocks that a block of tokens sees, in rows of a length.

        These are the blocks of one pair that begins before it, and its own.
        """
        blocks = length // BLOCK
        if self.longest_pair is None:
            return blocks
        return min(blocks, -(-self.longest_pair // BLOCK) + 2)

    def order(self, lengths: np.ndarray) -> np.ndarray:
        """Order of a full batch's pairs that makes its rows about as long.

        Which pairs make up a micro-batch does not depend on the devices.

        Args:
            lengths: Tokens of each pair, `(pairs,)`.
        """
        if not self.pack:
            return np.arange(len(lengths))
        arranged = np.zeros(len(lengths), int)
        row_of = self.row_of(len(lengths))
        for step, group in enumerate(deal(lengths, self.micro_batches)):
            for device, part in enumerate(deal(lengths[group], self.devices)):
                row = device * self.micro_batches + step
                arranged[row_of == row] = group[part]
        return arranged


def deal(lengths: np.ndarray, groups: int) -> list[np.ndarray]:
    """Split items into groups of equal size and about equal total length.

    Greedily, the longest items left go to the groups that are shortest so far,
    one each.

    Args:
        lengths: `(items,)`, items a multiple of `groups`.
        groups: Number of groups.

    Returns:
        Indices of each group's items.
    """
    totals = np.zeros(groups)
    dealt = np.zeros((groups, len(lengths) // groups), int)
    longest_first = np.argsort(-lengths, kind="stable")
    for turn, items in enumerate(longest_first.reshape(-1, groups)):
        shortest_first = np.argsort(totals, kind="stable")
        dealt[shortest_first, turn] = items
        totals[shortest_first] += lengths[items]
    return list(dealt)


def choose_lengths(totals: np.ndarray, most: int = 4) -> tuple[int, ...]:
    """Choose few row lengths that leave little padding in these batches.

    Dynamic programming minimizes the work, where each further length costs
    `COMPILATION` rows of it.

    Args:
        totals: Tokens of the longest row of each batch.
        most: Maximum number of lengths; each is compiled once.
    """
    sizes, counts = np.unique(
        [round_up(total, BLOCK) for total in totals], return_counts=True
    )
    before = [0, *np.cumsum(counts).tolist()]

    def cost(first: int, last: int) -> int:
        """Work of the batches of these sizes, padded to the largest."""
        batches = before[last + 1] - before[first]
        return (batches + COMPILATION) * int(sizes[last])

    # best[i]: (work, lengths) of the batches of the first i + 1 sizes.
    best: list[tuple[int, tuple[int, ...]]] = [
        (cost(0, i), (int(size),)) for i, size in enumerate(sizes)
    ]
    for _ in range(1, most):
        best = [
            min(
                best[i],
                *(
                    (best[j][0] + cost(j + 1, i), (*best[j][1], int(size)))
                    for j in range(i)
                ),
            )
            if i
            else best[0]
            for i, size in enumerate(sizes)
        ]
    return best[-1][1]


class _Segment(NamedTuple):
    """Consecutive tokens of a row that share an attention pattern."""

    number: int
    ids: Sequence[int]
    start: int
    position: int
    prompt_start: int


def pack_batch(
    packing: Packing,
    pairs: Sequence[Tokenized],
    size: int,
    completion_tokens: int,
    length: int | None = None,
) -> dict[str, np.ndarray]:
    """Pack a batch of pairs into rows.

    Args:
        packing: The layout.
        pairs: At most `size` pairs.
        size: Pairs of a full batch.
        completion_tokens: Width of the batch's `completion_ids`.
        length: Tokens per row. None: as many as these pairs need.

    Returns:
        `row_ids`, `row_positions`, `row_segments` `(rows, length)`, segment
        -1 where a row is empty; `scored_states` and `scored_ids` `(rows,
        length)`, the positions whose state predicts a scored token, and that
        token, `scored_counts` `(rows,)` of them; `scored_slots` `(pairs, 2,
        tokens)`, the index of each completion token in these lists; per window
        `blocks_<window>` `(rows, blocks, most_blocks)` and
        `block_counts_<window>` `(rows, blocks)`, the key blocks that each
        block of tokens attends to (window 0: no window); for whole sequences
        `sequence_slots` `(pairs, 2, sequence)`, positions in the row, and
        `row_slots` `(rows, length)`, the inverse.
    """
    row_of = packing.row_of(size)
    rows = packing.num_rows(size)
    if length is None:
        taken = packing.pair_lengths(lengths_of(pairs))
        length = packing.row_length(packing.longest_row(taken, size))
    batch = {
        "row_ids": np.zeros((rows, length), "int32"),
        "row_positions": np.zeros((rows, length), "int32"),
        "row_segments": np.full((rows, length), -1, "int32"),
        "scored_states": np.zeros((rows, length), "int32"),
        "scored_ids": np.zeros((rows, length), "int32"),
        "scored_counts": np.zeros(rows, "int32"),
        "scored_slots": np.zeros((size, 2, completion_tokens), "int32"),
    }
    if packing.sequence_length is not None:
        whole = (size, 2, packing.sequence_length)
        batch["sequence_slots"] = np.zeros(whole, "int32")
        batch["row_slots"] = np.zeros((rows, length), "int32")
    segments: list[list[_Segment]] = [[] for _ in range(rows)]
    for place, pair in enumerate(pairs):
        row = row_of[place]
        _write_pair(packing, batch, segments[row], row, place, pair)
    for row in range(rows):
        for segment in segments[row]:
            where = slice(segment.start, segment.start + len(segment.ids))
            batch["row_ids"][row, where] = segment.ids
            batch["row_segments"][row, where] = segment.number
            batch["row_positions"][row, where] = np.arange(
                segment.position, segment.position + len(segment.ids)
            )
    if packing.sequence_length is None:
        for window in packing.windows or (0,):
            seen = [visible_blocks(row, length, window) for row in segments]
            width = packing.most_blocks(length)
            listed = np.zeros((rows, length // BLOCK, width), "int32")
            for row, block in np.ndindex(*listed.shape[:2]):
                blocks = seen[row][block]
                listed[row, block, : len(blocks)] = blocks
            batch[f"blocks_{window}"] = listed
            batch[f"block_counts_{window}"] = np.array(
                [[len(blocks) for blocks in row] for row in seen], "int32"
            )
    return batch


def _write_pair(
    packing: Packing,
    batch: dict[str, np.ndarray],
    segments: list[_Segment],
    row: int,
    place: int,
    pair: Tokenized,
) -> None:
    """Append a pair's segments to its row, and record its scored tokens."""
    start = local = 0
    if segments:
        start = segments[-1].start + len(segments[-1].ids)
        local = len(segments) // (3 if packing.share_prompt else 4)
    prompt = pair.prompt_ids
    sides = (
        (pair.chosen_ids, pair.chosen_scored),
        (pair.rejected_ids, pair.rejected_scored),
    )
    prompt_start = start
    for side, (ids, scored) in enumerate(sides):
        shared = packing.share_prompt
        group = local if shared else 2 * local + side
        if side == 0 or not shared:
            prompt_start = start
            segments.append(
                _Segment(SEGMENTS * group, prompt, start, 0, prompt_start)
            )
            start += len(prompt)
        number = SEGMENTS * group + 1 + side
        segments.append(_Segment(number, ids, start, len(prompt), prompt_start))
        # The state before a token predicts it; the prompt's last state
        # predicts the first token of both completions.
        states = np.arange(start - 1, start + len(ids) - 1)
        states[:1] = prompt_start + len(prompt) - 1
        chosen = (
            np.arange(len(ids))
            if scored is None
            else np.flatnonzero(np.asarray(scored))
        )
        first = batch["scored_counts"][row]
        slots = first + np.arange(len(chosen))
        batch["scored_states"][row, slots] = states[chosen]
        batch["scored_ids"][row, slots] = np.asarray(ids)[chosen]
        batch["scored_slots"][place, side, chosen] = slots
        batch["scored_counts"][row] += len(chosen)
        if packing.sequence_length is not None:
            sequence = np.concatenate(
                [
                    np.arange(prompt_start, prompt_start + len(prompt)),
                    np.arange(start, start + len(ids)),
                ]
            )
            batch["sequence_slots"][place, side, : len(sequence)] = sequence
            width = packing.sequence_length
            batch["row_slots"][row, sequence] = (
                2 * local + side
            ) * width + np.arange(len(sequence))
        start += len(ids)


def visible_blocks(
    segments: Sequence[_Segment], length: int, window: int = 0
) -> list[list[int]]:
    """Key blocks that each block of tokens attends to, at least in part.

    Args:
        segments: A row's segments.
        length: Tokens of the row, a multiple of `BLOCK`.
        window: Size of the sliding window, in tokens; 0 for none.

    Returns:
        For each block of tokens, its key blocks, ascending.
    """
    visible: list[set[int]] = [set() for _ in range(length // BLOCK)]

    def see(block: int, first: int, last: int) -> None:
        visible[block].update(range(first // BLOCK, last // BLOCK + 1))

    for segment in segments:
        end = segment.start + len(segment.ids)
        for block in range(segment.start // BLOCK, -(-end // BLOCK)):
            first = max(segment.start, block * BLOCK)
            last = min(end, (block + 1) * BLOCK) - 1
            own, prompt = segment.start, 0
            if window:
                position = first - segment.start + segment.position
                own = max(own, first - window + 1)
                prompt = max(0, position - window + 1)
            see(block, own, last)
            if prompt < segment.position:
                start = segment.prompt_start
                see(block, start + prompt, start + segment.position - 1)
    return [sorted(blocks) for blocks in visible]
