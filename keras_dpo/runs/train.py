"""Config -> trained model."""

import dataclasses
import datetime
import math
import os
import pathlib
import secrets
from typing import Any, NamedTuple

import jax
import keras
import yaml

from keras_dpo import callbacks as dpo_callbacks
from keras_dpo.callbacks.generation_samples import sample_answers
from keras_dpo.compat.compilation import keep_compiled
from keras_dpo.compat.outline import variables_without_values
from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.data.preprocessor import DPOPreprocessor
from keras_dpo.data.sources import open_rows
from keras_dpo.data.stream import PreferenceStream
from keras_dpo.distribution.locks import locked
from keras_dpo.distribution.processes import (
    is_main_process,
    set_mesh,
    simulate_devices,
    start_processes,
)
from keras_dpo.distribution.sharding import parse_mesh
from keras_dpo.errors import UserError
from keras_dpo.policies.presets import (
    count_layers,
    load_chat_format,
    load_outline,
    load_policy,
    load_tokenizer,
    save_policy,
)
from keras_dpo.runs.config import DPOConfig
from keras_dpo.runs.report import write_report
from keras_dpo.runs.schedules import WarmupThenDecay
from keras_dpo.scoring.execution import Execution
from keras_dpo.training.checks import check_same_ids, describe_text
from keras_dpo.training.dpo_model import DPOModel
from keras_dpo.training.memory import MemoryReport, extrapolate
from keras_dpo.training.stop_after import StopAfter
from keras_dpo.utils.files import write_beside
from keras_dpo.utils.messages import say
from keras_dpo.utils.redaction import without_secrets


class TrainingRun(NamedTuple):
    """What `train` leaves in memory; the same is on disk in `directory`."""

    model: DPOModel
    history: dict[str, list[float]]
    directory: pathlib.Path


def train(config: DPOConfig) -> TrainingRun:
    """Preference-tune a policy as a config says.

    Writes `config.yaml`, `metrics.jsonl`, `policy/`, `checkpoints/` and
    `report.html` to `<save_directory>/<model_name>/`.

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
    # First: processes must meet before JAX begins.
    choose_mesh(config)
    with locked(directory, "Training"):
        return _train(config, directory)


def _train(config: DPOConfig, directory: pathlib.Path) -> TrainingRun:
    """Train in a directory that no other run writes to."""
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
    model = make_model(config, policy, preprocessor)
    steps = total_steps(config, training)
    model.compile(
        optimizer=make_optimizer(config, steps),
        loss=config.make_loss(),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )
    if unset.learning_rate is None:
        trained = "LoRA adapters" if config.lora_rank else "all weights"
        say(
            f"Learning rate: {config.learning_rate:g}, the default for "
            f"{trained}"
        )
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


def evaluate(config: DPOConfig) -> dict[str, float]:
    """Loss and metrics of a policy against a config's reference and pairs.

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
    dataset = PreferenceDataset(
        config.dataset_name,
        preprocessor,
        config.evaluation_batch_size or config.total_batch_size,
        shuffle=False,
        split=config.dataset_split,
        column_map=config.column_map,
    )
    return model.evaluate(dataset, return_dict=True)


