"""Builders for the parts of a run, each from its config."""

import dataclasses
import math
import os
import pathlib
import secrets
from typing import Any

import jax
import keras

from keras_dpo import callbacks as dpo_callbacks
from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.data.preprocessor import DPOPreprocessor
from keras_dpo.data.stream import PreferenceStream
from keras_dpo.distribution.processes import (
    is_main_process,
    set_mesh,
    start_processes,
)
from keras_dpo.errors import UserError
from keras_dpo.policies.presets import (
    load_chat_format,
    load_outline,
    load_policy,
    load_tokenizer,
)
from keras_dpo.runs.config import DPOConfig
from keras_dpo.runs.schedules import WarmupThenDecay
from keras_dpo.scoring.execution import Execution
from keras_dpo.training.checks import check_same_ids
from keras_dpo.training.dpo_model import DPOModel
from keras_dpo.training.stop_after import StopAfter
from keras_dpo.utils.files import write_beside
from keras_dpo.utils.messages import say


def require(config: DPOConfig, *names: str) -> None:
    """Raise if a setting without a default is missing."""
    for name in names:
        if not getattr(config, name):
            raise UserError(f"`{name}` is missing: give --{name}.")


def choose_attention(mechanism: str) -> None:
    """Configure Keras' flash attention, and print what is used."""
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
    """Initialize multi-process JAX and the device mesh, if configured."""
    mesh: Any = config.mesh
    if config.distributed != "none":
        start_processes(config.distributed)
        if mesh is None and jax.process_count() > 1:
            mesh = {"data": jax.device_count()}
    if mesh:
        set_mesh(mesh, config.shard_parameters)


def make_policy(config: DPOConfig, num_layers: int | None = None) -> Any:
    """Build the policy, with LoRA if configured.

    Args:
        config: The settings.
        num_layers: If given, layers of a weightless outline to build instead.
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
    """Build the preprocessor with the policy's own tokenizer."""
    return DPOPreprocessor.from_policy(policy, **_text_options(config))


def make_preprocessor_alone(config: DPOConfig) -> DPOPreprocessor:
    """Build the preprocessor without loading the policy."""
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


def validation_source(config: DPOConfig) -> tuple[Any, str] | None:
    """Name and split of the validation pairs; None if there are none."""
    name, split = config.validation_dataset_name, config.validation_split
    if name is None and split is None:
        return None
    return name or config.dataset_name, split or "train"


def make_datasets(
    config: DPOConfig, preprocessor: DPOPreprocessor, verbose: bool = True
) -> tuple[PreferenceDataset, PreferenceDataset | None]:
    """Build the training and, if configured, the validation dataset."""
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
    source = validation_source(config)
    if source is None:
        return training, None
    name, split = source
    size = config.evaluation_batch_size or (
        config.total_batch_size // config.gradient_accumulation_steps
    )
    validation = PreferenceDataset(
        name,
        batch_size=size,
        shuffle=False,
        split=split,
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
    """Build the `DPOModel` with its reference; see `make_policy`."""
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


def make_compiled_model(
    config: DPOConfig,
    policy: keras.Model,
    preprocessor: DPOPreprocessor | None,
    steps: int,
    num_layers: int | None = None,
) -> DPOModel:
    """Build the model and compile it for a run of so many steps."""
    model = make_model(config, policy, preprocessor, num_layers)
    model.compile(
        optimizer=make_optimizer(config, steps),
        loss=config.make_loss(),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )
    return model


def total_steps(config: DPOConfig, training: PreferenceDataset) -> int:
    """Total optimizer steps of the run."""
    steps = training.batches_per_epoch * config.num_train_epochs
    return min(steps, config.max_steps or steps)


def make_optimizer(config: DPOConfig, steps: int) -> keras.Optimizer:
    """Build AdamW with the config's learning-rate schedule."""
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
    """Build the callbacks for logging, backups, saving and syncing."""
    backup = dpo_callbacks.TrainingBackup(
        directory / "backups",
        config.backup_every,
        config.num_backups,
        config.resume,
    )
    metrics = directory / "metrics.jsonl"
    # A new run; the metrics of an earlier one are renamed and kept.
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
    """The run's W&B id, stored in its directory so that resuming reuses it."""
    path = directory / "wandb_run_id"
    if goes_on and path.exists():
        return path.read_text()
    name = secrets.token_hex(4)
    if is_main_process():
        write_beside(path, name.encode())
    return name
