"""Meshes and multi-process helpers missing from `keras.distribution`."""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import keras
import numpy as np
from jax.experimental import multihost_utils
from keras.src.utils.rng_utils import get_random_seed

from keras_dpo.distribution.sharding import MeshDistribution, parse_mesh
from keras_dpo.errors import UserError


def set_mesh(
    mesh: dict[str, int] | str, shard_parameters: bool = True
) -> MeshDistribution:
    """Shard everything built from now on over a mesh of devices.

    Args:
        mesh: Axis sizes, such as `{"data": 4, "model": 2}` or
            `"data=4,model=2"`.
        shard_parameters: See `MeshDistribution`.

    Raises:
        ValueError: The mesh does not fit the devices.
    """
    sizes = parse_mesh(mesh) if isinstance(mesh, str) else mesh
    distribution = MeshDistribution(sizes, shard_parameters)
    keras.distribution.set_distribution(distribution)
    return distribution


def simulate_devices(number: int) -> None:
    """Simulate CPU devices; a no-op if JAX is already initialized."""
    # Raised if it is too late: JAX keeps the devices it has.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", number)
        jax.config.update("jax_platforms", "cpu")


def start_processes(method: str = "auto") -> None:
    """Initialize multi-process JAX; call it before anything is built.

    Skipped if JAX is already initialized for it (Ray Train). If no seed is set,
    one is broadcast, so random weights and dropout are the same everywhere.

    Args:
        method: `"auto"` reads the environment: `JAX_COORDINATOR_ADDRESS` with
            `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` (Kubeflow), Keras'
            `KERAS_DISTRIBUTION_*`, then what JAX detects. Otherwise a cluster
            type that JAX detects, such as `"slurm"`, `"mpi4py"`, `"k8s"`.

    Raises:
        ValueError: The environment variables are incomplete, or the cluster
            is not detected.
    """
    if not jax.distributed.is_initialized():
        _meet(method.lower())
    if jax.distributed.is_initialized() and get_random_seed() is None:
        seed = np.uint32(secrets.randbits(32))
        keras.utils.set_random_seed(
            int(multihost_utils.broadcast_one_to_all(seed))
        )


def _meet(method: str) -> None:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if os.environ.get(name)]
    if given and method == "auto":
        if len(given) < len(names):
            missing = ", ".join(n for n in names if n not in given)
            raise UserError(
                f"{given[0]} is set, and {missing} is not. Set all of "
                f"{', '.join(names)}, or none."
            )
        address, number, index = (os.environ[name] for name in names)
        keras.distribution.initialize(address, int(number), int(index))
    elif method == "auto":
        try:
            keras.distribution.initialize()
        except ValueError as error:
            # JAX detected no cluster: this is the only process.
            if "coordinator_address should be defined" not in str(error):
                raise
    else:
        try:
            jax.distributed.initialize(cluster_detection_method=method)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"Processes cannot meet by {method!r}: JAX does not find what "
                f"that engine sets ({error}). Start them with it, or choose "
                "another `distributed`."
            ) from error


def is_main_process() -> bool:
    """Whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def wait_for_processes(place: str) -> None:
    """Block until every process has reached the named place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def on_any_process(flags: np.ndarray) -> np.ndarray:
    """Element-wise logical OR of flags over all processes."""
    if jax.process_count() == 1:
        return flags
    return np.any(multihost_utils.process_allgather(flags), axis=0)


def to_host(value: Any) -> np.ndarray:
    """Copy an array to the host, gathering shards of other processes."""
    if isinstance(value, jax.Array) and not (
        value.is_fully_addressable or value.is_fully_replicated
    ):
        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)


class BatchShare(NamedTuple):
    """A range of the shards of a batch, one per data-parallel device."""

    first: int
    last: int
    devices: int

    def of(self, size: int) -> slice:
        """The rows of this share; `size` is a multiple of `devices`."""
        each = size // self.devices
        return slice(self.first * each, self.last * each)


WHOLE_BATCH = BatchShare(0, 1, 1)


def own_share() -> BatchShare:
    """The share of a batch that this process's devices hold."""
    distribution = keras.distribution.distribution()
    if distribution is None or jax.process_count() == 1:
        return WHOLE_BATCH
    mesh = distribution.device_mesh
    axis = mesh.axis_names.index(distribution.batch_dim_name)
    mine = [d in jax.local_devices() for d in mesh.backend_mesh.devices.flat]
    places = np.where(np.reshape(mine, mesh.shape))[axis]
    return BatchShare(places.min(), places.max() + 1, mesh.shape[axis])


