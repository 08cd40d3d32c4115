"""What a dataset and a model must agree on, said before anything runs."""

import keras
import numpy as np
import pytest
from conftest import on_eight_devices, random_pairs, tiny_policy
from test_callbacks import NumberTokenizer

from keras_dpo import (
    DPOModel,
    DPOPreprocessor,
    Execution,
    PreferenceDataset,
    generate,
)
from keras_dpo.callbacks import GenerationSamples
from keras_dpo.policies.generation import generate_ids
from keras_dpo.policies.positions import num_positions

POSITIONS = 32


def positioned(family="GPT2"):
    """A random model with a table of 32 positions."""
    import keras_hub

    keras.utils.set_random_seed(0)
    backbone = getattr(keras_hub.models, f"{family}Backbone")(
        vocabulary_size=64,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=POSITIONS,
    )
    return getattr(keras_hub.models, f"{family}CausalLM")(
        backbone, preprocessor=None
    )


def pair_of(length):
    """Token ids that are so long with either answer."""
    return {
        "prompt_ids": [5] * (length - 3),
        "chosen_ids": [6, 7, 2],
        "rejected_ids": [8, 2],
    }


@pytest.mark.parametrize("family", ["GPT2", "OPT"])
@pytest.mark.parametrize("packing", [True, False])
def test_pairs_beyond_the_table_of_positions(family, packing):
    """They gave NaN, or a shape error of Keras-Hub where rows are padded.
    OPT's table has no offset in Keras-Hub: its 32 rows are 32 positions."""
    policy = positioned(family)
    assert num_positions(policy) == POSITIONS
    model = DPOModel(
        policy,
        execution=Execution(
            packing=packing, attention="auto" if packing else "keras"
        ),
    )
    model.compile("sgd")
    options = {"batch_size": 1, "buckets": [POSITIONS], "verbose": False}
    fits = PreferenceDataset([pair_of(POSITIONS)], **options)
    assert np.isfinite(
        model.evaluate(fits, verbose=0, return_dict=True)["loss"]
    )
    options["buckets"] = [64]
    rows = [pair_of(8), pair_of(POSITIONS + 1)]
    beyond = PreferenceDataset(rows, **options)
    for run in (model.evaluate, model.fit, model.predict):
        with pytest.raises(ValueError, match="Row 1 has 33 .* 32 positions"):
            run(beyond, verbose=0)
    # Nothing was lost on the way.
    assert np.isfinite(
        model.evaluate(fits, verbose=0, return_dict=True)["loss"]
    )


def test_a_bucket_beyond_the_table_of_positions():
    model = DPOModel(positioned(), execution=Execution(attention="keras"))
    model.compile("sgd")
    data = PreferenceDataset([pair_of(8)], batch_size=1, verbose=False)
    with pytest.raises(ValueError, match="bucket of 64 tokens, 32 positions"):
        model.evaluate(data, verbose=0)


def test_a_reference_s_table_counts():
    policy, reference = positioned(), positioned()
    reference.backbone.position_embedding.sequence_length = 8
    model = DPOModel(policy, reference)
    model.compile("sgd")
    data = PreferenceDataset([pair_of(9)], batch_size=1, verbose=False)
    with pytest.raises(ValueError, match="Row 0 has 9 tokens.* 8 positions"):
        model.evaluate(data, verbose=0)


def test_answers_beyond_the_table_of_positions():
    policy = positioned()
    with pytest.raises(ValueError, match="prompt of 30 tokens, max_new_tok"):
        generate_ids(policy, [[5] * 30], [2], 3)
    # The length is not rounded up beyond it.
    answers = generate_ids(policy, [[5] * 30], [64], 2)
    assert len(answers[0]) == 2
    assert num_positions(tiny_policy(layers=1)) is None


