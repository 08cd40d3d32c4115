"""Memory and FLOPs of a training step, estimated before it runs."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import jax
import keras
import numpy as np

from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.distribution.processes import data_parallel_size

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Memory per device in bytes, and the work of one step.

    Args:
        policy: Bytes used by the policy's variables.
        optimizer: Bytes used by the optimizer's variables.
        reference: Bytes used by the reference's variables.
        batch: Bytes used by token ids and masks.
        temporary: Bytes used by gradients, activations and logits: everything
            that a step allocates and frees.
        tokens: Tokens that a step processes, padding included.
        real_tokens: Tokens that a step processes, without padding.
        flops: FLOPs of matrix products, two per multiply-add.
    """

    policy: int
    optimizer: int
    reference: int
    batch: int
    temporary: int
    tokens: int
    real_tokens: int
    flops: float

    @property
    def peak(self) -> int:
        """Peak memory in bytes: the sum of all parts."""
        return (
            self.policy
            + self.optimizer
            + self.reference
            + self.batch
            + self.temporary
        )

    def lines(self) -> list[str]:
        """The report as lines of text."""
        parts = [
            f"{name} {getattr(self, name) / MIB:,.0f}"
            for name in ("policy", "optimizer", "reference", "temporary")
        ]
        padding = 1 - self.real_tokens / max(self.tokens, 1)
        return [
            f"Memory of a step: {self.peak / MIB:,.0f} MiB ({', '.join(parts)})"
            ", and the Python process itself",
            f"Work of a step: {self.flops / 1e12:.2f} TFLOP on {self.tokens:,} "
            f"tokens, {padding:.1%} padding",
        ]


def memory_report(model: Any, dataset: PreferenceDataset) -> MemoryReport:
    """Measure a training step by compiling it for the longest batch.

    Nothing runs; with a compilation cache the compilation is reused.

    Args:
        model: A compiled `DPOModel`.
        dataset: A dataset as prepared by `fit`.
    """
    batch = longest_batch(dataset)
    if model.reference.is_stored:
        zeros = np.zeros(batch["completion_ids"].shape, "float32")
        batch.setdefault("reference_log_probs", zeros)
    state = [
        _shapes(variables)
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
    ]
    step = jax.jit(
        model.train_step,
        donate_argnums=0,
        compiler_options=model.compiler_options,
    )
    found: Any = step.lower(tuple(state), batch).compile().memory_analysis()
    spare = found.output_size_in_bytes - found.alias_size_in_bytes
    reference = getattr(model.reference, "variables", [])
    tokens, real = _tokens(batch)
    return MemoryReport(
        policy=_size(model.policy.variables),
        optimizer=_size(model.optimizer.variables),
        reference=_size(reference),
        batch=sum(a.nbytes for a in batch.values()) // data_parallel_size(),
        temporary=found.temp_size_in_bytes + max(spare, 0),
        tokens=tokens,
        real_tokens=real,
        flops=_flops(model, tokens, int(batch["completion_mask"].sum())),
    )


def longest_batch(dataset: PreferenceDataset) -> dict[str, np.ndarray]:
    """The batch with the most tokens in the first pass over the data."""

    def size(indices: Any) -> int:
        if dataset.packing is None:
            return dataset.buckets_of(indices).max()
        return int(dataset.packed_lengths[indices].sum())

    return dataset.make_batch(max(dataset.all_batches(), key=size))


def _shapes(variables: Iterable[keras.Variable]) -> list[jax.ShapeDtypeStruct]:
    return [
        jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.value.sharding)
        for v in variables
    ]


def _size(variables: Iterable[keras.Variable]) -> int:
    """Bytes that the variables take on one device."""
    return sum(
        math.prod(v.value.sharding.shard_shape(v.shape))
        * np.dtype(v.dtype).itemsize
        for v in variables
    )


