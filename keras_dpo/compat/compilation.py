"""How steps are compiled, and where compiled steps are kept."""

import contextlib
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import keras

from keras_dpo.compat.patching import current, patched
from keras_dpo.utils.files import cache_directory

# XLA's CPU backend (JAX 0.10) gives most products to YNNPACK and those of a
# kernel's gradient to Eigen, and runs both at once on threads of their own: a
# quarter slower than Eigen alone on two cores (docs/benchmarks.md). bfloat16
# only YNNPACK multiplies as such, twice as fast; its sums are the slower ones.
YNNPACK = "xla_cpu_experimental_ynn_fusion_type"
CPU_OPTIONS = {
    "float32": {YNNPACK: ""},
    "bfloat16": {YNNPACK: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"},
}


@functools.cache
def compiler_options(dtype: str) -> dict[str, Any]:
    """Options of `jax.jit` for this backend; none that XLA does not know.

    Args:
        dtype: That products are computed in, `"float32"` or `"bfloat16"`.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = CPU_OPTIONS[dtype]
    try:
        jax.jit(lambda x: x + 1, compiler_options=options)(0)
    except jax.errors.JaxRuntimeError:
        return {}
    return options


@contextlib.contextmanager
def steps_with_options(options: dict[str, Any]) -> Iterator[None]:
    """Keras' JAX trainer makes its steps with these `compiler_options`."""
    trainer = keras.src.backend.jax.trainer
    jit = functools.partial(current(trainer, "jit"), compiler_options=options)
    with patched(trainer, "jit", jit):
        yield


def keep_compiled(directory: str | None) -> None:
    """Keep compiled steps on disk, so that a second start compiles nothing.

    Args:
        directory: Where; None for the user's cache directory, `"none"` to
            keep nothing. What JAX was told before wins over None.
    """
    if directory == "none":
        jax.config.update("jax_compilation_cache_dir", None)
        return
    already = getattr(jax.config, "jax_compilation_cache_dir", None)
    if directory is None and already:
        return
    path = pathlib.Path(directory or cache_directory() / "compiled")
    path.expanduser().mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path.expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
