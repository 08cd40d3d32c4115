"""The built-in demo: a tiny model learns which of two answers is right.

A small Keras-Hub model is first trained on generated text in which a right
and a wrong answer are equally likely, so it knows both and prefers neither.
Preference pairs on some wordings of each question then teach it which to give,
and held-out wordings show that it learned the fact.
"""

import json
import pathlib
import random
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_dpo.data.preprocessor import DPOPreprocessor
from keras_dpo.policies.generation import generate
from keras_dpo.policies.presets import load_policy, save_policy
from keras_dpo.runs.config import DPOConfig
from keras_dpo.runs.train import train
from keras_dpo.utils.messages import say

CAPITALS = """
France Paris Lyon; Italy Rome Milan; Spain Madrid Barcelona; Germany Berlin
Munich; Portugal Lisbon Porto; Poland Warsaw Krakow; Austria Vienna Graz;
Greece Athens Patras; Sweden Stockholm Malmo; Norway Oslo Bergen; Denmark
Copenhagen Aarhus; Finland Helsinki Turku; Ireland Dublin Cork; Scotland
Edinburgh Glasgow; Turkey Ankara Istanbul; Egypt Cairo Alexandria; Morocco
Rabat Casablanca; Kenya Nairobi Mombasa; Nigeria Abuja Lagos; Ghana Accra
Kumasi; India Delhi Mumbai; China Beijing Shanghai; Japan Tokyo Osaka; Vietnam
Hanoi Hue; Thailand Bangkok Phuket; Australia Canberra Sydney; Canada Ottawa
Toronto; Brazil Brasilia Santos; Peru Lima Cusco; Chile Santiago Valparaiso;
Cuba Havana Trinidad; Switzerland Bern Zurich
"""
UNITS = """
minutes hour 60; hours day 24; days week 7; months year 12; seconds minute 60;
centimetres metre 100; grams kilogram 1000; millimetres centimetre 10;
metres kilometre 1000; inches foot 12; feet yard 3; cents euro 100
"""
WORDINGS = {
    "capital": (
        "What is the capital of {0} ?",
        "Name the capital of {0} .",
        "Which city is the capital of {0} ?",
        "{0} has which city as its capital ?",
    ),
    "sum": (
        "What is {0} plus {1} ?",
        "How much is {0} plus {1} ?",
        "Add {0} plus {1} .",
        "Work out {0} plus {1} .",
    ),
    "unit": (
        "How many {0} are in a {1} ?",
        "A {1} has how many {0} ?",
        "Count the {0} in a {1} .",
        "Tell me how many {0} make a {1} .",
    ),
}


class Question(NamedTuple):
    """A question with its right and its wrong answer."""

    prompt: str
    right: str
    wrong: str


def make_questions(seed: int) -> tuple[list[Question], list[Question]]:
    """Make (training, held-out) questions; one wording per fact is held out."""
    chance = random.Random(seed)
    facts: list[tuple[str, tuple[str, ...], str, str]] = []
    for row in CAPITALS.split(";"):
        country, right, wrong = row.split()
        facts.append(("capital", (country,), right, wrong))
    for a in range(2, 8):
        for b in range(2, 8):
            off = chance.choice((-1, 1))
            facts.append(
                ("sum", (str(a), str(b)), str(a + b), str(a + b + off))
            )
    for row in UNITS.split(";"):
        part, whole, right = row.split()
        wrong = str(int(right) + chance.choice((-2, 2)))
        facts.append(("unit", (part, whole), right, wrong))
    training, held_out = [], []
    for kind, words, right, wrong in facts:
        wordings = list(WORDINGS[kind])
        chance.shuffle(wordings)
        questions = [
            Question(wording.format(*words), right, wrong)
            for wording in wordings
        ]
        training += questions[:-1]
        held_out.append(questions[-1])
    return training, held_out


def make_tokenizer(questions: list[Question]) -> Any:
    """Make a word-level Hugging Face tokenizer for the demo's words."""
    import tokenizers
    import transformers

    words = {
        word
        for question in questions
        for text in question
        for word in text.split()
    }
    vocabulary = {
        word: index
        for index, word in enumerate(["<pad>", "<end>", "<?>", *sorted(words)])
    }
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary, unk_token="<?>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<?>",
    )


