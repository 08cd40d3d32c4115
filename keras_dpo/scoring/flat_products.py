"""Products of tokens with kernels, flattened to two-dimensional matmuls.

If tokens have more than one leading axis, XLA's CPU backend copies the operands
of a kernel's gradient to another layout, and recomputes their producers in the
transposed order: a quarter of a training step (JAX 0.10). Here kernels see
`(tokens, features)`, and their gradients read values in place.

In bfloat16 the same backend is twice as fast with a float32 result, and with
operands that need no transposition (see `compilation.compiler_options`).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras

Array = jax.Array
# Side of the square tiles that a transposition moves.
TILE = 32


@jax.custom_vjp
def product(inputs: Array, kernel: Array) -> Array:
    """Matrix product `(tokens, features) x (features, units)`."""
    return _product("tf,fu->tu", inputs, kernel)


def _forward(inputs: Array, kernel: Array) -> tuple[Array, Any]:
    return _product("tf,fu->tu", inputs, kernel), (inputs, kernel)


def _backward(kept: Any, gradient: Array) -> tuple[Array, Array]:
    inputs, kernel = kept
    # Materialize the producers once, not inside each product.
    inputs, gradient = jax.lax.optimization_barrier((inputs, gradient))
    d_inputs = _product("tu,fu->tf", gradient, kernel)
    return d_inputs, _product("ft,tu->fu", transposed(inputs), gradient)


product.defvjp(_forward, _backward)


def _product(equation: str, left: Array, right: Array) -> Array:
    found = jnp.einsum(equation, left, right, preferred_element_type="float32")
    return found.astype(left.dtype)


def transposes_before(dtype: Any) -> bool:
    """Whether to transpose operands, so that products read whole rows.

    True for bfloat16 on one CPU, where any other product is half as fast.
    """
    return (
        dtype == "bfloat16"
        and jax.default_backend() == "cpu"
        and keras.distribution.distribution() is None
    )


def transposed(matrix: Array) -> Array:
    """The transpose, materialized if `transposes_before`.

    XLA fuses a plain transpose into the product, even into a bfloat16 product
    that it then cannot run.
    """
    if not transposes_before(matrix.dtype):
        return matrix.T
    rows, columns = matrix.shape
    padded = jnp.pad(matrix, ((0, -rows % TILE), (0, -columns % TILE)))
    tiles = padded.reshape(-1, TILE, padded.shape[1] // TILE, TILE)
    turned = tiles.transpose(2, 3, 0, 1).reshape(padded.shape[::-1])
    return turned[:columns, :rows]


def flat_matmul(matmul: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `keras.ops.matmul` to flatten the tokens before a kernel."""

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
    """Wrap `keras.ops.einsum` to flatten the tokens before a kernel.

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
    """Excludes LoRA's product of two variables, and quantized integers."""
    floating = isinstance(inputs, Array) and jnp.issubdtype(
        inputs.dtype, jnp.floating
    )
    return bool(floating)


def _kernel_axes(equation: str) -> tuple[int, int, list[int]] | None:
    """(leading, contracted axes, kernel's axis order); None if unsupported."""
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
