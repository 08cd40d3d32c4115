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


NAN = float("nan")


def ranked(*scores):
    answers = [{"response": f"a{x}", "score": x} for x in scores]
    return {"instruction": "Q", "completions": answers}


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
        CHAT,
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


def test_a_column_may_be_two_fields():
    rows = [{"q": "Q", "chosen": "good", "rejected": "bad"}]
    records, report = normalize_records(rows, {"prompt": "q", "system": "q"})
    system = {"role": "system", "content": "Q"}
    assert records == [{**CHAT, "prompt": [system, USER]}]
    assert report.unused_columns == []


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


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_one_reference_log_prob_alone_is_refused(side):
    names = {f"reference_{x}_log_prob" for x in ("chosen", "rejected")}
    given = f"reference_{side}_log_prob"
    (missing,) = names - {given}
    wrong = f"field '{missing}' must be there beside '{given}', or neither"
    for cell in (-1.0, None):
        with pytest.raises(ValueError, match=f"Row 0, {wrong}"):
            normalize_records([{**TEXT, given: cell}])
    both = {**TEXT, given: -1.0, missing: -2.0}
    for late in ({**TEXT, given: -1.0}, {**both, missing: None}):
        with pytest.raises(ValueError, match=f"Row 1, {wrong}"):
            normalize_records([both, late])
    assert normalize_records([{**TEXT, given: None, missing: None}])[0] == [
        TEXT
    ]


@pytest.mark.parametrize("column", ["score_chosen", "rejected-rating"])
def test_a_lone_score_is_listed_as_unused(column):
    records, report = normalize_records([{**TEXT, column: 1.0}])
    assert records == [TEXT]
    assert report.lines()[-1] == f"Unused columns: {column}"


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
        ({**LAYOUTS["summaries"][0], "choice": True}, "field 'choice'"),
        ({**LAYOUTS["pku"][0], "better_response_id": -1}, "must be 0 or 1"),
        ({**LAYOUTS["pku"][0], "better_response_id": NAN}, "must be 0 or 1"),
        ({**LAYOUTS["pku"][0], "better_response_id": True}, "must be 0 or 1"),
        ({**LAYOUTS["shp"][0], "labels": 2}, "'labels' must be 0 or 1"),
        ({**LAYOUTS["shp"][0], "labels": None}, "'labels' must be 0 or 1"),
        ({**LAYOUTS["shp"][0], "score_ratio": NAN}, "'score_ratio' must be"),
        ({**LAYOUTS["helpsteer3"][0], "overall_preference": NAN}, "a finite"),
        ({**LAYOUTS["helpsteer2"][0], "preference_strength": NAN}, "a finite"),
        ({**LAYOUTS["helpsteer2"][0], "preference_strength": True}, "a finite"),
        (ranked(9, NAN), "'completions.score' must be a finite number"),
        (ranked(9, True), "'completions.score' must be a finite number"),
        (ranked(9, None), "'completions.score' must be a finite number"),
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


def test_whole_numbers_may_be_floats():
    """As pandas writes a column that has gaps."""
    row = {**LAYOUTS["pku"][0], "better_response_id": 1.0}
    assert normalize_records([row])[0][0]["chosen"] == "good"
    row = {**LAYOUTS["summaries"][0], "choice": 1.0}
    assert normalize_records([row])[0][0]["chosen"] == "good"


@pytest.mark.parametrize(
    ("name", "field", "text"),
    [
        ("helpsteer3", "overall_preference", "2"),
        ("helpsteer2", "preference_strength", "-1.0"),
        ("shp", "labels", "0"),
        ("shp", "score_ratio", "3.5"),
        ("pku", "better_response_id", "1"),
        ("pku", "better_response_id", "1.0"),
        ("trl ultrafeedback", "score_chosen", "8"),
    ],
)
def test_texts_of_numbers_are_numbers(name, field, text):
    """Every cell of a CSV file is a text."""
    row, expected = LAYOUTS[name]
    assert normalize_records([{**row, field: text}])[0] == [expected]
    for broken in ("x", "1,5", "nan", "True"):
        with pytest.raises(ValueError, match=f"Row 1, field '{field}' must be"):
            normalize_records([row, {**row, field: broken}])


