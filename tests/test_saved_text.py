"""A policy keeps the tokenizer and template it was trained with."""

import dataclasses
import datetime
import json

import keras
import pytest
import yaml
from conftest import random_pairs, tiny_policy

import keras_dpo
from keras_dpo import DPOConfig, DPOModel, DPOPreprocessor, PreferenceDataset
from keras_dpo.data.chat_templates import TEMPLATES
from keras_dpo.errors import UserError
from keras_dpo.runs.build import make_preprocessor_alone
from keras_dpo.runs.config import LOSS_OPTIONS
from keras_dpo.runs.config_file import with_date_of_run

TURNS = [{"role": "user", "content": "a b"}]


def word_tokenizer(words="a b c d e f"):
    """One id a word; whatever stands between two spaces is a word."""
    import tokenizers
    import transformers

    special = ["<pad>", "<end>", "<?>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {w: i for i, w in enumerate([*special, *words.split()])}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary, unk_token="<?>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<?>",
    )


def keras_hub_policy():
    """With a tokenizer of Keras-Hub's own, which has no template."""
    import keras_hub

    names = ["<|endoftext|>", "a", "b", "c", "Ġ", "ab", "Ċ", "<", "|", ">"]
    names += list("defghijklmnopqrstuvwxyz_")
    tokenizer = keras_hub.tokenizers.GPT2Tokenizer(
        vocabulary={name: i for i, name in enumerate(names)}, merges=["a b"]
    )
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=64,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=16,
        max_sequence_length=64,
    )
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(tokenizer)
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor)


def test_the_tokenizer_of_training_is_saved_without_being_named(tmp_path):
    """README's own save: `save_policy(policy, directory)`."""
    policy = tiny_policy(layers=1)
    given = DPOPreprocessor(word_tokenizer(), chat_template="chatml")
    DPOModel(policy, preprocessor=given)
    keras_dpo.save_policy(policy, tmp_path / "tuned")
    loaded = keras_dpo.load_policy(tmp_path / "tuned")
    found = DPOPreprocessor.from_policy(loaded)
    assert found.prompt_ids(TURNS) == given.prompt_ids(TURNS)
    assert found.template == TEMPLATES["chatml"]
    # And through a second save of what was only loaded.
    keras_dpo.save_policy(loaded, tmp_path / "again")
    again = keras_dpo.load_policy(tmp_path / "again")
    found = DPOPreprocessor.from_policy(again)
    assert found.prompt_ids(TURNS) == given.prompt_ids(TURNS)
    # Whoever reads the tokenizer alone gets the template, too.
    import transformers

    alone = transformers.AutoTokenizer.from_pretrained(
        tmp_path / "again" / "huggingface_tokenizer"
    )
    assert alone.chat_template == TEMPLATES["chatml"]
    config = DPOConfig(repo_id=str(tmp_path / "again"))
    without = make_preprocessor_alone(config)
    assert without.prompt_ids(TURNS) == given.prompt_ids(TURNS)


def test_a_template_beside_a_keras_hub_tokenizer_is_saved(tmp_path):
    policy = keras_hub_policy()
    assert not DPOPreprocessor.from_policy(policy).has_template()
    given = DPOPreprocessor.from_policy(policy, chat_template="zephyr")
    DPOModel(policy, preprocessor=given)
    keras_dpo.save_policy(policy, tmp_path / "tuned")
    loaded = keras_dpo.load_policy(tmp_path / "tuned")
    found = DPOPreprocessor.from_policy(loaded)
    assert found.prompt_ids(TURNS) == given.prompt_ids(TURNS)
    config = DPOConfig(repo_id=str(tmp_path / "tuned"))
    without = make_preprocessor_alone(config)
    assert without.prompt_ids(TURNS) == given.prompt_ids(TURNS)
    assert "zephyr" in without.describe_template()


