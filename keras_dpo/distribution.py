"""Device meshes: what `keras.distribution` leaves to the caller."""

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
