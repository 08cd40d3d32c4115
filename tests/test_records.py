"""Every layout of preference data, and what is wrong with rows."""

import json

import numpy as np
import pytest

from keras_dpo.data import normalize_records, read_rows

USER = {"role": "user", "content": "Q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
SYSTEM = {"role": "system", "content": "S"}
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
TEXT = {"prompt": "Q", "chosen": "good", "rejected": "bad"}


def said(who, text):
    return {"from": who, "value": text}


LAYOUTS = {
    "the page's own": (dict(TEXT), TEXT),
    "trl ultrafeedback": (
        {
            "chosen": [USER, GOOD],
            "rejected": [USER, BAD],
            "score_chosen": 8.0,
            "score_rejected": 3.0,
        },
        {**CHAT, "margin": 5.0},
    ),
    "H4 ultrafeedback": (
        {
            "prompt": "Q",
            "prompt_id": "x",
            "chosen": [USER, GOOD],
            "rejected": [USER, BAD],
            "messages": [USER, GOOD],
            "score_chosen": 8.0,
            "score_rejected": 3.0,
        },
        {**CHAT, "margin": 5.0},
    ),
    "argilla ratings": (
        {
            "prompt": "Q",
            "chosen": [USER, GOOD],
            "rejected": [USER, BAD],
            "chosen-rating": 5,
            "rejected-rating": 4,
            "source": "s",
        },
        {**CHAT, "margin": 1.0},
    ),
    "capybara multi-turn": (
        {
            "conversation": [],
            "prompt": "Q2",
            "chosen": [USER, GOOD, {"role": "user", "content": "Q2"}, GOOD],
            "rejected": [USER, GOOD, {"role": "user", "content": "Q2"}, BAD],
            "rating_chosen": 4.0,
            "rating_rejected": 2.0,
        },
        {
            "prompt": [USER, GOOD, {"role": "user", "content": "Q2"}],
            "chosen": [GOOD],
            "rejected": [BAD],
            "margin": 2.0,
        },
    ),
    "prompt string, answers as messages": (
        {"prompt": "Q", "system": "S", "chosen": [GOOD], "rejected": [BAD]},
        {**CHAT, "prompt": [SYSTEM, USER]},
    ),
    "prompt messages, full lists": (
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        CHAT,
    ),
    "hh-rlhf": (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"
            "\n\nAssistant: yes",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"
            "\n\nAssistant: yep",
        },
        {
            "prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
            "chosen": " yes",
            "rejected": " yep",
        },
    ),
    "full-hh-rlhf": ({**TEXT, "response": "good"}, TEXT),
    "orca": (
        {"system": "S", "question": "Q", "chosen": "good", "rejected": "bad"},
        {**CHAT, "prompt": [SYSTEM, USER]},
    ),
    "orca without a system text": (
        {"system": "", "question": "Q", "chosen": "good", "rejected": "bad"},
        TEXT,
    ),
    "sharegpt": (
        {
            "conversations": [said("system", "S"), said("human", "Q")],
            "chosen": said("gpt", "good"),
            "rejected": said("gpt", "bad"),
        },
        {**CHAT, "prompt": [SYSTEM, USER]},
    ),
    "alpaca": (
        {
            "instruction": "Do",
            "input": "this",
            "system": "S",
            "history": [["a", "b"]],
            "chosen": "good",
            "rejected": "bad",
        },
        {
            "prompt": [
                SYSTEM,
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "Do\nthis"},
            ],
            "chosen": [GOOD],
            "rejected": [BAD],
        },
    ),
    "helpsteer3": (
        {
            "context": [USER],
            "response1": "bad",
            "response2": "good",
            "overall_preference": 2,
            "domain": "x",
        },
        {**CHAT, "margin": 2.0},
    ),
    "helpsteer2": (
        {
            "prompt": "Q",
            "response_1": "good",
            "response_2": "bad",
            "preference_strength": -1,
        },
        {**TEXT, "margin": 1.0},
    ),
    "shp": (
        {
            "history": "Q",
            "human_ref_A": "bad",
            "human_ref_B": "good",
            "labels": 0,
            "score_ratio": 3.5,
        },
        {**TEXT, "margin": 3.5},
    ),
    "summaries": (
        {
            "info": {"post": "long", "title": "T"},
            "summaries": [{"text": "bad"}, {"text": "good"}],
            "choice": 1,
        },
        {
            "prompt": "Title: T\n\nlong\n\nTL;DR:",
            "chosen": "good",
            "rejected": "bad",
        },
    ),
    "pku": (
        {
            "prompt": "Q",
            "response_0": "bad",
            "response_1": "good",
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        {**TEXT, "margin": 1.0},
    ),
    "stack exchange": (
        {"question": "Q", "response_j": "good", "response_k": "bad"},
        TEXT,
    ),
    "scored list": (
        {
            "instruction": "Q",
            "completions": [
                {"response": "mid", "overall_score": 5},
                {"response": "good", "overall_score": 9},
                {"response": "bad", "overall_score": 1},
            ],
        },
        {**TEXT, "margin": 8.0},
    ),
    "api": (
        {
            "input": {"messages": [USER]},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
        CHAT,
    ),
    "token ids": (
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
    ),
}


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_layout(name):
    row, expected = LAYOUTS[name]
    records, report = normalize_records([row])
    assert records == [expected]
    assert report.num_rows == 1
    assert report.example == expected


def test_unused_columns_are_listed_once():
    _, report = normalize_records([LAYOUTS["H4 ultrafeedback"][0]])
    assert report.unused_columns == ["messages", "prompt_id"]
    assert "Unused columns: messages, prompt_id" in report.lines()


def test_all_pairs_of_a_ranked_list():
    row, _ = LAYOUTS["scored list"]
    records, report = normalize_records([row], ranked="all")
    assert [(r["chosen"], r["rejected"]) for r in records] == [
        ("good", "mid"),
        ("good", "bad"),
        ("mid", "bad"),
    ]
    assert report.rows == [0, 0, 0]


def test_ties_and_identical_pairs_are_dropped_and_counted():
    rows = [
        {
            "prompt": "Q",
            "response_1": "a",
            "response_2": "b",
            "preference_strength": s,
        }
        for s in (1, 0, -2, 0)
    ]
    rows.append({**rows[0], "response_2": "a"})
    records, report = normalize_records(rows)
    assert len(records) == 2
    assert report.dropped == {"ties": [1, 3], "identical pairs": [4]}
    assert report.rows == [0, 2]


def test_column_map():
    rows = [{"q": "Q", "yes": "good", "no": "bad"}]
    names = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    assert normalize_records(rows, names)[0] == [TEXT]
    with pytest.raises(ValueError, match="Row 0 has no column 'nope'"):
        normalize_records(rows, {"prompt": "nope"})


def test_extra_fields_pass_through():
    row = {
        **TEXT,
        "weight": 2,
        "margin": 0.5,
        "reference_chosen_log_prob": -3.0,
        "reference_rejected_log_prob": -4.0,
    }
    assert normalize_records([row])[0] == [
        {
            **TEXT,
            "weight": 2.0,
            "margin": 0.5,
            "reference_chosen_log_prob": -3.0,
            "reference_rejected_log_prob": -4.0,
        }
    ]


def test_hh_boundary_is_at_the_turn_not_at_common_characters():
    """Answers that start alike: a common-prefix cut would split a word."""
    row = {
        "chosen": "\n\nHuman: x\n\nAssistant: I think so",
        "rejected": "\n\nHuman: x\n\nAssistant: I thought not",
    }
    record = normalize_records([row])[0][0]
    assert record["prompt"] == "\n\nHuman: x\n\nAssistant:"
    assert record["chosen"] == " I think so"


def test_messages_with_text_parts():
    part = [{"type": "text", "text": "good"}]
    row = {
        "prompt": [USER],
        "rejected": [BAD],
        "chosen": [{"role": "assistant", "content": part}],
    }
    assert normalize_records([row])[0] == [CHAT]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"x": 1}, "Row 0 is in no known layout: 'chosen', 'rejected'"),
        ({**TEXT, "chosen": None}, "Row 0, field 'chosen' must be a string"),
        ({**TEXT, "prompt": 3}, "field 'prompt' must be a string"),
        ({"chosen": "a", "rejected": "b"}, "column_map"),
        ({**CHAT, "chosen": [{"role": "assistant"}]}, "field 'chosen'"),
        ({**CHAT, "chosen": [USER]}, "end with the assistant"),
        ({**TEXT, "weight": -1}, "field 'weight' must be 0 or more"),
        ({**TEXT, "weight": "x"}, "field 'weight' must be a finite number"),
        ({**TEXT, "margin": float("nan")}, "'margin' must be a finite"),
        (
            {"prompt_ids": [1], "chosen_ids": [-2], "rejected_ids": [3]},
            "token ids >= 0",
        ),
        (
            {"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [3]},
            "field 'chosen_ids'",
        ),
        ({**LAYOUTS["summaries"][0], "choice": 2}, "field 'choice'"),
        ({**LAYOUTS["alpaca"][0], "history": [["a"]]}, "field 'history'"),
        ({**LAYOUTS["sharegpt"][0], "chosen": None}, "field 'chosen'"),
    ],
)
def test_broken_rows_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        normalize_records([row])