def test_labels_and_weights_of_csv_files(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text(
        "prompt,response_0,response_1,better_response_id,weight\n"
        "a,good,bad,0,0.5\nb,bad,good,1,\n"
    )
    records, _ = normalize_records(read_rows(path))
    assert [record["chosen"] for record in records] == ["good", "good"]
    assert records[0]["weight"] == 0.5
    assert "weight" not in records[1]
    path.write_text(
        "prompt,response_0,response_1,better_response_id\na,good,bad,\n"
    )
    with pytest.raises(ValueError, match="Row 0, field 'better_response_id'"):
        normalize_records(read_rows(path))


@pytest.mark.parametrize(
    "fields",
    [
        ("weight",),
        ("margin",),
        ("reference_chosen_log_prob", "reference_rejected_log_prob"),
        ("score_chosen", "score_rejected"),
    ],
)
def test_an_empty_cell_of_an_optional_number_is_none(fields):
    row = {**TEXT, **dict.fromkeys(fields, "")}
    assert normalize_records([row])[0] == [TEXT]
    ratio = {**LAYOUTS["shp"][0], "score_ratio": ""}
    assert normalize_records([ratio])[0][0]["margin"] == 1.0


def test_scores_under_two_names_are_no_order():
    row = ranked(9, 3)
    row["completions"].append({"response": "x", "rating": 99})
    with pytest.raises(
        ValueError, match="'completions.score' must be a finite"
    ):
        normalize_records([row])


# --- One form for all rows ---------------------------------------------------

# A layout's row, and a cell that may be empty in some rows.
OPTIONAL_CELLS = [
    ("orca", "system"),
    ("alpaca", "system"),
    ("alpaca", "history"),
    ("alpaca", "input"),
    ("prompt string, answers as messages", "system"),
]


@pytest.mark.parametrize("empty", [None, "", [], "lacking"])
@pytest.mark.parametrize(("name", "cell"), OPTIONAL_CELLS)
def test_an_empty_cell_changes_no_format(name, cell, empty):
    """Neighbours of a row with a system text are chats, and so is it."""
    full, _ = LAYOUTS[name]
    bare = {**full, cell: empty}
    if empty == "lacking":
        del bare[cell]
    records = normalize_records([full, bare])[0]
    assert len(records) == 2
    for record in records:
        assert isinstance(record["prompt"], list)
        assert record["prompt"][-1]["role"] == "user"
        assert record["chosen"] == [GOOD]
    if empty == "lacking":
        return
    # Whichever comes first.
    turned = normalize_records([bare, full])[0]
    assert turned == records[::-1]


@pytest.mark.parametrize(
    ("row", "column", "cell"),
    [
        (TEXT, "system", "S"),
        (TEXT, "system_prompt", "S"),
        (TEXT, "history", [["a", "b"]]),
        (
            {**TEXT, "question": "Q2"} | {"prompt": None},
            "conversations",
            [USER],
        ),
        ({"question": "Q", "chosen": "a", "rejected": "b"}, "prompt", "Q"),
        (ranked(9, 3), "system", "S"),
        (LAYOUTS["helpsteer2"][0], "system", "S"),
        (LAYOUTS["stack exchange"][0], "system", "S"),
        (LAYOUTS["summaries"][0], "system", "S"),
    ],
)
def test_a_column_that_comes_late_is_refused(row, column, cell):
    """Row 0 was read without it: all rows must be read alike."""
    row = {**row, "prompt": "Q"} if row.get("prompt", 1) is None else row
    late = {**row, column: cell}
    with pytest.raises(ValueError, match=f"Row 2: .*'{column}', which row 0"):
        normalize_records([row, {**row, column: None}, late])
    assert len(normalize_records([row, {**row, column: None}])[0]) == 2


def test_a_late_context_is_refused():
    row = {**LAYOUTS["helpsteer2"][0], "context": None}
    with pytest.raises(ValueError, match="Row 1, field 'context' must be as"):
        normalize_records([row, {**row, "context": [USER]}])


def test_row_0_settles_the_form_of_a_stream_that_goes_on(tmp_path):
    """Reading may begin at any row: the form is still that of row 0."""
    from keras_dpo.data.preprocessor import DPOPreprocessor
    from keras_dpo.data.reading import PairReader
    from keras_dpo.data.sources import open_rows
    from keras_dpo.data.tokenized import Tokenized

    bare = {"question": "Q", "chosen": "good", "rejected": "bad"}
    path = tmp_path / "rows.jsonl"
    rows = [{**bare, "system": "S"}, bare, bare]
    path.write_text("\n".join(map(json.dumps, rows)))
    seen = []

    class Seen(DPOPreprocessor):
        def tokenize(self, records, rows=None):
            seen.extend(records)
            return [Tokenized([1], [2], [3]) for _ in records]

    reader = PairReader(open_rows(path), Seen())
    assert [row for row, _ in reader.each_pair(first=1)] == [1, 2]
    assert seen == [CHAT, CHAT]


# --- Every column is used, listed or refused ----------------------------------

WITH_SYSTEM = [
    "the page's own",
    "trl ultrafeedback",
    "capybara multi-turn",
    "prompt messages, full lists",
    "orca",
    "alpaca",
    "helpsteer3",
    "helpsteer2",
    "shp",
    "summaries",
    "pku",
    "stack exchange",
    "scored list",
    "api",
]


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_a_system_text_stands_in_front(name):
    row, expected = LAYOUTS[name]
    records, report = normalize_records([{**row, "system": "Be kind"}])
    assert records[0]["prompt"][0] == {"role": "system", "content": "Be kind"}
    assert records[0]["prompt"][-1]["role"] == "user"
    assert records[0]["chosen"][0]["role"] == "assistant"
    assert "system" not in report.unused_columns


def test_a_system_text_beside_messages_that_hold_one():
    row = {
        "prompt": [SYSTEM, USER],
        "chosen": [GOOD],
        "rejected": [BAD],
        "system": "S",
    }
    assert normalize_records([row])[0][0]["prompt"] == [SYSTEM, USER]
    with pytest.raises(ValueError, match="Row 0, field 'system' must be the"):
        normalize_records([{**row, "system": "other"}])
    conversations, _ = LAYOUTS["sharegpt"]
    with pytest.raises(ValueError, match="field 'system' must be the text"):
        normalize_records([{**conversations, "system": "other"}])
    with pytest.raises(ValueError, match="'system' must be empty beside"):
        normalize_records([{**LAYOUTS["hh-rlhf"][0], "system": "S"}])


@pytest.mark.parametrize(
    ("name", "more", "unused"),
    [
        ("the page's own", {"input": "x", "question": "y"}, "input, question"),
        ("sharegpt", {"prompt": "x", "history": []}, "history, prompt"),
        ("trl ultrafeedback", {"history": "x", "input": "y"}, "history, input"),
        ("stack exchange", {"prompt": "x"}, "prompt"),
        ("helpsteer3", {"prompt": "x"}, "domain, prompt"),
        ("summaries", {"prompt": "x"}, "prompt"),
        ("orca", {"system_prompt": "x"}, "system_prompt"),
        ("helpsteer2", {"context": "x"}, "context"),
        ("token ids", {"system": "x", "prompt": "y"}, "prompt, system"),
    ],
)
def test_columns_that_nothing_reads_are_listed(name, more, unused):
    row, expected = LAYOUTS[name]
    records, report = normalize_records([{**row, **more}])
    assert records == [expected]
    assert report.lines()[-1] == f"Unused columns: {unused}"


def test_the_input_of_a_ranked_list_is_used():
    row = {**LAYOUTS["scored list"][0], "input": "this"}
    assert normalize_records([row])[0][0]["prompt"] == "Q\nthis"


def test_a_history_of_text_beside_a_prompt_is_refused():
    with pytest.raises(ValueError, match="'history' must be a list of"):
        normalize_records([{**TEXT, "history": "before"}])


def test_keys_of_an_api_row_s_input_are_listed():
    row, _ = LAYOUTS["api"]
    inner = {**row["input"], "parallel_tool_calls": True}
    _, report = normalize_records([{**row, "input": inner}])
    assert report.unused_columns == ["input.parallel_tool_calls"]


def test_a_prompt_that_is_not_in_the_messages_is_counted():
    row, _ = LAYOUTS["H4 ultrafeedback"]
    _, report = normalize_records([{**row, "prompt": "something else"}, row])
    assert report.counts == {
        "rows whose `prompt` is not in their messages: unused": 1
    }


def test_one_answer_that_repeats_the_prompt_is_refused():
    """Its prompt would stand there twice."""
    row = {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [BAD]}
    with pytest.raises(ValueError, match="field 'rejected' must be with the"):
        normalize_records([row])
    row = {
        "prompt": [SYSTEM, USER],
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
    }
    with pytest.raises(ValueError, match="begin with the prompt or the assist"):
        normalize_records([row])


def test_images_and_tools_that_nobody_sees_are_a_warning():
    rows = [
        {**TEXT, "images": [], "tools": [], "id": 1},
        {**TEXT, "images": ["a.png"], "tools": "[{}]", "id": 1},
    ]
    lines = normalize_records(rows)[1].lines()
    warned = "Warning: the images of 'images' are not seen by the model"
    assert lines[-3:] == [
        warned,
        "Warning: the tools of 'tools' are not seen by the model",
        "Unused columns: id",
    ]
    lines = normalize_records(rows[:1])[1].lines()
    assert lines[-1] == "Unused columns: id, images, tools"


# --- Tool calls ---------------------------------------------------------------

SCHEMA = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object"}},
}
CALL = {
    "role": "assistant",
    "tool_calls": [
        {
            "id": "c1",
            "type": "function",
            "function": {"name": "add", "arguments": '{"a": 1}'},
        }
    ],
}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"}


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_messages_are_kept_whole(content):
    thought = {**GOOD, "reasoning_content": "because", "mood": 1}
    row = {
        "prompt": [USER],
        "chosen": [{**CALL, **content}, RESULT, thought],
        "rejected": [BAD],
        "tools": [SCHEMA],
    }
    record = normalize_records([row])[0][0]
    assert record["chosen"] == [{**CALL, "content": ""}, RESULT, thought]
    assert record["tools"] == [SCHEMA]


