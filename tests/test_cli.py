"""The command: help, config and flags, mistakes in one line."""

import json
import subprocess
import sys

import pytest
import yaml
from conftest import PAIRS, environment, random_pairs, tiny_policy

import keras_dpo
from keras_dpo.runs import cli, train


def call(*arguments, capsys):
    """(exit status, stdout, stderr) of a command run in this process."""
    try:
        cli.main([str(a) for a in arguments])
        status = 0
    except SystemExit as end:
        status = end.code or 0
    out = capsys.readouterr()
    return status, out.out, out.err


@pytest.fixture
def command(capsys):
    import keras

    keras.config.enable_interactive_logging()
    return lambda *arguments: call(*arguments, capsys=capsys)


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    keras_dpo.save_policy(tiny_policy(), path / "policy")
    lines = [json.dumps(pair) + "\n" for pair in random_pairs(12)]
    (path / "pairs.jsonl").write_text("".join(lines))
    return path


def test_help_is_grouped(command):
    status, out, _ = command("train", "--help")
    assert status == 0
    for title in cli.GROUPS:
        assert f"{title}:" in out
    assert "Strength of the pull towards the reference" in out


def test_every_setting_is_described():
    import dataclasses

    about = cli.setting_help()
    for field in dataclasses.fields(keras_dpo.DPOConfig):
        assert about[field.name], field.name


def test_help_does_not_depend_on_a_docstring_s_indentation():
    """Python 3.13 strips it, 3.11 keeps it; both are read on either."""
    import inspect
    import textwrap

    stripped = inspect.cleandoc(keras_dpo.DPOConfig.__doc__)
    first, _, rest = stripped.partition("\n")
    indented = f"{first}\n{textwrap.indent(rest, '    ')}"
    about = cli.setting_help(stripped)
    assert about == cli.setting_help(indented) == cli.setting_help()
    assert about["repo_id"].startswith("Policy: a Keras-Hub preset")
    assert about["warmup_ratio"] == "Share of the steps that warm up."
    # A description of several lines is one.
    assert about["streaming"].endswith("which the epochs share.")