def test_row_number_of_a_later_row():
    with pytest.raises(ValueError, match="Row 2, field 'rejected'"):
        normalize_records([TEXT, TEXT, {**TEXT, "rejected": None}])


# --- Sources ----------------------------------------------------------------

ROWS = [{"prompt": f"Q{i}", "chosen": "a", "rejected": "b"} for i in range(10)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_files(kind, tmp_path):
    import csv

    import pyarrow
    import pyarrow.parquet

    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert read_rows(path) == ROWS
    assert read_rows(str(path), "train[:30%]") == ROWS[:3]
    assert read_rows(str(path), "train[80%:]") == ROWS[8:]
    assert read_rows(str(path), "train[2:4]") == ROWS[2:4]


def test_datasets_and_its_directories(tmp_path):
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    assert read_rows(data) == ROWS
    data.save_to_disk(tmp_path / "saved")
    assert read_rows(tmp_path / "saved", "train[:2]") == ROWS[:2]
    with pytest.raises(ValueError, match="Name the split"):
        read_rows(datasets.DatasetDict(train=data))


def test_tf_data_and_grain():
    import grain.python as grain
    import tensorflow as tf

    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    assert read_rows(tf.data.Dataset.from_tensor_slices(columns)) == ROWS
    assert read_rows(grain.MapDataset.source(ROWS)) == ROWS


def test_tfds_builder(tmp_path):
    """A builder with message columns, whose bytes are decoded."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    features = tfds.features.FeaturesDict(
        {
            side: tfds.features.Sequence({"role": text, "content": text})
            for side in ("chosen", "rejected")
        }
    )
    row = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    builder = tfds.dataset_builders.AdhocBuilder(
        name="tiny_pairs",
        version="1.0.0",
        features=features,
        split_datasets={"train": [(str(i), row) for i in range(4)]},
        data_dir=tmp_path,
    )
    builder.download_and_prepare()
    found = read_rows(builder, "train[:2]")
    assert normalize_records(found)[0] == [CHAT, CHAT]


def test_numpy_values_become_plain():
    row = {
        "prompt": np.str_("Q"),
        "chosen": b"good",
        "rejected": "bad",
        "weight": np.float32(2),
    }
    assert read_rows([row])[0] == {**TEXT, "weight": 2.0}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"a": 1}\n{', "line 2 of"),
        ("a.json", '{"a": 1}', "must hold a list"),
        ("a.json", "[]", "nothing to train on"),
        ("a.txt", "x", "must be one of"),
        ("a.jsonl", b"\xff\xfe", "must be UTF-8"),
        ("a.jsonl", "3\n", "Row 0 must be a mapping"),
    ],
)
def test_broken_files(name, content, message, tmp_path):
    path = tmp_path / name
    mode = "wb" if isinstance(content, bytes) else "w"
    with path.open(mode) as file:
        file.write(content)
    with pytest.raises(ValueError, match=message):
        read_rows(path)


def test_missing_file():
    with pytest.raises(ValueError, match="There is no file"):
        read_rows("nowhere.jsonl")
    with pytest.raises(ValueError, match="list of records, a path"):
        read_rows(7)