@pytest.mark.parametrize(
    "found",
    [
        [SCHEMA],
        json.dumps([SCHEMA]),
        [json.dumps(SCHEMA)],
        SCHEMA,
        json.dumps(SCHEMA),
        [{**SCHEMA, "strict": None}],
    ],
)
def test_tools_are_schemas_or_their_json(found):
    for row in (
        {**CHAT, "tools": found},
        {**LAYOUTS["orca"][0], "tools": found},
        {**LAYOUTS["sharegpt"][0], "tools": found},
        {**LAYOUTS["helpsteer3"][0], "tools": found},
        {**LAYOUTS["api"][0], "input": {"messages": [USER], "tools": found}},
    ):
        records, report = normalize_records([row])
        assert records[0]["tools"] == [SCHEMA]
        assert not [x for x in report.unused_columns if "tools" in x]
    for nothing in (None, "", [], "[]"):
        assert normalize_records([{**CHAT, "tools": nothing}])[0] == [CHAT]


@pytest.mark.parametrize("wrong", ["{", 3, [3], "[3]"])
def test_tools_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="Row 0, field 'tools' must be"):
        normalize_records([{**CHAT, "tools": wrong}])


def test_keys_that_arrow_adds_are_left_out(tmp_path):
    """A column of messages has every key of all of them, null where absent."""
    import datasets

    row = {
        "prompt": [USER],
        "chosen": [CALL | {"content": ""}, RESULT, GOOD],
        "rejected": [BAD],
    }
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "x.parquet")
    found = read_rows(tmp_path / "x.parquet")
    assert "tool_call_id" in found[0]["chosen"][0]
    assert normalize_records(found)[0] == normalize_records([row])[0]