def of_all_processes(value: Any) -> list[Any]:
    """Gather a JSON-serializable value from every process."""
    text = np.frombuffer(json.dumps(value).encode(), "uint8")
    sizes = multihost_utils.process_allgather(np.int32(len(text))).reshape(-1)
    # Padded to few sizes, since each one is compiled.
    padded = np.zeros(2 ** int(sizes.max()).bit_length(), "uint8")
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [
        json.loads(text[:size].tobytes())
        for text, size in zip(texts, sizes, strict=True)
    ]


def check_processes_share_a_mesh() -> None:
    """Raise if several processes would each train alone."""
    if jax.process_count() > 1 and keras.distribution.distribution() is None:
        raise UserError(
            f"{jax.process_count()} processes have met, and there is no mesh: "
            "each would train alone. Call keras_dpo.distribution.set_mesh("
            f'{{"data": {jax.device_count()}}}) before the policy is made.'
        )


def check_processes_agree(values: dict[str, Any]) -> None:
    """Raise if processes disagree on the given values.

    Args:
        values: Values that must be equal on all processes, by name.
    """
    for name, value in values.items():
        digest = hashlib.blake2b(repr(value).encode(), digest_size=4).digest()
        number = np.frombuffer(digest, "uint32")
        everywhere = multihost_utils.process_allgather(number).reshape(-1)
        others = np.where(everywhere != everywhere[0])[0]
        if len(others):
            raise UserError(
                f"Processes 0 and {others[0]} differ in {name}. Received here: "
                f"{value!r}. Give every process the same data and settings."
            )


def data_parallel_size() -> int:
    """Number of devices that a batch is sharded over; 1 without a mesh."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return 1
    mesh = distribution.device_mesh
    axis = mesh.axis_names.index(distribution.batch_dim_name)
    return mesh.shape[axis]


def distribute_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """Shard a batch over the devices as `fit` does."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return jax.tree.map(jax.numpy.asarray, batch)

    def place(array: Any) -> Any:
        layout = distribution.get_data_layout(array.shape)
        return keras.src.distribution.distribution_lib.distribute_tensor(
            jax.numpy.asarray(array), layout
        )

    return jax.tree.map(place, batch)


def whole_on_devices(arrays: Any) -> Any:
    """Replicate arrays on all devices, so every process can read them."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return arrays
    whole = jax.sharding.NamedSharding(
        distribution.device_mesh.backend_mesh, jax.sharding.PartitionSpec()
    )
    return jax.lax.with_sharding_constraint(arrays, whole)


def rows_on_devices(array: Any) -> Any:
    """Constrain an array's rows to be sharded like the batch."""
    size = data_parallel_size()
    if size == 1 or array.shape[0] % size:
        return array
    distribution = keras.distribution.distribution()
    free = jax.sharding.PartitionSpec.UNCONSTRAINED
    rows = jax.sharding.PartitionSpec(
        distribution.batch_dim_name, *[free] * (array.ndim - 1)
    )
    return jax.lax.with_sharding_constraint(
        array,
        jax.sharding.NamedSharding(distribution.device_mesh.backend_mesh, rows),
    )


def over_rows(
    function: Callable[..., Any], num_shared: int = 0
) -> Callable[..., Any]:
    """Map a function over each device's own rows with `shard_map`.

    Otherwise a loop whose length depends on the content of a row would run in
    lockstep on all devices.

    Args:
        function: Takes and returns arrays with rows as their first axis.
        num_shared: Number of leading arguments that are replicated, such as a
            kernel; their gradients are summed over the devices once.
    """
    if data_parallel_size() == 1:
        return function
    distribution = keras.distribution.distribution()
    rows = jax.sharding.PartitionSpec(distribution.batch_dim_name)
    whole = jax.sharding.PartitionSpec()

    def run(*inputs: Any) -> Any:
        specs = [whole] * num_shared + [rows] * (len(inputs) - num_shared)
        return jax.shard_map(
            function,
            mesh=distribution.device_mesh.backend_mesh,
            in_specs=tuple(specs),
            out_specs=rows,
            axis_names={distribution.batch_dim_name},
            check_vma=False,
        )(*inputs)

    return run
