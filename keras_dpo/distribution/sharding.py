"""Sharding of a policy's variables over a mesh of devices.

Keras-Hub has layout maps for four families, and they raise if a dimension does
not divide. Its decoders name their kernels alike, so one list of rules serves
all; a dimension that does not divide is not split.
"""

import math
import re
from collections import Counter
from typing import Any

import keras

from keras_dpo.errors import UserError

DATA, MODEL = "data", "model"
# Path of a kernel -> axis that tensor parallelism splits: heads, the inner
# width of feed-forward layers, the vocabulary. Column-parallel first, then
# row-parallel (Megatron-LM, https://arxiv.org/abs/1909.08053, section 3).
MODEL_AXES = (
    # Gemma's kernels are (heads, hidden, head).
    (r"decoder_block_\d+/attention/(query|key|value)/kernel$", 0),
    (r"(query|key|value|[qkv]_proj)/kernel$", 1),
    (r"(query|key|value|[qkv]_proj)/bias$", 0),
    (r"(attention_output|o_proj)/kernel$", 0),
    (
        r"(feedforward_(gate|intermediate)_dense|ffw_gating(_2)?|gate_proj|"
        r"up_proj)/kernel$",
        1,
    ),
    (r"feedforward_(gate|intermediate)_dense/bias$", 0),
    (r"(feedforward_output_dense|ffw_linear|down_proj)/kernel$", 0),
    (r"token_embedding/embeddings$", 0),
    (r"token_embedding/reverse_embeddings$", 1),
)
# Smaller variables are not sharded: gathering costs more than it saves.
LEAST_SPLIT = 1024


class MeshDistribution(keras.distribution.ModelParallel):
    """Shards pairs over `data`, and kernels over `model` and optionally `data`.

    Fully sharded, the default, means that parameters, optimizer state and
    snapshot are sharded over the data axis, too (FSDP, [Zhao et al., 2023](
    https://arxiv.org/abs/2304.11277); ZeRO stage 3), and gathered layer by
    layer when used. Set it before anything is built:

    ```python
    keras_dpo.distribution.set_mesh({"data": 4, "model": 2})
    policy = keras_dpo.load_policy("gemma3_instruct_1b")
    ```

    Args:
        mesh: Number of devices along `"data"` and, optionally, `"model"`.
        shard_parameters: Whether to shard parameters over the data axis.
        devices: Names of the devices; defaults to all.

    Raises:
        ValueError: The mesh does not fit the devices.
    """

    def __init__(
        self,
        mesh: dict[str, int],
        shard_parameters: bool = True,
        devices: list[Any] | None = None,
    ) -> None:
        devices = devices or keras.distribution.list_devices()
        sizes = {DATA: mesh.get(DATA, 1), MODEL: mesh.get(MODEL, 1)}
        unknown = sorted(set(mesh) - set(sizes))
        wanted = math.prod(sizes.values())
        if unknown or min(sizes.values()) < 1:
            raise UserError(
                "A mesh has the axes data and model, each of at least 1 "
                f"device. Received: {mesh!r}."
            )
        if wanted != len(devices):
            raise UserError(
                f"The mesh {mesh!r} is of {wanted} devices, and there are "
                f"{len(devices)}. Choose sizes whose product is "
                f"{len(devices)}."
            )
        self.shard_parameters = shard_parameters
        device_mesh = keras.distribution.DeviceMesh(
            tuple(sizes.values()), tuple(sizes), devices
        )
        super().__init__(
            layout_map=keras.distribution.LayoutMap(device_mesh),
            batch_dim_name=DATA,
            auto_shard_dataset=False,
        )

    def get_variable_layout(self, variable: Any) -> Any:
        if getattr(variable, "_layout", None) is not None:
            return variable._layout
        return keras.distribution.TensorLayout(
            self.axes_of(variable.path, tuple(variable.shape)),
            self.device_mesh,
        )

    def axes_of(
        self, path: str, shape: tuple[int, ...]
    ) -> tuple[str | None, ...]:
        """The mesh axis, or None, that shards each axis of a variable."""
        sizes = dict(
            zip(
                self.device_mesh.axis_names,
                self.device_mesh.shape,
                strict=True,
            )
        )
        axes: list[str | None] = [None] * len(shape)
        axis = next((a for p, a in MODEL_AXES if re.search(p, path)), None)
        if (
            axis is not None
            and sizes[MODEL] > 1
            and axis < len(shape)
            and shape[axis] % sizes[MODEL] == 0
        ):
            axes[axis] = MODEL
        if self.shard_parameters and sizes[DATA] > 1:
            free = [
                i
                for i, length in enumerate(shape)
                if axes[i] is None and length % sizes[DATA] == 0
            ]
            if free and math.prod(shape) >= LEAST_SPLIT:
                # Avoid the vocabulary axis: every device would have to look
                # up the tokens of all devices in its shard.
                axes[max(free, key=lambda i: (i != axis, shape[i]))] = DATA
        return tuple(axes)


def parse_mesh(text: str) -> dict[str, int]:
    """Parse `"data=4,model=2"` into `{"data": 4, "model": 2}`.

    Raises:
        ValueError: The text is malformed.
    """
    mesh = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", part)
        if found is None:
            raise UserError(
                f"A mesh is written data=4,model=2. Received: {text!r}."
            )
        mesh[found[1]] = int(found[2])
    return mesh


def check_on_mesh(policy: keras.Model) -> None:
    """Raise if a policy was built before the distribution was set."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return
    devices = set(distribution.device_mesh.backend_mesh.devices.flat)
    for variable in policy.variables:
        found = variable.value.sharding.device_set
        if found != devices:
            raise UserError(
                "The distribution was set after the policy was built. "
                f"Received: {variable.path} on {len(found)} of "
                f"{len(devices)} devices. Set it first, then load the policy."
            )


def sharding_table(variables: list[keras.Variable]) -> list[str]:
    """Table of how variables are sharded, with MiB per device."""
    groups: Counter[tuple[str, ...]] = Counter()
    sizes: Counter[tuple[str, ...]] = Counter()
    for variable in variables:
        value = variable.value
        spec = getattr(value.sharding, "spec", None) or ()
        parts = [str(axis) if axis else "-" for axis in spec]
        parts += ["-"] * (value.ndim - len(parts))
        name = re.sub(r"_\d+", "_*", "/".join(variable.path.split("/")[-2:]))
        key = (name, f"({', '.join(map(str, value.shape))})", ", ".join(parts))
        local = value.sharding.shard_shape(value.shape)
        groups[key] += 1
        sizes[key] += math.prod(local) * value.dtype.itemsize
    rows = [
        (f"{n} x {key[0]}", key[1], key[2], f"{sizes[key] / 2**20:,.2f}")
        for key, n in groups.items()
    ]
    rows.insert(0, ("variables", "shape", "split over", "MiB a device"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join(
            cell.rjust(width) if i == 3 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    total = sum(sizes.values()) / 2**20
    return [*lines, f"{total:,.1f} MiB of them on each device"]