def precompute(config: DPOConfig) -> list[pathlib.Path]:
    """Store the reference's log-probs of a config's training pairs.

    And of its validation pairs. A training run with `reference: precomputed`
    and the same settings reads them. Returns the stores' directories.

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


def plan(config: DPOConfig) -> MemoryReport:
    """What a config's training step takes, without the policy's weights.

    The step is compiled for a policy of two and of four layers; the rest
    follows, for a decoder's layers are alike. A mesh is one of simulated CPU
    devices, unless JAX has begun with others; bytes are of one of them.

    Raises:
        ValueError: A setting or the data is wrong.
    """
    require(config, "repo_id")
    if config.mesh and config.distributed == "none":
        simulate_devices(math.prod(parse_mesh(config.mesh).values()))
    keep_compiled(config.compilation_cache)
    layers = (2, 4, count_layers(config.repo_id))
    preprocessor = None
    rows: Any = [longest_pair(config)] * config.total_batch_size
    if config.dataset_name:
        preprocessor = make_preprocessor_alone(config)
        rows = open_rows(config.dataset_name, config.dataset_split)
    dataset = PreferenceDataset(
        rows,
        preprocessor,
        config.total_batch_size,
        seed=config.seed,
        column_map=config.column_map,
        verbose=False,
    )
    choose_mesh(config)
    reports = []
    for number in layers[:2]:
        with variables_without_values():
            policy = make_policy(config, number)
            model = make_model(config, policy, preprocessor, number)
            model.compile(
                optimizer=make_optimizer(config, total_steps(config, dataset)),
                loss=config.make_loss(),
                gradient_accumulation_steps=config.gradient_accumulation_steps,
            )
        reports.append(model.memory_report(dataset))
    return extrapolate(reports[0], reports[1], layers)


def longest_pair(config: DPOConfig) -> dict[str, list[int]]:
    """Token ids of a pair that takes all that the limits allow."""
    prompt = config.max_prompt_length
    completion = config.max_completion_length or config.max_length - prompt
    return {
        "prompt_ids": [1] * prompt,
        "chosen_ids": [1] * completion,
        "rejected_ids": [2] * completion,
    }


def require(config: DPOConfig, *names: str) -> None:
    """Raise where a setting that has no default is missing."""
    for name in names:
        if not getattr(config, name):
            raise UserError(f"`{name}` is missing: give --{name}.")


class ConfigFile(keras.callbacks.Callback):
    """Writes a run's config when training begins.

    Not before: a start that is refused must leave the config of the run that
    the directory holds.
    """

    def __init__(self, config: DPOConfig, path: pathlib.Path) -> None:
        super().__init__()
        self._config, self._path = config, path

    def on_train_begin(self, logs: Any = None) -> None:
        if is_main_process():
            write_config(self._config, self._path)


def write_config(config: DPOConfig, path: pathlib.Path) -> None:
    """Write the config beside its place and rename it there."""
    text = yaml.safe_dump(
        without_secrets(dataclasses.asdict(config)), sort_keys=False
    )
    write_beside(path, text.encode())


def with_date_of_run(config: DPOConfig, directory: pathlib.Path) -> DPOConfig:
    """The config with the day that the run began, for chat templates.

    A run that goes on another day sees the prompts that it began with.
    """
    if config.template_date is not None:
        return config
    # Where the backup lies that the run goes on from, if there is one.
    places = {"auto": [directory], "never": []}.get(
        config.resume, list(pathlib.Path(config.resume).parents)[:2]
    )
    for place in places:
        path = place / "config.yaml"
        if path.exists() and any(place.glob("backups/[0-9]*")):
            saved = yaml.safe_load(path.read_text())
            date = saved.get("template_date")
            if date is not None:
                return dataclasses.replace(config, template_date=str(date))
    today = datetime.date.today().isoformat()
    return dataclasses.replace(config, template_date=today)


def choose_attention(mechanism: str) -> None:
    """Switch Keras' flash attention, and say what runs."""
    runs = mechanism
    if mechanism == "flash":
        keras.config.enable_flash_attention()
        device = jax.default_backend()
        if device == "cpu":
            runs = f"vanilla (there is no flash attention on {device})"
    elif mechanism == "vanilla":
        keras.config.disable_flash_attention()
    else:
        runs = "auto (flash where Keras finds it possible)"
    say(f"Attention on padded sequences: {runs}")


def choose_mesh(config: DPOConfig) -> None:
    """Spread what is built from now on over the devices, if asked to."""
    mesh: Any = config.mesh
    if config.distributed != "none":
        start_processes(config.distributed)
        if mesh is None and jax.process_count() > 1:
            mesh = {"data": jax.device_count()}
    if mesh:
        set_mesh(mesh, config.shard_parameters)


def make_policy(config: DPOConfig, num_layers: int | None = None) -> Any:
    """The policy, with LoRA if asked for.

    Args:
        config: The settings.
        num_layers: An outline of so many layers instead, without weights.
    """
    dtype = config.dtype
    if dtype == "bfloat16" and not config.lora_rank:
        dtype = "mixed_bfloat16"
        say(
            "dtype: mixed_bfloat16 (computed in bfloat16; what is trained "
            "stays float32, for Adam does not move 16-bit weights)"
        )
    if num_layers is None:
        policy = load_policy(config.repo_id, dtype)
    else:
        policy = load_outline(config.repo_id, num_layers, dtype)
    if config.lora_rank:
        policy.backbone.enable_lora(config.lora_rank, config.lora_target_layers)
    return policy


def make_preprocessor(
    config: DPOConfig, policy: keras.Model
) -> DPOPreprocessor:
    """The preprocessor, with the policy's own tokenizer."""
    return DPOPreprocessor.from_policy(policy, **_text_options(config))


def make_preprocessor_alone(config: DPOConfig) -> DPOPreprocessor:
    """The preprocessor, without loading the policy."""
    tokenizer, own = None, {}
    if config.repo_id:
        tokenizer = load_tokenizer(config.repo_id)
        own = load_chat_format(config.repo_id)
    return DPOPreprocessor.from_chat_format(
        tokenizer, own, **_text_options(config)
    )


def _text_options(config: DPOConfig) -> dict[str, Any]:
    return {
        "max_length": config.max_length,
        "max_prompt_length": config.max_prompt_length,
        "max_completion_length": config.max_completion_length,
        "chat_template": config.chat_template,
        "on_overflow": config.on_overflow,
        "chat_template_kwargs": config.chat_template_kwargs,
        "date": config.template_date,
    }


