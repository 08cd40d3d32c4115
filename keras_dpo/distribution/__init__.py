"""Device meshes, several processes, and locks between runs.

Imports only `utils` and `errors`, never our data or models.
"""

from keras_dpo.distribution.processes import (
    data_parallel_size,
    is_main_process,
    set_mesh,
    simulate_devices,
    start_processes,
    to_host,
    wait_for_processes,
)
from keras_dpo.distribution.sharding import MeshDistribution

__all__ = [
    "MeshDistribution",
    "data_parallel_size",
    "is_main_process",
    "set_mesh",
    "simulate_devices",
    "start_processes",
    "to_host",
    "wait_for_processes",
]
