"""Keras callbacks for preference training."""

from keras_dpo.callbacks.generation_samples import GenerationSamples
from keras_dpo.callbacks.nan_guard import NaNGuard
from keras_dpo.callbacks.policy_checkpoint import PolicyCheckpoint
from keras_dpo.callbacks.reference_sync import ReferenceSync
from keras_dpo.callbacks.reward_guards import (
    CollapseGuard,
    FallingRewardGuard,
    StuckLossGuard,
)
from keras_dpo.callbacks.step_logger import MetricsFile, StepLogger
from keras_dpo.callbacks.training_backup import TrainingBackup
from keras_dpo.callbacks.wandb_logger import WandbLogger
from keras_dpo.training.after_step import AfterStep

__all__ = [
    "AfterStep",
    "CollapseGuard",
    "FallingRewardGuard",
    "GenerationSamples",
    "MetricsFile",
    "NaNGuard",
    "PolicyCheckpoint",
    "ReferenceSync",
    "StepLogger",
    "StuckLossGuard",
    "TrainingBackup",
    "WandbLogger",
]
