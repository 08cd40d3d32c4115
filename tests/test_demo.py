"""The built-in demo does what it says."""

import pytest

from keras_dpo.runs.demo import make_questions, run_demo


@pytest.mark.slow
def test_demo_learns_from_chance_to_near_certainty(tmp_path):
    before, after = run_demo(str(tmp_path))
    assert 0.25 < before < 0.75
    assert after > 0.9
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "Answers to held-out prompts" in page


def test_held_out_questions_are_not_trained_on():
    training, held_out = make_questions(0)
    assert not {q.prompt for q in training} & {q.prompt for q in held_out}
    assert {(q.right, q.wrong) for q in held_out} <= {
        (q.right, q.wrong) for q in training
    }