def test_settings_of_a_template_are_saved(tmp_path):
    """Which a later call may still replace, by none as well."""
    template = "{{ mood }} {{ messages[0]['content'] }} "
    given = DPOPreprocessor(
        word_tokenizer(),
        chat_template=template,
        chat_template_kwargs={"mood": "c d"},
    )
    policy = tiny_policy(layers=1)
    keras_dpo.save_policy(policy, tmp_path / "tuned", given)
    loaded = keras_dpo.load_policy(tmp_path / "tuned")
    found = DPOPreprocessor.from_policy(loaded)
    assert found.prompt_ids(TURNS) == given.prompt_ids(TURNS) == [7, 8, 5, 6]
    bare = DPOPreprocessor.from_policy(loaded, chat_template_kwargs={})
    assert bare.prompt_ids(TURNS) == [5, 6]


DATED = (
    "{{ strftime_now('%d') }} "
    "{% for message in messages %}{{ message['content'] }} {% endfor %}"
)


@pytest.mark.slow
def test_a_run_that_goes_on_another_day_keeps_its_date(tmp_path):
    """Its prompts, and so its pairs, are those that it began with."""
    policy = tiny_policy(layers=1)
    tokenizer = word_tokenizer("a b c 01 02")
    tokenizer.chat_template = DATED
    keras_dpo.save_policy(policy, tmp_path / "p", DPOPreprocessor(tokenizer))
    rows = [
        {
            "prompt": [{"role": "user", "content": "a"}],
            "chosen": [{"role": "assistant", "content": "b"}],
            "rejected": [{"role": "assistant", "content": "c"}],
        }
    ] * 4
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    settings = {
        "repo_id": str(tmp_path / "p"),
        "dataset_name": str(tmp_path / "pairs.json"),
        "save_directory": str(tmp_path),
        "model_name": "run",
        "total_batch_size": 2,
        "num_train_epochs": 1,
        "num_sample_prompts": 0,
        "learning_rate_schedule": "constant",
    }
    done = keras_dpo.train(DPOConfig(template_date="2020-05-01", **settings))
    # Another day, the same command: it goes on, with the day it began.
    more = {**settings, "num_train_epochs": 2}
    again = keras_dpo.train(DPOConfig(**more))
    assert again.model.preprocessor.date == "2020-05-01"
    assert len(again.history["loss"]) == 2
    saved = yaml.safe_load((done.directory / "config.yaml").read_text())
    assert saved["template_date"] == "2020-05-01"
    path = tmp_path / "run" / "backups"
    for resume, date in (
        ("auto", "2020-05-01"),
        (str(path), "2020-05-01"),
        (str(path / "4"), "2020-05-01"),
        ("never", datetime.date.today().isoformat()),
    ):
        config = DPOConfig(resume=resume, **settings)
        found = with_date_of_run(config, tmp_path / "run")
        assert found.template_date == date, resume
    new = DPOConfig(**{**settings, "model_name": "new"})
    today = datetime.date.today().isoformat()
    assert with_date_of_run(new, tmp_path / "new").template_date == today


ROWS = [
    {
        "prompt": [{"role": "user", "content": text}],
        "chosen": [{"role": "assistant", "content": "c"}],
        "rejected": [{"role": "assistant", "content": "d"}],
    }
    for text in ("a", "b")
]


def test_what_a_dataset_was_made_with_is_what_is_kept(tmp_path, capsys):
    """Not what the model would have made of messages."""
    keras.config.enable_interactive_logging()
    policy = with_tokenizer(word_tokenizer())
    given = DPOPreprocessor(word_tokenizer(), chat_template="zephyr")
    pairs = PreferenceDataset(ROWS, given, batch_size=2, verbose=False)
    model = DPOModel(policy)
    model.compile("sgd")
    model.fit(pairs, verbose=1)
    assert "Chat template: zephyr" in capsys.readouterr().out
    keras_dpo.save_policy(policy, tmp_path / "tuned")
    loaded = keras_dpo.load_policy(tmp_path / "tuned")
    found = DPOPreprocessor.from_policy(loaded)
    assert found.prompt_ids(TURNS) == given.prompt_ids(TURNS)


def test_the_policy_of_a_loaded_model_keeps_its_text(tmp_path):
    """For a next round."""
    given = DPOPreprocessor(word_tokenizer(), chat_template="chatml")
    model = DPOModel(tiny_policy(layers=1), preprocessor=given)
    model.compile("sgd")
    model.save(tmp_path / "model.keras")
    policy = keras.models.load_model(tmp_path / "model.keras").policy
    found = DPOModel(policy).preprocessor
    assert found.prompt_ids(TURNS) == given.prompt_ids(TURNS)
    assert found.describe_template() == "chatml"


