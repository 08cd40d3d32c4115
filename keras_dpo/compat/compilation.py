"""Compiler options for steps, and the persistent compilation cache."""

import contextlib
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import keras

from keras_dpo.compat.patching import current, patched
from keras_dpo.utils.files import cache_directory

# XLA's CPU backend (JAX 0.10) runs most matmuls on YNNPACK and those of kernel
# gradients on Eigen, concurrently in separate thread pools: a quarter slower
# than Eigen alone on two cores (docs/benchmarks.md). Only YNNPACK multiplies
# bfloat16 natively, twice as fast; its reductions are the slower ones.
YNNPACK = "xla_cpu_experimental_ynn_fusion_type"
CPU_OPTIONS = {
    "float32": {YNNPACK: ""},
    "bfloat16": {YNNPACK: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"},
}


@functools.cache
def compiler_options(dtype: str) -> dict[str, Any]:
    """`jax.jit` compiler options for this backend; empty if XLA rejects them.

    Args:
        dtype: Compute dtype of matrix products, `"float32"` or `"bfloat16"`.
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
    """Make Keras' JAX trainer compile its steps with these options."""
    trainer = keras.src.backend.jax.trainer
    jit = functools.partial(current(trainer, "jit"), compiler_options=options)
    with patched(trainer, "jit", jit):
        yield


def keep_compiled(directory: str | None) -> None:
    """Cache compiled steps on disk, so that a restart need not recompile them.

    Args:
        directory: Cache directory; `"none"` disables the cache. None keeps
            the directory configured in JAX, or else is the user's cache.
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
