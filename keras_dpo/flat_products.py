"""Products of all tokens with a kernel, as two-dimensional ones.

XLA's CPU backend lays the operands of a kernel's gradient out anew where a
token has more than one leading axis, and computes the values before it a second
time in the transposed order: a quarter of a training step (JAX 0.10). Kernels
see `(tokens, features)` here, and their gradients read values as they lie.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.custom_vjp
def product(inputs: Array, kernel: Array) -> Array:
    """`(tokens, features) x (features, units)`."""
    return inputs @ kernel


def _forward(inputs: Array, kernel: Array) -> tuple[Array, Any]:
    return inputs @ kernel, (inputs, kernel)


def _backward(kept: Any, gradient: Array) -> tuple[Array, Array]:
    inputs, kernel = kept
    # What comes before is computed once, not inside each product.
    inputs, gradient = jax.lax.optimization_barrier((inputs, gradient))
    return gradient @ kernel.T, inputs.T @ gradient


product.defvjp(_forward, _backward)


def flat_matmul(matmul: Callable[..., Any]) -> Callable[..., Any]:
    """`keras.ops.matmul` that flattens the tokens before a kernel."""

    def flat(inputs: Any, kernel: Any) -> Any:
        if not _are_tokens(inputs) or inputs.ndim < 3:
            return matmul(inputs, kernel)
        kernel = jnp.asarray(kernel)
        if kernel.ndim != 2 or inputs.dtype != kernel.dtype:
            return matmul(inputs, kernel)
        output = product(inputs.reshape(-1, inputs.shape[-1]), kernel)
        return output.reshape(*inputs.shape[:-1], kernel.shape[-1])

    return flat


def flat_einsum(einsum: Callable[..., Any]) -> Callable[..., Any]:
    """`keras.ops.einsum` that flattens the tokens before a kernel.

    For equations of `EinsumDense`, such as `bqm,muh->bquh`.
    """

    def flat(equation: str, *operands: Any, **options: Any) -> Any:
        axes = _kernel_axes(equation)
        fits = len(operands) == 2 and _are_tokens(operands[0])
        if axes is None or options or not fits:
            return einsum(equation, *operands, **options)
        num_leading, contracted, order = axes
        inputs, kernel = (jnp.asarray(operand) for operand in operands)
        if inputs.dtype != kernel.dtype:
            return einsum(equation, *operands)
        leading = inputs.shape[:num_leading]
        units = [kernel.shape[axis] for axis in order[contracted:]]
        features = math.prod(inputs.shape[num_leading:])
        output = product(
            inputs.reshape(-1, features),
            jnp.transpose(kernel, order).reshape(features, -1),
        )
        return output.reshape(*leading, *units)

    return flat


def _are_tokens(inputs: Any) -> bool:
    """Not LoRA's product of two variables, nor quantized integers."""
    floating = isinstance(inputs, Array) and jnp.issubdtype(
        inputs.dtype, jnp.floating
    )
    return bool(floating)


def _kernel_axes(equation: str) -> tuple[int, int, list[int]] | None:
    """(leading axes, contracted axes, the kernel's order); None: other."""
    inputs, _, rest = equation.partition(",")
    kernel, _, output = rest.partition("->")
    contracted = [label for label in inputs if label not in output]
    leading = inputs[: len(inputs) - len(contracted)]
    units = output[len(leading) :]
    fits = (
        contracted
        and "." not in equation
        and inputs == leading + "".join(contracted)
        and output == leading + units
        and sorted(kernel) == sorted([*contracted, *units])
    )
    if not fits:
        return None
    order = [kernel.index(label) for label in [*contracted, *units]]
    return len(leading), len(contracted), order