def make_undecided_policy(
    questions: list[Question], tokenizer: Any, epochs: int
) -> keras.Model:
    """Train a tiny Qwen3 to give right and wrong answers equally often."""
    import keras_hub

    backbone = keras_hub.models.Qwen3Backbone(
        vocabulary_size=len(tokenizer),
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        hidden_dim=96,
        intermediate_dim=256,
        tie_word_embeddings=True,
        sliding_window_size=None,
    )
    policy = keras_hub.models.Qwen3CausalLM(backbone, preprocessor=None)
    texts = [f"{q.prompt} {a}" for q in questions for a in q[1:]]
    rows = [tokenizer.encode(text) + [1] for text in texts]
    length = max(map(len, rows))
    ids = np.zeros((len(rows), length), "int32")
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    mask = (ids > 0).astype("int32")
    inputs = {"token_ids": ids[:, :-1], "padding_mask": mask[:, :-1]}
    policy.compile(
        optimizer=keras.optimizers.Adam(3e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
    )
    policy.fit(
        inputs,
        ids[:, 1:],
        sample_weight=mask[:, 1:],
        batch_size=64,
        epochs=epochs,
        verbose=0,
    )
    return policy


def count_right(
    policy: keras.Model, preprocessor: DPOPreprocessor, questions: Any
) -> int:
    """Number of questions that the policy answers correctly."""
    prompts = [question.prompt for question in questions]
    answers = generate(policy, preprocessor, prompts, max_new_tokens=4)
    return sum(
        answer == question.right
        for answer, question in zip(answers, questions, strict=True)
    )


def _write_pairs(questions: list[Question], path: pathlib.Path) -> None:
    rows = [
        {"prompt": q.prompt, "chosen": f" {q.right}", "rejected": f" {q.wrong}"}
        for q in questions
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_demo(
    directory: str = "keras_dpo_demo", seed: int = 0, epochs: int = 8
) -> tuple[float, float]:
    """Run the demo and print its results.

    Args:
        directory: Directory that everything is written to.
        seed: Random seed for questions, weights and order.
        epochs: Passes through the preference pairs.

    Returns:
        Fractions of held-out questions answered correctly, before and after.
    """
    root = pathlib.Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(seed)
    training, held_out = make_questions(seed)
    say(
        f"{len(training)} questions to learn from, {len(held_out)} held out. "
        "Teaching a tiny model both answers to each ..."
    )
    everything = [*training, *held_out]
    tokenizer = make_tokenizer(everything)
    policy = make_undecided_policy(everything, tokenizer, epochs=80)
    preprocessor = DPOPreprocessor(tokenizer, 64, 32)
    save_policy(policy, root / "undecided", preprocessor)
    before = count_right(policy, preprocessor, held_out) / len(held_out)
    say(f"Held-out questions answered rightly before: {before:.0%}")
    _write_pairs(training, root / "train.jsonl")
    _write_pairs(held_out, root / "held_out.jsonl")
    run = train(
        DPOConfig(
            model_name="demo",
            repo_id=str(root / "undecided"),
            dataset_name=str(root / "train.jsonl"),
            validation_dataset_name=str(root / "held_out.jsonl"),
            save_directory=str(root),
            # The sft term keeps right answers likely; without it the margin
            # may also grow by both answers becoming unlikely.
            loss_type="sigmoid,sft",
            loss_weights="1,0.3",
            learning_rate=1e-3,
            total_batch_size=16,
            num_train_epochs=epochs,
            max_length=64,
            max_prompt_length=32,
            log_steps=5,
            num_sample_prompts=6,
            max_new_tokens=4,
            seed=seed,
        )
    )
    tuned = load_policy(str(run.directory / "policy"))
    after = count_right(tuned, preprocessor, held_out) / len(held_out)
    say(
        f"Held-out questions answered rightly: {before:.0%} before, "
        f"{after:.0%} after"
    )
    return before, after
