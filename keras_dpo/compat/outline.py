"""Models without values, to plan a run before its weights are loaded."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import keras

from keras_dpo.compat.patching import patched


@contextlib.contextmanager
def variables_without_values() -> Iterator[None]:
    """Create variables with a shape, dtype and layout, but no memory.

    Keras (3.15) supports deferred initialization of variables. The value of
    these is a `jax.ShapeDtypeStruct`, or zeros while a function is traced.
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