def test_a_tokenizer_that_would_not_come_back_is_told(tmp_path):
    tokenizer = keras_hub_policy().preprocessor.tokenizer
    model = DPOModel(
        tiny_policy(layers=1), preprocessor=DPOPreprocessor(tokenizer)
    )
    with pytest.raises(UserError, match="the policy's own preprocessor does"):
        model.save(tmp_path / "model.keras")


def with_tokenizer(tokenizer):
    policy = tiny_policy(layers=1)
    policy._huggingface_tokenizer = tokenizer
    return policy


def test_models_of_other_tokens_are_not_compared():
    policy = with_tokenizer(word_tokenizer())
    with pytest.raises(UserError, match="'c' to the policy and 'x' to the ref"):
        DPOModel(policy, with_tokenizer(word_tokenizer("a b x d e f")))
    # More tokens at the end are no other tokens.
    longer = with_tokenizer(word_tokenizer("a b c d e f g"))
    DPOModel(policy, longer, preprocessor=None)


def test_models_that_split_text_otherwise_are_not_compared():
    import tokenizers

    policy, other = word_tokenizer(), word_tokenizer()
    other.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        " ", "isolated"
    )
    with pytest.raises(UserError, match="must make the same ids of a text"):
        DPOModel(with_tokenizer(policy), with_tokenizer(other))


def test_a_run_names_its_tokenizer_and_template(capsys):
    keras.config.enable_interactive_logging()
    policy = tiny_policy(layers=1)
    given = DPOPreprocessor(word_tokenizer(), chat_template="chatml")
    model = DPOModel(policy, preprocessor=given)
    model.compile("sgd")
    model.fit(random_pairs(4), batch_size=4, verbose=1)
    said = capsys.readouterr().out
    assert "Tokenizer: the model's own tokenizer.json" in said
    assert "Chat template: chatml" in said


# --- Settings that are not set -----------------------------------------------


@pytest.mark.parametrize("name", list(keras_dpo.losses.LOSSES))
def test_a_saved_config_says_what_a_loss_uses(name):
    config = DPOConfig(loss_type=name)
    resolved = config.resolved()
    used = config.make_loss().get_config()
    used = {k: v for k, v in used.items() if k in LOSS_OPTIONS}
    for option, value in used.items():
        assert getattr(resolved, option) == value, option
    again = DPOConfig(**dataclasses.asdict(resolved))
    assert again.make_loss().get_config().items() >= used.items()
    assert again.resolved() == resolved


def test_a_value_that_equals_a_default_elsewhere_is_set():
    """simpo's own beta is 2, most others' is 0.1."""
    assert DPOConfig(loss_type="simpo").make_loss().beta == 2.0
    config = DPOConfig(loss_type="simpo", beta=0.1)
    assert config.make_loss().beta == 0.1
    assert config.resolved().beta == 0.1
    with pytest.raises(UserError, match="does not read label_smoothing"):
        DPOConfig(loss_type="hinge", label_smoothing=0.0)
    exo = DPOConfig(loss_type="exo_pair").resolved()
    assert exo.label_smoothing == 1e-3


def test_losses_with_defaults_of_their_own_keep_them_in_a_mixture():
    config = DPOConfig(loss_type="sigmoid,simpo", loss_weights="1,1")
    assert [x.beta for x in config.make_loss().losses] == [0.1, 2.0]
    assert config.resolved().beta is None
    assert config.resolved().gamma == 0.5
    again = config.resolved().make_loss()
    assert [x.beta for x in again.losses] == [0.1, 2.0]


def test_the_default_learning_rate_is_for_what_is_trained():
    assert DPOConfig().resolved().learning_rate == 1e-6
    assert DPOConfig(lora_rank=8).resolved().learning_rate == 1e-4
    set_by_hand = DPOConfig(lora_rank=8, learning_rate=1e-6)
    assert set_by_hand.resolved().learning_rate == 1e-6
