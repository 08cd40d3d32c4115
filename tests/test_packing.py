"""Rows, their lengths, and the order of the pairs in them."""

import itertools

import numpy as np
import pytest
from conftest import random_pairs

from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.data.packing import (
    COMPILATION,
    Packing,
    choose_lengths,
    deal,
    pack_batch,
)
from keras_dpo.distribution.processes import BatchShare
from keras_dpo.utils.arrays import BLOCK, round_up


def dataset(count=90, batch_size=4, **options):
    return PreferenceDataset(
        random_pairs(count, longest=200),
        batch_size=batch_size,
        verbose=False,
        **options,
    )


def work(totals, lengths):
    """Padded tokens, and what the compilations cost."""
    padded = sum(min(x for x in lengths if x >= t) for t in totals)
    return padded + COMPILATION * sum(lengths)


@pytest.mark.parametrize("seed", range(20))
def test_lengths_are_the_best_of_all(seed):
    """Against every choice of up to four lengths."""
    random = np.random.default_rng(seed)
    totals = BLOCK * random.integers(1, 13, random.integers(1, 30))
    found = choose_lengths(totals)
    sizes = sorted(set(totals.tolist()))
    choices = [
        (*some, sizes[-1])
        for number in range(4)
        for some in itertools.combinations(sizes[:-1], number)
    ]
    assert work(totals, found) == min(work(totals, c) for c in choices)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("groups", "each"), [(1, 5), (2, 1), (4, 4), (6, 8)])
def test_deal_gives_every_item_once(groups, each, seed):
    lengths = np.random.default_rng(seed).integers(1, 500, groups * each)
    dealt = deal(lengths, groups)
    assert sorted(np.concatenate(dealt)) == list(range(groups * each))
    assert {len(group) for group in dealt} == {each}
    totals = [lengths[group].sum() for group in dealt]
    assert max(totals) - min(totals) <= lengths.max()


def test_every_pair_is_in_one_batch_of_an_epoch():
    """So a step's expectation is that of batches drawn at random."""
    data = dataset(91).packed(Packing())
    for epoch in range(2):
        batches = data._order(epoch)
        assert sorted(np.concatenate(batches)) == list(range(91))
        assert sorted(len(b) for b in batches) == [3] + [4] * 22
    other = [b.tolist() for b in data._order(1)]
    assert other != [b.tolist() for b in data._order(0)]
    again = dataset(91).packed(Packing())
    assert [b.tolist() for b in again._order(1)] == other


def test_each_pair_meets_every_batch_as_often():
    """No bias: over epochs a pair's place among the steps is uniform."""
    data = dataset(16, batch_size=4).packed(Packing())
    places = np.zeros((16, 4))
    for epoch in range(800):
        for step, batch in enumerate(data._order(epoch)):
            places[batch, step] += 1
    # 200 expected; standard deviation sqrt(800 * 3 / 16) = 12.
    assert np.abs(places - 200).max() < 5 * 12.3


def test_batches_are_about_as_long():
    """Balanced batches pad less than batches drawn at random."""
    data = dataset(256, batch_size=4).packed(Packing())
    totals = data.row_totals()
    lengths = data.packed_lengths
    drawn = np.random.default_rng(0).permutation(lengths).reshape(-1, 4).sum(1)
    assert totals.std() < drawn.std() / 4
    assert len(data.packing.lengths) <= 2
    padded = sum(data.packing.row_length(t) for t in totals)
    assert 1 - totals.sum() / padded < 0.06
    assert f"{1 - totals.sum() / padded:.1%} padding" in data.describe_rows()


