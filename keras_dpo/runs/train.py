"""`train`, `evaluate` and `precompute`: run a config."""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import keras

from keras_dpo import callbacks as dpo_callbacks
from keras_dpo.callbacks.generation_samples import sample_answers
from keras_dpo.compat.compilation import keep_compiled
from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.distribution.locks import locked
from keras_dpo.distribution.processes import is_main_process
from keras_dpo.errors import UserError
from keras_dpo.policies.presets import save_policy
from keras_dpo.runs.build import (
    choose_attention,
    choose_mesh,
    make_callbacks,
    make_compiled_model,
    make_datasets,
    make_model,
    make_policy,
    make_preprocessor,
    require,
    total_steps,
    validation_source,
)
from keras_dpo.runs.config import DPOConfig
from keras_dpo.runs.config_file import (
    ConfigFile,
    with_date_of_run,
)
from keras_dpo.runs.report import write_report
from keras_dpo.training.checks import describe_text
from keras_dpo.training.dpo_model import DPOModel
from keras_dpo.utils.messages import say
from keras_dpo.utils.redaction import without_secrets


class TrainingRun(NamedTuple):
    """The result of `train`; `directory` holds the same on disk."""

    model: DPOModel
    history: dict[str, list[float]]
    directory: pathlib.Path


def train(config: DPOConfig) -> TrainingRun:
    """Preference-tune a policy according to a config.

    Writes `config.yaml`, `metrics.jsonl` and `report.html` to
    `<save_directory>/<model_name>/`, and `backups/`, `checkpoints/` and
    `policy/` where they are asked for.

    Raises:
        ValueError: A setting, the data or the model is wrong.
    """
    require(config, "repo_id", "dataset_name")
    directory = pathlib.Path(config.save_directory) / config.model_name
    if directory.is_symlink():
        raise UserError(
            f"{directory} is a symbolic link, and a run writes to a directory "
            "of its own. Choose another model_name."
        )
    # First, since multi-process JAX must be initialized before any backend.
    choose_mesh(config)
    with locked(directory, "Training"):
        return _train(config, directory)


def _train(config: DPOConfig, directory: pathlib.Path) -> TrainingRun:
    """Train in a directory that is locked for this run."""
    unset, config = config, with_date_of_run(config.resolved(), directory)
    directory.mkdir(parents=True, exist_ok=True)
    for line in config.unread_flags():
        say(f"Note: {line}")
    keras.utils.set_random_seed(config.seed)
    keep_compiled(config.compilation_cache)
    choose_attention(config.attn_mechanism)
    policy = make_policy(config)
    preprocessor = make_preprocessor(config, policy)
    training, validation = make_datasets(config, preprocessor)
    steps = total_steps(config, training)
    model = make_compiled_model(config, policy, preprocessor, steps)
    if unset.learning_rate is None:
        _say_default_rate(config)
    prompts = sample_prompts(config, validation or training)
    before = sample_answers(model, prompts, None, config.max_new_tokens)
    loggers = [
        ConfigFile(config, directory / "config.yaml"),
        *make_callbacks(config, directory, steps),
    ]
    wandb_logger = next(
        (x for x in loggers if isinstance(x, dpo_callbacks.WandbLogger)), None
    )
    history = model.fit(
        training,
        epochs=config.num_train_epochs,
        validation_data=validation,
        validation_batch_size=validation.batch_size if validation else None,
        callbacks=loggers,
    ).history
    after = sample_answers(model, prompts, None, config.max_new_tokens)
    show_answers(before, after)
    if wandb_logger is not None:
        if after:
            wandb_logger.log_samples(steps, after)
        wandb_logger.close()
    if config.do_last_save:
        save_policy(policy, directory / "policy", preprocessor)
        say(f"Policy: {directory / 'policy'}")
    if is_main_process():
        write_report(
            directory,
            title=config.model_name,
            data_lines=without_secrets(training.report.lines()),
            before=before,
            after=after,
        )
    say(f"Report: {directory / 'report.html'}")
    return TrainingRun(model, history, directory)


def _say_default_rate(config: DPOConfig) -> None:
    trained = "LoRA adapters" if config.lora_rank else "all weights"
    say(f"Learning rate: {config.learning_rate:g}, the default for {trained}")


def evaluate(config: DPOConfig) -> dict[str, float]:
    """Compute loss and metrics on a config's pairs, against its reference.

    Raises:
        ValueError: A setting, the data or the model is wrong.
    """
    require(config, "repo_id", "dataset_name")
    choose_mesh(config)
    keep_compiled(config.compilation_cache)
    choose_attention(config.attn_mechanism)
    policy = make_policy(config)
    preprocessor = make_preprocessor(config, policy)
    model = make_model(config, policy, preprocessor)
    model.compile(loss=config.make_loss())
    for line in describe_text(preprocessor):
        say(line)
    name, split = config.dataset_name, config.dataset_split
    validation = validation_source(config)
    if validation is not None:
        name, split = validation
        say(f"Evaluating the validation pairs: {name}, {split}")
    dataset = PreferenceDataset(
        name,
        preprocessor,
        config.evaluation_batch_size or config.total_batch_size,
        shuffle=False,
        split=split,
        column_map=config.column_map,
    )
    if model.reference.keeps_snapshot:
        say(
            "Note: the reference is the policy itself, so every reward is 0. "
            "Compare with another by --reference_model_repo_id."
        )
    return model.evaluate(dataset, return_dict=True)


def precompute(config: DPOConfig) -> list[pathlib.Path]:
    """Store the reference's log-probs for training and validation pairs.

    A training run with `reference: precomputed` and the same settings reads
    them. Returns the stores' directories.

    Raises:
        ValueError: A setting, the data or the model is wrong.
    """
    require(config, "repo_id", "dataset_name")
    config = dataclasses.replace(config, reference="precomputed")
    choose_mesh(config)
    keras.utils.set_random_seed(config.seed)
    keep_compiled(config.compilation_cache)
    policy = make_policy(config)
    preprocessor = make_preprocessor(config, policy)
    for line in describe_text(preprocessor):
        say(line)
    datasets = make_datasets(config, preprocessor)
    model = make_model(config, policy, preprocessor)
    model.compile(loss=config.make_loss())
    return [model.precompute(d) for d in datasets if d is not None]


def sample_prompts(config: DPOConfig, dataset: PreferenceDataset) -> list[Any]:
    """The first prompts of a dataset, from rows that hold text."""
    prompts = [
        {"prompt": r["prompt"], "tools": r["tools"]}
        if "tools" in r
        else r["prompt"]
        for r in dataset.records
        if "prompt" in r
    ]
    return prompts[: config.num_sample_prompts]


def show_answers(
    before: list[dict[str, str]], after: list[dict[str, str]]
) -> None:
    """Print the answers from before and after training."""
    for old, new in zip(before, after, strict=True):
        say(f"Prompt: {new['prompt']}")
        say(f"  before: {old['policy']}")
        say(f"  after:  {new['policy']}")