def make_datasets(
    config: DPOConfig, preprocessor: DPOPreprocessor, verbose: bool = True
) -> tuple[PreferenceDataset, PreferenceDataset | None]:
    """The training pairs and, if asked for, the validation pairs."""
    common: dict[str, Any] = {
        "preprocessor": preprocessor,
        "seed": config.seed,
        "column_map": config.column_map,
        "verbose": verbose,
    }
    options = {
        **common,
        "batch_size": config.total_batch_size,
        "split": config.dataset_split,
    }
    training: PreferenceDataset
    if config.streaming:
        steps = math.ceil((config.max_steps or 0) / config.num_train_epochs)
        training = PreferenceStream(
            config.dataset_name, steps_per_epoch=steps, **options
        )
    else:
        training = PreferenceDataset(config.dataset_name, **options)
    name = config.validation_dataset_name
    if name is None and config.validation_split is None:
        return training, None
    size = config.evaluation_batch_size or (
        config.total_batch_size // config.gradient_accumulation_steps
    )
    validation = PreferenceDataset(
        name or config.dataset_name,
        batch_size=size,
        shuffle=False,
        split=config.validation_split or "train",
        **common,
    )
    shared = training.pairs.shared_prompts(validation.pairs)
    if shared and verbose:
        say(f"Note: {shared} validation prompts are in the training set")
    return training, validation


def make_model(
    config: DPOConfig,
    policy: keras.Model,
    preprocessor: DPOPreprocessor | None,
    num_layers: int | None = None,
) -> DPOModel:
    """The policy beside its reference; see `make_policy`."""
    reference: Any = config.reference
    if config.reference_free or reference == "none":
        reference = None
    elif config.reference_model_repo_id:
        name = config.reference_model_repo_id
        if num_layers is None:
            reference = load_policy(name, config.dtype)
            check_same_ids(policy, reference)
        else:
            reference = load_outline(name, num_layers, config.dtype)
    choices: dict[str, Any] = {"auto": "auto", "true": True, "false": False}
    return DPOModel(
        policy,
        reference,
        preprocessor=preprocessor,
        precompute_reference=config.reference == "precomputed",
        reference_cache=config.reference_cache,
        disable_dropout=config.disable_dropout,
        execution=Execution(
            packing=choices[config.packing],
            prompt_sharing=choices[config.prompt_sharing],
            attention=config.attention,
            remat=config.remat,
        ),
    )


def total_steps(config: DPOConfig, training: PreferenceDataset) -> int:
    """Optimizer steps of the whole run."""
    steps = training.batches_per_epoch * config.num_train_epochs
    return min(steps, config.max_steps or steps)


def make_optimizer(config: DPOConfig, steps: int) -> keras.Optimizer:
    """AdamW with the config's schedule."""
    rate: Any = config.resolved().learning_rate
    schedule = rate
    if config.learning_rate_schedule != "constant" or config.warmup_ratio:
        schedule = WarmupThenDecay(
            rate,
            steps,
            warmup_steps=math.ceil(config.warmup_ratio * steps),
            decay=config.learning_rate_schedule,
        )
    return keras.optimizers.AdamW(
        schedule,
        weight_decay=config.weight_decay,
        global_clipnorm=config.clip_norm,
    )


def make_callbacks(
    config: DPOConfig, directory: pathlib.Path, steps: int
) -> list[keras.callbacks.Callback]:
    """Logging, saving and syncing as the config says."""
    backup = dpo_callbacks.TrainingBackup(
        directory / "backups",
        config.backup_every,
        config.num_backups,
        config.resume,
    )
    metrics = directory / "metrics.jsonl"
    # A run of its own; what an earlier one left is kept beside.
    if is_main_process() and metrics.exists() and not backup.goes_on:
        os.replace(metrics, directory / "metrics.previous.jsonl")
    every = min(config.log_steps, steps)
    chosen: list[keras.callbacks.Callback] = [
        dpo_callbacks.MetricsFile(metrics, every),
        StopAfter(steps),
        dpo_callbacks.NaNGuard(directory),
        dpo_callbacks.StuckLossGuard(),
        dpo_callbacks.FallingRewardGuard(every),
        dpo_callbacks.CollapseGuard(),
        backup,
    ]
    if config.sync_ref_model:
        chosen.append(
            dpo_callbacks.ReferenceSync(
                config.ref_model_sync_steps, config.ref_model_mixup_alpha
            )
        )
    if config.save_steps:
        chosen.append(
            dpo_callbacks.PolicyCheckpoint(
                directory / "checkpoints", config.save_steps
            )
        )
    if config.use_wandb:
        chosen.append(
            dpo_callbacks.WandbLogger(
                config.wandb_project,
                config.model_name,
                dataclasses.asdict(config),
                every,
                str(directory),
                wandb_run_id(directory, backup.goes_on),
            )
        )
    return chosen


def wandb_run_id(directory: pathlib.Path, goes_on: bool) -> str:
    """The run's id at W&B, kept beside it, so that a resumed run goes on."""
    path = directory / "wandb_run_id"
    if goes_on and path.exists():
        return path.read_text()
    name = secrets.token_hex(4)
    if is_main_process():
        write_beside(path, name.encode())
    return name


def sample_prompts(config: DPOConfig, dataset: PreferenceDataset) -> list[Any]:
    """A few prompts, of rows that hold text."""
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
    """Print answers from before and after training."""
    for old, new in zip(before, after, strict=True):
        say(f"Prompt: {new['prompt']}")
        say(f"  before: {old['policy']}")
        say(f"  after:  {new['policy']}")
