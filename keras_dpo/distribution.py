"""Device meshes: what `keras.distribution` leaves to the caller."""

from collections.abc import Callable
from typing import Any

import jax
import keras


def data_parallel_size() -> int:
    """Devices that the pairs of a batch are spread over; 1 without a mesh."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return 1
    mesh = distribution.device_mesh
    axis = mesh.axis_names.index(distribution.batch_dim_name)
    return mesh.shape[axis]


def distribute_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """Put a batch on the devices as `fit` does."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return jax.tree.map(jax.numpy.asarray, batch)

    def place(array: Any) -> Any:
        layout = distribution.get_data_layout(array.shape)
        return keras.src.distribution.distribution_lib.distribute_tensor(
            jax.numpy.asarray(array), layout
        )

    return jax.tree.map(place, batch)


def over_rows(
    function: Callable[..., Any], num_shared: int = 0
) -> Callable[..., Any]:
    """Run a function on each device's own rows.

    Without it a loop whose length depends on a row's content would run in
    lockstep on all devices.

    Args:
        function: Takes and returns arrays with rows as their first axis.
        num_shared: Leading arguments that every device sees whole, such as a
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