def test_messages_as_columns_keep_every_key():
    row = {
        "prompt": [USER],
        "rejected": [BAD],
        "chosen": {
            "role": ["assistant", "tool", "assistant"],
            "content": [None, "3", "good"],
            "tool_calls": [CALL["tool_calls"], None, None],
            "tool_call_id": [None, "c1", None],
            "name": [None, "add", None],
        },
    }
    found = read_rows([row])
    expected = [{**CALL, "content": ""}, RESULT, GOOD]
    assert normalize_records(found)[0][0]["chosen"] == expected


def test_notes_in_messages_are_no_difference():
    """Ids and ratings differ where the turn is one: the prompt is common."""
    row = {
        "chosen": [{**USER, "id": 1}, {**GOOD, "score": 5}],
        "rejected": [{**USER, "id": 2}, {**BAD, "score": 1}],
    }
    record = normalize_records([row])[0][0]
    assert record["prompt"] == [{**USER, "id": 1}]
    assert record["chosen"] == [{**GOOD, "score": 5}]


def test_llama_factory_s_calls():
    call = json.dumps({"name": "add", "arguments": {"a": 1}})
    row = {
        "conversations": [
            said("human", "Q"),
            said("function_call", call),
            said("observation", "3"),
        ],
        "chosen": said("gpt", "good"),
        "rejected": said("gpt", "bad"),
        "tools": json.dumps([SCHEMA]),
    }
    record = normalize_records([row])[0][0]
    calls = record["prompt"][1]["tool_calls"]
    assert calls == [{"type": "function", "function": json.loads(call)}]
    assert record["prompt"][2] == {"role": "tool", "content": "3"}


