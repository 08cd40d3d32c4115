"""Predict a step's memory and work without any weights."""

import math
from typing import Any

from keras_dpo.compat.compilation import keep_compiled
from keras_dpo.compat.outline import variables_without_values
from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.data.sources import open_rows
from keras_dpo.distribution.processes import simulate_devices
from keras_dpo.distribution.sharding import parse_mesh
from keras_dpo.policies.presets import count_layers
from keras_dpo.runs.build import (
    choose_mesh,
    make_compiled_model,
    make_policy,
    make_preprocessor_alone,
    require,
    total_steps,
)
from keras_dpo.runs.config import DPOConfig
from keras_dpo.training.memory import MemoryReport, extrapolate


def plan(config: DPOConfig) -> MemoryReport:
    """Predict a training step's memory and work without loading weights.

    The step is compiled for policies of two and four layers and extrapolated,
    because a decoder's layers are alike. A mesh consists of simulated CPU
    devices, unless JAX is already initialized; bytes are per device.

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
            model = make_compiled_model(
                config,
                policy,
                preprocessor,
                total_steps(config, dataset),
                number,
            )
        reports.append(model.memory_report(dataset))
    return extrapolate(reports[0], reports[1], layers)


def longest_pair(config: DPOConfig) -> dict[str, list[int]]:
    """Token ids of the longest pair that the limits allow."""
    prompt = config.max_prompt_length
    completion = config.max_completion_length or config.max_length - prompt
    return {
        "prompt_ids": [1] * prompt,
        "chosen_ids": [1] * completion,
        "rejected_ids": [2] * completion,
    }