def test_rows_hold_what_the_pairs_hold():
    data = dataset(8, batch_size=8)
    for packing in (
        Packing(),
        Packing(share_prompt=False),
        Packing(pack=False),
        Packing(micro_batches=2, devices=2),
    ):
        packed = data.packed(packing)
        order = packed.batch_indices(0)
        batch = packed.make_batch(order)
        row_of = packing.row_of(8)
        for place, index in enumerate(order):
            pair = data.pairs[index]
            ids = batch["row_ids"][row_of[place]]
            segments = batch["row_segments"][row_of[place]]
            positions = batch["row_positions"][row_of[place]]
            scored = batch["scored_states"][row_of[place]]
            for side, completion in enumerate(
                (pair.chosen_ids, pair.rejected_ids)
            ):
                slots = batch["scored_slots"][place, side, : len(completion)]
                states = scored[slots]
                wanted = batch["scored_ids"][row_of[place]][slots]
                assert wanted.tolist() == list(completion)
                whole = [*pair.prompt_ids, *completion]
                assert ids[states].tolist() == whole[-len(completion) - 1 : -1]
                expected = np.arange(len(whole))[-len(completion) - 1 : -1]
                assert positions[states].tolist() == expected.tolist()
                # All but the prompt's last token are of this completion.
                assert len(set(segments[states[1:]].tolist())) <= 1
        real = packing.pair_lengths(data.pairs.lengths).sum()
        assert (batch["row_segments"] >= 0).sum() == real
        assert batch["scored_counts"].sum() == batch["completion_mask"].sum()


def test_micro_batches_do_not_depend_on_the_devices():
    lengths = np.random.default_rng(0).integers(1, 99, 16)

    def members(devices):
        packing = Packing(micro_batches=2, devices=devices)
        order = packing.order(lengths)
        step_of = packing.row_of(16) % 2
        return [sorted(order[step_of == step]) for step in range(2)]

    assert members(1) == members(4) == members(8)


def test_a_short_batch_leaves_rows_empty():
    data = dataset(3, batch_size=4).packed(Packing(devices=4))
    batch = data[0]
    assert batch["weight"].tolist() == [1, 1, 1, 0]
    assert (batch["row_segments"][3] == -1).all()
    assert batch["scored_counts"][3] == 0
    assert batch["block_counts_0"][3].sum() == 0


def test_unscored_tokens_are_left_out():
    """What is not scored, such as a user's turn, enters no product."""
    data = dataset(2, batch_size=2)
    pair, other = data.pairs
    scored = [i % 2 == 0 for i in range(len(pair.chosen_ids))]
    pairs = [pair._replace(chosen_scored=scored), other]
    batch = pack_batch(Packing(), pairs, 2, 256)
    expected = sum(scored) + sum(
        len(ids)
        for ids in (
            pair.rejected_ids,
            other.chosen_ids,
            other.rejected_ids,
        )
    )
    assert batch["scored_counts"].tolist() == [expected]


def test_lengths_are_multiples_of_a_block():
    assert round_up(1, BLOCK) == BLOCK
    assert all(n % BLOCK == 0 for n in choose_lengths(np.array([3, 900, 70])))


def test_lists_of_blocks_grow_with_the_row_and_not_its_square():
    """A row of many short pairs lists the few blocks that are seen."""
    data = dataset(64, batch_size=64).packed(Packing())
    batch = data[0]
    rows, blocks, width = batch["blocks_0"].shape
    assert width <= data.packed_lengths.max() // BLOCK + 3
    assert width < blocks / 4
    assert batch["block_counts_0"].max() <= width


@pytest.mark.parametrize("count", [16, 5])
@pytest.mark.parametrize(
    "packing",
    [
        None,
        Packing(micro_batches=2, devices=4),
        Packing(micro_batches=2, devices=4, windows=(0, 96)),
        Packing(devices=4, pack=False, share_prompt=False),
        Packing(micro_batches=2, devices=4, sequence_length=400),
    ],
)
def test_shares_are_parts_of_the_whole_batch(packing, count):
    """Also of a batch whose last devices hold nothing."""
    data = dataset(16, batch_size=16)
    if packing is not None:
        data = data.packed(packing)
    order = data.batch_indices(0)[:count]
    whole = data.make_batch(order)
    shares = [BatchShare(0, 1, 4), BatchShare(1, 3, 4), BatchShare(3, 4, 4)]
    parts = [data.make_batch(order, share) for share in shares]
    assert all(part.keys() == whole.keys() for part in parts)
    for name, array in whole.items():
        joined = np.concatenate([part[name] for part in parts])
        np.testing.assert_array_equal(joined, array)