def test_an_assistant_without_words_and_calls_is_refused():
    bare = {"role": "assistant", "content": None, "tool_calls": []}
    with pytest.raises(
        ValueError, match="field 'chosen' must be messages with"
    ):
        normalize_records([{**CHAT, "chosen": [bare]}])


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


@pytest.mark.parametrize(
    "split", ["test", "trian", "trian[:10%]", "train+test"]
)
def test_a_split_that_is_not_there_is_refused(split, tmp_path):
    import datasets

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, valid=data).save_to_disk(tmp_path / "two")
    for source in (path, tmp_path / "one", tmp_path / "two", ROWS, data):
        with pytest.raises(ValueError, match="There is no split .*: train"):
            read_rows(source, split)
    assert read_rows(tmp_path / "two", "valid[:2]") == ROWS[:2]
    assert read_rows(path, "train[:1]+train[9:]") == [ROWS[0], ROWS[9]]
    with pytest.raises(ValueError, match="cannot be read"):
        read_rows(path, "train[:x%]")


def test_the_split_of_a_dataset_is_its_own():
    import datasets

    data = datasets.Dataset.from_list(ROWS, split="test")
    assert read_rows(data, "test[:2]") == read_rows(data, "train[:2]")
    with pytest.raises(ValueError, match="no split 'valid'.* train, test"):
        read_rows(data, "valid")


def test_csv_cells_hold_any_character(tmp_path):
    """U+2028, U+0085, form feed and the like end no line of a table."""
    import csv

    odd = "a\u2028b\x85c\x0cd\x0be\x1cf\u2029g"
    quoted = {"prompt": odd, "chosen": "x\ny", "rejected": "z\r\nw"}
    # The last: a writer that quotes no line feed.
    for end, row in (
        ("\n", quoted),
        ("\r\n", quoted),
        ("\r", {**TEXT, "prompt": odd}),
    ):
        with (tmp_path / "x.csv").open("w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, list(row), lineterminator=end)
            writer.writeheader()
            writer.writerows([row, row])
        assert read_rows(tmp_path / "x.csv") == [row, row]


@pytest.mark.parametrize("row", [0, 1])
def test_a_csv_row_with_a_comma_too_many_is_told(row, tmp_path):
    """It moved every cell: the good answer was trained as the rejected one."""
    lines = ["q1,good,bad", "q2,good,bad"]
    lines[row] = "Hello, world,Hi!,Go away"
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(["prompt,chosen,rejected", *lines]))
    with pytest.raises(ValueError, match=f"Row {row} .* has 4 cells"):
        read_rows(path)


def test_a_csv_column_that_is_named_twice_is_told(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,chosen,rejected\na,b,c,d\n")
    with pytest.raises(ValueError, match="'chosen' twice"):
        read_rows(path)


def test_parquet_that_cannot_be_read_is_told(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "pairs.parquet"
    path.write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match="pairs.parquet' is not parquet"):
        read_rows(path)
    rows = [
        {"prompt": f"question {n}", "chosen": "a" * n, "rejected": "b"}
        for n in range(500)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    content = bytearray(path.read_bytes())
    content[200:2000] = b"x" * 1800
    path.write_bytes(content)
    with pytest.raises(ValueError, match="pairs.parquet' is not parquet"):
        read_rows(path)
