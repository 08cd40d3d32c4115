"""Tokenised pairs in a memory-mapped file; rows read one by one."""

import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
from conftest import environment_of_devices, random_pairs

from keras_dpo.data import pairs as pairs_module
from keras_dpo.data.pairs import TokenizedPairs
from keras_dpo.data.sources import open_rows
from keras_dpo.data.tokenized import Tokenized


def tokenized(count=20):
    """With and without unscored tokens and extras."""
    random = np.random.default_rng(3)
    rows = [
        Tokenized(
            *(record[f"{x}_ids"] for x in ("prompt", "chosen", "rejected"))
        )
        for record in random_pairs(count)
    ]
    for i in range(0, count, 3):
        scored = (random.random(len(rows[i].rejected_ids)) < 0.5).tolist()
        scored[-1], scored[0] = False, True
        extras = {"weight": 0.5, "margin": -1.5}
        rows[i] = rows[i]._replace(rejected_scored=scored, extras=extras)
    # The largest id there is, and the smallest, scored and not.
    ends = [0, 2**31 - 1]
    flags = [True, False]
    rows[1] = Tokenized(ends, ends, ends[::-1], flags, flags)
    return rows


@pytest.mark.parametrize("held", [0, 2**26])
def test_pairs_come_back_as_they_went_in(held, monkeypatch, tmp_path):
    monkeypatch.setattr(pairs_module, "HELD_IN_MEMORY", held)
    rows = tokenized()
    pairs = TokenizedPairs(iter(rows))
    assert list(pairs) == rows
    assert isinstance(pairs._ids, np.memmap) == (held == 0)
    # The file has no name: nothing is left behind.
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    chosen = np.array([5, 1, 7])
    view = pairs[chosen]
    assert list(view) == [rows[i] for i in chosen]
    assert view.hash_token_ids() == (
        TokenizedPairs([rows[i] for i in chosen]).hash_token_ids()
    )
    assert list(pairs[3:5]) == rows[3:5]
    assert pairs[-1] == rows[-1]
    lengths = [[len(ids) for ids in row[:3]] for row in rows]
    assert pairs.lengths.tolist() == lengths
    assert pairs.largest_ids[1] == 2**31 - 1


@pytest.mark.parametrize("changed", ["ids", "scored", "border"])
def test_the_hash_sees_every_change(changed):
    rows = tokenized()
    before = TokenizedPairs(rows).hash_token_ids()
    assert TokenizedPairs(rows).hash_token_ids() == before
    row = rows[4]
    rows[4] = {
        "ids": row._replace(chosen_ids=[*row.chosen_ids[:-1], 3]),
        "scored": row._replace(
            chosen_scored=[False, *[True] * (len(row.chosen_ids) - 1)]
        ),
        "border": row._replace(
            prompt_ids=[*row.prompt_ids, row.chosen_ids[0]],
            chosen_ids=row.chosen_ids[1:],
        ),
    }[changed]
    assert TokenizedPairs(rows).hash_token_ids() != before


def test_a_full_disk_is_told(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pairs_module, "HELD_IN_MEMORY", 0)
    monkeypatch.setattr(pairs_module.tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match="KERAS_DPO_CACHE"):
        TokenizedPairs(tokenized())


def test_rows_are_read_when_they_are_needed():
    """A source is not held: its rows come as they are asked for."""
    asked = []

    def endless():
        for number in range(10**9):
            asked.append(number)
            yield {"prompt": "a", "chosen": "b", "rejected": str(number)}

    rows = iter(open_rows(endless()))
    assert [next(rows)["rejected"] for _ in range(3)] == ["0", "1", "2"]
    assert len(asked) == 3


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "arrow"])
def test_files_are_read_again_from_the_start(kind, tmp_path):
    rows = [
        {"prompt": f"p{i}", "chosen": "c\nc", "rejected": "r"} for i in range(9)
    ]
    data = datasets.Dataset.from_list(rows)
    path = tmp_path / f"rows.{kind}"
    save = {
        "jsonl": data.to_json,
        "csv": data.to_csv,
        "parquet": data.to_parquet,
        "arrow": data.save_to_disk,
    }
    save[kind](str(path))
    opened = open_rows(path, "train[3:6]")
    assert opened.count == 3
    for _ in range(2):
        assert [row["prompt"] for row in opened] == ["p3", "p4", "p5"]


MANY = """
import json, sys
import numpy as np
from keras_dpo import PreferenceDataset
from keras_dpo.data import pairs
from keras_dpo.data.packing import Packing

pairs.HELD_IN_MEMORY = 2**20
most = 0

def see():
    global most
    status = open("/proc/self/status").read()
    anonymous = status.split("RssAnon:")[1].split()[0]
    most = max(most, int(anonymous) * 1024)

def rows(count):
    random = np.random.default_rng(0)
    for i in range(count):
        if i % 1000 == 0:
            see()
        sizes = random.integers(1, 400, 3)
        yield {f"{name}_ids": random.integers(3, 99, size).tolist()
               for name, size in zip(("prompt", "chosen", "rejected"), sizes)}

few = PreferenceDataset(rows(2000), batch_size=8, verbose=False)
few.packed(Packing())[0]
see()
before, most = most, 0
many = PreferenceDataset(rows(int(sys.argv[1])), batch_size=8, verbose=False)
packed = many.packed(Packing(), epochs=3)
for i in range(0, len(packed), 50):
    packed[i]
see()
tokens = int(many.pairs.lengths.sum())
print("RESULT" + json.dumps([most - before, tokens, many.num_pairs]))
"""


@pytest.mark.slow
def test_many_pairs_take_little_memory():
    """Some hundred bytes a pair, and none for its tokens.

    By hand: KERAS_DPO_PAIRS=1000000.
    """
    count = os.environ.get("KERAS_DPO_PAIRS", "20000")
    done = subprocess.run(
        [sys.executable, "-c", MANY, count],
        env=environment_of_devices(1),
        capture_output=True,
        text=True,
        check=True,
    )
    grown, tokens, pairs = json.loads(done.stdout.split("RESULT")[1])
    assert pairs == int(count)
    print(f"{pairs:,} pairs, {tokens:,} tokens: {grown / pairs:.0f} bytes each")
    # A mean pair has 600 tokens: 2,400 bytes. Beside the pairs: rows that are
    # being read, and Python's own.
    assert grown < 300 * pairs + 2**24