def _tokens(batch: dict[str, np.ndarray]) -> tuple[int, int]:
    """Tokens in a batch, with and without padding."""
    if "row_ids" in batch:
        return batch["row_ids"].size, int((batch["row_segments"] >= 0).sum())
    real = batch["prompt_lengths"] + batch["completion_lengths"]
    return batch["token_ids"].size, int(real[batch["weight"] > 0].sum())


def _flops(model: Any, tokens: int, scored: int) -> float:
    """FLOPs of a step: per kernel a forward pass and two gradients.

    A frozen kernel needs one gradient less; an online reference adds a forward
    pass, and so does rematerialization.
    """
    online = model.reference.runs_online
    embedding = getattr(
        getattr(model.policy, "backbone", None), "token_embedding", None
    )
    of_embedding = {id(v) for v in getattr(embedding, "variables", [])}
    total = 0.0
    for variable in model.policy.variables:
        if len(variable.shape) < 2 or id(variable) in of_embedding:
            continue
        passes = 2 + variable.trainable + online
        passes += model.execution.rematerializes
        total += 2.0 * math.prod(variable.shape) * tokens * passes
    if embedding is not None:
        # The chunked head recomputes the logits of a trained kernel.
        passes = 2 + 2 * bool(embedding.trainable_variables) + online
        size = embedding.input_dim * embedding.output_dim
        total += 2.0 * size * scored * passes
    return total


# --- remat="auto" -------------------------------------------------------------


def layers_must_be_rematerialized(
    model: Any, dataset: PreferenceDataset
) -> bool:
    """Whether a step's activations and gradients would not fit in memory."""
    backbone = getattr(model.policy, "backbone", None)
    if not getattr(backbone, "transformer_layers", None):
        return False
    tokens, _ = _tokens(longest_batch(dataset))
    share = model.gradient_accumulation_steps * data_parallel_size()
    kept = kept_by_layers(model.policy, tokens / share)
    gradients = _size(model.trainable_variables)
    return kept + gradients > 0.8 * free_memory()


def kept_by_layers(policy: keras.Model, tokens: float) -> float:
    """Estimated bytes that decoder layers keep for the backward pass.

    About three times the outputs of their matrix products, to allow for norms,
    activations and sums in between.
    """
    features = sum(
        _features(part)
        for layer in policy.backbone.transformer_layers
        for part in layer._flatten_layers()
        if getattr(part, "kernel", None) is not None
    )
    width = 2 if str(policy.compute_dtype).endswith("16") else 4
    return 3.0 * features * tokens * width


def _features(layer: keras.layers.Layer) -> int:
    """Output elements of a layer's matrix product per token."""
    shape = layer.kernel.shape
    if not isinstance(layer, keras.layers.EinsumDense):
        return shape[-1]
    _, kernel, output = re.split(",|->", layer.equation)
    return math.prod(
        size
        for letter, size in zip(kernel, shape, strict=True)
        if letter in output
    )


def free_memory() -> float:
    """Free bytes on the device; infinite if it does not report them."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return _free_host_memory()
    found = device.memory_stats() or {}
    if "bytes_limit" not in found:
        return math.inf
    return found["bytes_limit"] - found["bytes_in_use"]


def _free_host_memory() -> float:
    """Free host bytes, reclaimable ones included; infinite if unknown."""
    path = pathlib.Path("/proc/meminfo")
    if not path.exists():
        return math.inf
    for line in path.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    return math.inf


# --- keras-dpo plan ----------------------------------------------------------


def extrapolate(
    few: MemoryReport, more: MemoryReport, layers: tuple[int, int, int]
) -> MemoryReport:
    """Extrapolate a model's report from those of two shallower models.

    Args:
        few: Report for `layers[0]` layers.
        more: Report for `layers[1]` layers.
        layers: Layer counts of the two models and of the full one.
    """
    first, second, whole = layers
    grown = {}
    for field in ("policy", "optimizer", "reference", "temporary", "flops"):
        a, b = getattr(few, field), getattr(more, field)
        value = a + (b - a) * (whole - first) / (second - first)
        grown[field] = value if field == "flops" else int(value)
    return dataclasses.replace(few, **grown)