def test_kl_needs_log_probs_of_every_token():
    """It compared each token with its completion's sum."""
    rows = [
        {
            **row,
            "reference_chosen_log_prob": -40.0,
            "reference_rejected_log_prob": -40.0,
        }
        for row in random_pairs(2)
    ]
    model = DPOModel(tiny_policy(layers=1), "precomputed")
    model.compile("sgd", metrics=["kl"])
    data = PreferenceDataset(rows, batch_size=2, verbose=False)
    for run in (model.evaluate, model.fit):
        with pytest.raises(ValueError, match="The metric kl needs reference"):
            run(data, verbose=0)
    model.compile("sgd", metrics=["chosen_length"])
    assert np.isfinite(model.evaluate(data, verbose=0)).all()


def test_given_log_probs_of_texts_that_are_cut():
    """They are of the whole text: the policy would be held against more."""
    row = {
        "prompt": "5 6",
        "chosen": "7 8 9 10 11",
        "rejected": "7",
        "reference_chosen_log_prob": -9.0,
        "reference_rejected_log_prob": -3.0,
    }
    limits = {"max_length": 6, "max_prompt_length": 3}
    cut = DPOPreprocessor(NumberTokenizer(), chat_template=None, **limits)
    with pytest.raises(ValueError, match="Row 0 is cut to the limits, and its"):
        PreferenceDataset([row], cut, 1, verbose=False)
    drop = DPOPreprocessor(
        NumberTokenizer(), chat_template=None, on_overflow="drop", **limits
    )
    short = {**row, "chosen": "7 8"}
    data = PreferenceDataset([row, short], drop, 1, verbose=False)
    assert data.report.rows == [1]


EIGHT = """
import json, sys
sys.path.insert(0, "tests")
import keras
from conftest import random_pairs, tiny_policy
import keras_dpo

keras_dpo.distribution.set_mesh({"data": 8})
model = keras_dpo.DPOModel(tiny_policy(layers=1), reference="precomputed")
model.compile("sgd")
pairs = random_pairs(16)
said = []
for run in (model.fit, model.evaluate, model.predict, model.memory_report,
            model.precompute):
    try:
        run(pairs, batch_size=4)
        said.append("nothing")
    except ValueError as error:
        said.append(f"{type(error).__name__}: {error}")
print("RESULT" + json.dumps(said))
"""


@pytest.mark.slow
def test_a_batch_smaller_than_the_mesh():
    """In every way in; it was "cannot reshape array of size 4 into (8)"."""
    for text in on_eight_devices(EIGHT)[0]:
        assert text.startswith("UserError: The batch must divide into"), text
        assert "Use a multiple of 8." in text


# --- One prompt ---------------------------------------------------------------


@pytest.mark.slow
def test_one_prompt_gives_one_answer():
    """A string was answered letter by letter."""
    policy = tiny_policy(layers=1)
    preprocessor = DPOPreprocessor(
        NumberTokenizer(),
        chat_template="{% for m in messages %}{{ m.content }}"
        "{% if tools %}{{ ' ' + tools[0].name }}{% endif %}{% endfor %}",
    )

    def answer(prompts):
        return generate(policy, preprocessor, prompts, max_new_tokens=4)

    chat = [{"role": "user", "content": "5 6 7"}]
    tools = [{"name": "8"}]
    asked = {"prompt": chat, "tools": tools}
    one = answer("5 6 7")
    assert isinstance(one, str)
    assert answer(["5 6 7", "9"]) == [one, answer("9")]
    assert isinstance(answer(chat), str)
    assert answer([chat, "9"]) == [answer(chat), answer("9")]
    assert answer([asked]) == [answer(asked)]
    assert answer([]) == []


@pytest.mark.parametrize(
    "prompt", ["5 6 7", [{"role": "user", "content": "5 6 7"}]]
)
def test_samples_of_one_prompt(prompt):
    assert GenerationSamples(prompt).prompts == [prompt]
    assert GenerationSamples([prompt, "9"]).prompts == [prompt, "9"]
    asked = {"prompt": [{"role": "user", "content": "5"}], "tools": []}
    assert GenerationSamples(asked).prompts == [asked]