@pytest.mark.slow
def test_help_without_docstrings():
    """`python -OO` has none."""
    done = subprocess.run(
        [sys.executable, "-OO", "-m", "keras_dpo", "train", "--help"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--repo_id" in done.stdout


def test_printed_config_is_valid_yaml_and_comes_back(command, tmp_path):
    _, out, _ = command("train", "--beta", "0.3", "--print_config")
    config = yaml.safe_load(out)
    assert config["beta"] == 0.3
    (tmp_path / "c.yaml").write_text(out)
    _, again, _ = command(
        "train", "--config", tmp_path / "c.yaml", "--print_config"
    )
    assert again == out


def test_flags_win_over_the_file_wherever_they_stand(command, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("beta: 0.2\nlearning_rate: 5e-7\n")
    _, out, _ = command(
        "train", "--beta", "0.3", "--config", path, "--print_config"
    )
    config = yaml.safe_load(out)
    assert config["beta"] == 0.3
    assert config["learning_rate"] == 5e-7  # a number, not a string


@pytest.mark.parametrize("spelling", ["--config={}", "--conf {}", "--con={}"])
def test_flags_win_however_the_file_is_named(command, tmp_path, spelling):
    path = tmp_path / "c.yaml"
    path.write_text("beta: 0.2\nlearning_rate: 5e-7\n")
    file = spelling.format(path).split()
    _, out, _ = command("train", "--beta", "0.3", *file, "--print_config")
    assert yaml.safe_load(out)["beta"] == 0.3
    path.write_bytes(b"model_name: \xff")
    status, _, err = command("train", *file)
    assert status == 2
    assert "is not UTF-8" in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_refused_start_leaves_the_config_of_the_run(
    command, preset, tmp_path
):
    arguments = [
        "train", "--repo_id", preset / "policy", "--dataset_name",
        preset / "pairs.jsonl", "--save_directory", tmp_path,
        "--model_name", "run", "--num_train_epochs", 1,
        "--num_sample_prompts", 0, "--total_batch_size", 4,
    ]  # fmt: skip
    assert command(*arguments)[0] == 0
    path = tmp_path / "run" / "config.yaml"
    before = path.read_text()
    assert yaml.safe_load(before)["beta"] == 0.1
    status, _, err = command(*arguments, "--beta", 0.7)
    assert status == 2
    assert "loss.beta was 0.1 and is 0.7" in err
    assert path.read_text() == before


def test_the_page_s_example_flags(command):
    """Every flag of the page's command, switches with and without value."""
    arguments = (
        "--repo_id meta/llama --dataset_name trl-lib/ultrafeedback_binarized "
        "--dataset_split train[:90%] --refrence_model_repo_id meta/other "
        "--attn_mechanism vanilla --beta 0.08 --loss_type sigmoid "
        "--max_length 2048 --max_prompt_length 1024 --max_completion_length "
        "512 --ref_model_sync_steps 128 --ref_model_mixup_alpha 0.6 "
        "--sync_ref_model True --disable_dropout true --reference_free false "
        "--label_smoothing 0.0 --total_batch_size 16 "
        "--gradient_accumulation_steps 2 --num_train_epochs 1 "
        "--learning_rate 1e-6 --log_steps 50 --save_steps 200 --do_last_save "
        "--save_directory out --model_name run --dtype bfloat16 --use_wandb"
    ).split()
    status, out, err = command("train", *arguments, "--print_config")
    assert status == 0, err
    config = yaml.safe_load(out)
    assert config["use_wandb"] is True
    assert config["do_last_save"] is True
    assert config["sync_ref_model"] is True
    assert config["dataset_split"] == "train[:90%]"


def test_train_and_evaluate(command, preset, tmp_path):
    common = [
        "--repo_id",
        preset / "policy",
        "--dataset_name",
        preset / "pairs.jsonl",
    ]
    status, out, err = command(
        "train",
        *common,
        "--save_directory",
        tmp_path,
        "--model_name",
        "run",
        "--total_batch_size",
        4,
        "--num_train_epochs",
        2,
        "--log_steps",
        1,
        "--learning_rate",
        "1e-2",
        "--num_sample_prompts",
        0,
    )
    assert status == 0, err
    assert "Reference: a snapshot" in out
    assert "Rows: 12 (token ids)" in out
    run = tmp_path / "run"
    assert sorted(p.name for p in run.iterdir()) == [
        "backups",
        "config.yaml",
        "metrics.jsonl",
        "policy",
        "report.html",
    ]
    page = (run / "report.html").read_text()
    assert "<polyline" in page
    assert "Rows: 12 (token ids)" in page
    status, out, err = command(
        "evaluate",
        "--repo_id",
        run / "policy",
        "--dataset_name",
        preset / "pairs.jsonl",
        "--reference_model_repo_id",
        preset / "policy",
    )
    assert status == 0, err
    numbers = json.loads(out[out.rindex("{") :])
    assert numbers["reward_accuracy"] > 0.9


def test_inspect(command, chat_preset):
    status, out, err = command(
        "inspect",
        "--repo_id",
        chat_preset,
        "--dataset_name",
        PAIRS,
        "--dataset_split",
        "train[:80%]",
        "--validation_split",
        "train[80%:]",
        "--show",
        1,
    )
    assert status == 0, err
    for text in (
        "Rows: 19 (ShareGPT conversations)",
        "Chosen longer than",
        "padded to",
        "Prompt tokens",
        "#####",
        "Row 0:",
        "\033[35m<|im_start|>",
    ):
        assert text in out, text


def test_generate_answers_as_in_python(command, chat_preset):
    prompts = ["What is the capital of France?", "Name a colour."]
    status, out, _ = command(
        "generate",
        "--repo_id",
        chat_preset,
        "--prompt",
        *prompts,
        "--max_new_tokens",
        8,
    )
    assert status == 0
    policy = keras_dpo.load_policy(chat_preset)
    turns = [[{"role": "user", "content": text}] for text in prompts]
    answers = keras_dpo.generate(
        policy, keras_dpo.DPOPreprocessor.from_policy(policy), turns, 8
    )
    assert all(answers)
    assert out.endswith("\n".join(answers) + "\n")


def test_generate(command, smollm2):
    status, out, _ = command(
        "generate",
        "--repo_id",
        smollm2,
        "--prompt",
        "What is the capital of France?",
        "--max_new_tokens",
        8,
    )
    assert status == 0
    assert "Paris" in out


@pytest.fixture
def mistakes(tmp_path, preset, chat_preset):
    def write(name, text):
        path = tmp_path / name
        path.write_text(text)
        return path

    train = [
        "train",
        "--repo_id",
        preset / "policy",
        "--save_directory",
        tmp_path / "out",
        "--num_sample_prompts",
        "0",
    ]
    pairs = preset / "pairs.jsonl"
    row = {"prompt_ids": [3, 4], "chosen_ids": [5], "rejected_ids": [6]}
    text = {"prompt": "a", "chosen": "b", "rejected": "c"}
    line = json.dumps
    return {
        "empty file": [*train, "--dataset_name", write("e.jsonl", "")],
        "missing column": [
            *train,
            "--dataset_name",
            write("m.jsonl", '{"prompt": "x"}'),
        ],
        "None": [
            *train,
            "--dataset_name",
            write(
                "n.jsonl", line(row) + "\n" + line({**row, "chosen_ids": None})
            ),
        ],
        "identical pair": [
            *train,
            "--dataset_name",
            write("i.jsonl", line({**row, "rejected_ids": [5]})),
        ],
        "over the budget": [
            "inspect",
            "--repo_id",
            chat_preset,
            "--dataset_name",
            write("l.jsonl", line({**text, "prompt": "a b c " * 9})),
            "--max_prompt_length",
            "8",
            "--on_overflow",
            "error",
        ],
        "unknown loss": [*train, "--dataset_name", pairs, "--loss_type", "x"],
        "unread option": [
            *train,
            "--dataset_name",
            pairs,
            "--loss_type",
            "hinge",
            "--label_smoothing",
            "0.1",
        ],
        "beta 0": [*train, "--dataset_name", pairs, "--beta", "0"],
        "beta -1": [*train, "--dataset_name", pairs, "--beta", "-1"],
        "wrong type": ["train", "--config", write("t.yaml", "beta: [1]")],
        "unknown key": ["train", "--config", write("k.yaml", "betaa: 1")],
        "no yaml": ["train", "--config", write("y.yaml", "a: [")],
        "no such config": ["train", "--config", tmp_path / "none.yaml"],
        "sync precomputed": [
            *train,
            "--dataset_name",
            pairs,
            "--sync_ref_model",
            "--reference",
            "precomputed",
        ],
        "no policy": ["train", "--dataset_name", pairs],
        "no such policy": [
            "train",
            "--dataset_name",
            pairs,
            "--repo_id",
            tmp_path / "nothing",
        ],
        "text without a tokenizer": [
            *train,
            "--dataset_name",
            write("x.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}'),
        ],
        "no subcommand": [],
        "id beyond the vocabulary": [
            *train,
            "--dataset_name",
            write("v.jsonl", line({**row, "chosen_ids": [9999]})),
        ],
    }


def test_mistakes_are_one_line_and_status_2(command, mistakes):
    for name, arguments in mistakes.items():
        status, _, err = command(*arguments)
        assert status == 2, name
        assert err.count("\n") == 1, (name, err)
        assert err.startswith("keras-dpo: error: "), (name, err)
        assert len(err) > 40, (name, err)


def test_a_bug_of_ours_ends_with_its_traceback(command, preset, monkeypatch):
    """Whatever class Python gave it; a user's mistake has its own."""
    for error in (TypeError, ValueError, KeyError):

        def broken(*_, error=error):
            raise error("broken on purpose")

        monkeypatch.setattr(train, "make_policy", broken)
        arguments = ["--repo_id", preset / "policy", "--dataset_name"]
        with pytest.raises(error, match="on purpose"):
            command("evaluate", *arguments, preset / "pairs.jsonl")


def test_settings_out_of_range_are_one_line(command, preset):
    pairs = ["--repo_id", preset / "policy", "--dataset_name"]
    pairs.append(preset / "pairs.jsonl")
    for name, value in (
        ("lora_rank", -1),
        ("seed", -1),
        ("seed", 2**32),
        ("num_sample_prompts", -1),
        ("max_new_tokens", 0),
        ("evaluation_batch_size", 0),
        ("clip_norm", 0),
        ("weight_decay", -1),
        ("max_completion_length", 0),
    ):
        status, _, err = command("train", *pairs, f"--{name}", value)
        assert status == 2, (name, err)
        assert err.count("\n") == 1, (name, err)
        assert name in err, err


def test_an_engine_that_is_not_there_is_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "keras_dpo", "train", "--repo_id", "x",
         "--dataset_name", "y", "--distributed", "slurm"],
        env=environment(SLURM_JOB_ID=""),
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "Processes cannot meet by 'slurm'" in last


def python(code, **variables):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment(**variables),
        capture_output=True,
        text=True,
    )


def test_import_is_light():
    code = (
        "import keras_dpo, sys\n"
        "heavy = ('tensorflow', 'transformers', 'datasets', 'wandb', "
        "'keras_hub')\n"
        "assert not [m for m in heavy if m in sys.modules]"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_another_backend_is_one_clear_error():
    done = python("import keras_dpo", KERAS_BACKEND="numpy")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "ImportError: keras_dpo needs the JAX backend" in last
    assert "KERAS_BACKEND=jax" in last


def test_command_chooses_its_own_backend():
    done = subprocess.run(
        [sys.executable, "-m", "keras_dpo", "--help"],
        env=environment(KERAS_BACKEND="torch"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


def test_evaluate_takes_the_validation_pairs_where_they_are_named(
    command, preset
):
    lines = (preset / "pairs.jsonl").read_text().splitlines(keepends=True)
    (preset / "valid.jsonl").write_text("".join(lines[:4]))
    common = ["--repo_id", preset / "policy", "--dataset_name"]
    common.append(preset / "pairs.jsonl")
    status, out, err = command(
        "evaluate", *common, "--validation_dataset_name", preset / "valid.jsonl"
    )
    assert status == 0, err
    assert "Evaluating the validation pairs" in out
    assert "Rows: 4 " in out
    assert "the reference is the policy itself" in out


@pytest.mark.parametrize("what", ["missing", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("name", ["plan", "inspect", "generate"])
def test_a_preset_that_is_not_one_is_one_line(what, name, command, tmp_path):
    path = tmp_path / "preset"
    if what != "missing":
        path.mkdir()
        (path / "config.json").write_text('{"model_type": "llama"}')
        (path / what).write_text("{ this is no JSON")
    (tmp_path / "pairs.jsonl").write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    )
    arguments = ["--repo_id", path]
    if name == "generate":
        arguments += ["--prompt", "a"]
    else:
        arguments += ["--dataset_name", tmp_path / "pairs.jsonl"]
    status, _, err = command(name, *arguments)
    assert status == 2, err
    assert err.count("\n") == 1, err
    assert "preset" in err


def test_an_unknown_sampler_is_one_line(command, chat_preset):
    status, _, err = command(
        "generate", "--repo_id", chat_preset, "--prompt", "a",
        "--sampler", "nonsense",
    )  # fmt: skip
    assert status == 2, err
    assert err.count("\n") == 1, err
    assert "nonsense" in err
