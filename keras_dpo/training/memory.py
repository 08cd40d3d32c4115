"""What a training step needs, before it runs."""

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
    """Bytes on one device, and the work of one step.

    Args:
        policy: Of the policy's variables.
        optimizer: Of the optimizer's.
        reference: Of the reference's.
        batch: Of the token ids and masks.
        temporary: Of gradients, activations, logits: all that a step makes
            and lets go of.
        tokens: That a step computes, padding included.
        real_tokens: The same without padding.
        flops: Multiply-adds of the policy's products, twice each.
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
        """Bytes in use at once."""
        return (
            self.policy
            + self.optimizer
            + self.reference
            + self.batch
            + self.temporary
        )

    def lines(self) -> list[str]:
        """The report as text."""
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
    """Compile a compiled model's training step on the longest batch, and read.

    Nothing runs; with a compilation cache the compilation is not lost.

    Args:
        model: A compiled `DPOModel`.
        dataset: As `fit` prepares it.
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
    """The batch of the first pass that takes the most tokens."""

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
    """Bytes of them on one device."""
    return sum(
        math.prod(v.value.sharding.shard_shape(v.shape))
        * np.dtype(v.dtype).itemsize
        for v in variables
    )


def _tokens(batch: dict[str, np.ndarray]) -> tuple[int, int]:
    """Tokens of a batch with its padding, and without."""
    if "row_ids" in batch:
        return batch["row_ids"].size, int((batch["row_segments"] >= 0).sum())
    real = batch["prompt_lengths"] + batch["completion_lengths"]
    return batch["token_ids"].size, int(real[batch["weight"] > 0].sum())


def _flops(model: Any, tokens: int, scored: int) -> float:
    """Of a step: every kernel once forward, and for its two gradients.

    A frozen kernel needs one gradient less; a reference that runs is one more
    pass forward; layers that are computed again another.
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
        # The chunked head computes a trained kernel's logits twice.
        passes = 2 + 2 * bool(embedding.trainable_variables) + online
        size = embedding.input_dim * embedding.output_dim
        total += 2.0 * size * scored * passes
    return total


# --- remat="auto" -------------------------------------------------------------


def layers_must_be_rematerialized(
    model: Any, dataset: PreferenceDataset
) -> bool:
    """Whether a step's kept values would not fit the device's memory."""
    backbone = getattr(model.policy, "backbone", None)
    if not getattr(backbone, "transformer_layers", None):
        return False
    tokens, _ = _tokens(longest_batch(dataset))
    share = model.gradient_accumulation_steps * data_parallel_size()
    kept = kept_by_layers(model.policy, tokens / share)
    gradients = _size(model.trainable_variables)
    return kept + gradients > 0.8 * free_memory()


def kept_by_layers(policy: keras.Model, tokens: float) -> float:
    """Bytes that decoder layers keep for the backward pass, estimated.

    About three times what their products give: norms, activations and sums
    come between.
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
    """Numbers that a layer's product gives per token."""
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
    """Bytes that the device has left; infinite where it does not tell."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return _free_host_memory()
    found = device.memory_stats() or {}
    if "bytes_limit" not in found:
        return math.inf
    return found["bytes_limit"] - found["bytes_in_use"]


def _free_host_memory() -> float:
    """With what the system would give back; infinite where it is not told."""
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
    """The report of a model from those of two of fewer layers.

    Args:
        few: Of `layers[0]` layers.
        more: Of `layers[1]` layers.
        layers: Of the two and of the model.
    """
    first, second, whole = layers
    grown = {}
    for field in ("policy", "optimizer", "reference", "temporary", "flops"):
        a, b = getattr(few, field), getattr(more, field)
        value = a + (b - a) * (whole - first) / (second - first)
        grown[field] = value if field == "flops" else int(value)
    return dataclasses.replace(few, **grown)
