"""Models without values: what is planned before its weights are there."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import keras

from keras_dpo.compat.patching import patched


@contextlib.contextmanager
def variables_without_values() -> Iterator[None]:
    """Variables made here have a shape, a type and a layout, and no memory.

    Keras (3.15) knows variables whose value is still to come. The value of
    these is a `jax.ShapeDtypeStruct`; zeros while a function is traced.
    """
    variable_class: Any = keras.src.backend.jax.core.JaxVariable

    def without_value(self: Any, initializer: Any) -> None:
        del initializer
        self._initialize_layout()
        layout = getattr(self._layout, "backend_layout", self._layout)

        def placeholder(shape: tuple[int, ...], dtype: str) -> Any:
            zeros = jnp.zeros((), dtype)
            if isinstance(zeros, jax.core.Tracer):
                return jnp.broadcast_to(zeros, shape)
            sharding = layout or jax.sharding.SingleDeviceSharding(
                jax.devices()[0]
            )
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        self._value = None
        self._initializer = placeholder

    with patched(variable_class, "_initialize_with_initializer", without_value):
        yield
