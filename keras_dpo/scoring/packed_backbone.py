"""Runs rows of packed pairs through a Keras-Hub backbone's own layers.

The one place that reaches into Keras-Hub. Inside a serving context
(`keras_hub.src.vllm`, Keras-Hub 0.32) its decoder layers pass queries,
unrepeated keys and the position of every token to an attention function: packed
rows use that hook. Phi3 and SmolLM3 lack it and are patched for the duration of
a call. `tests/test_packed_backbone.py` tells when upstream changes.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
from keras.src.models import functional

from keras_dpo.compat.patching import current, patched
from keras_dpo.distribution.processes import (
    data_parallel_size,
    over_rows,
    rows_on_devices,
)
from keras_dpo.scoring.execution import Execution
from keras_dpo.scoring.flat_products import flat_einsum, flat_matmul
from keras_dpo.scoring.row_attention import (
    AttentionSettings,
    Row,
    attend_in_blocks,
    attend_in_sequences,
)
from keras_dpo.utils.arrays import BLOCK

Array = jax.Array
Batch = dict[str, Array]
# (query, key, value, settings) -> output, in place of each layer's attention.
AttentionFunction = Callable[[Array, Array, Array, AttentionSettings], Array]


def packed_hidden_states(
    policy: keras.Model, batch: Batch, execution: Execution
) -> Array:
    """Final hidden states of every row, `(rows, length, hidden)`.

    Args:
        policy: A Keras-Hub `CausalLM` of `PACKED_FAMILIES`.
        batch: A batch of packed rows, from `data.packing.pack_batch`.
        execution: Resolved execution.
    """
    rows, length = batch["row_ids"].shape
    hidden = run_backbone(
        policy.backbone,
        batch["row_ids"].reshape(-1),
        batch["row_positions"].reshape(-1),
        _row_attention(batch),
        execution,
    )
    return hidden.reshape(rows, length, -1)


def run_backbone(
    backbone: keras.Model,
    token_ids: Array,
    positions: Array,
    attention: AttentionFunction,
    execution: Execution,
) -> Array:
    """Run flat tokens through the backbone; returns `(tokens, hidden)`."""
    from keras_hub.src.vllm.context import vllm_context_scope

    def paged_attention(
        cache: None,
        query: Array,
        key: Array,
        value: Array,
        scale: float,
        head: int,
        heads: int,
        groups: int,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
    ) -> tuple[None, Array]:
        settings = AttentionSettings(
            float(scale), sliding_window or 0, soft_cap
        )
        tokens = query.shape[0]
        output = attention(
            query.reshape(tokens, groups, heads // groups, head),
            key.reshape(tokens, groups, head),
            value.reshape(tokens, groups, head),
            settings,
        )
        return None, output.reshape(tokens, heads * head)

    # Every token is a sequence of its own to all layers but attention.
    inputs = {
        "token_ids": token_ids[:, None],
        "padding_mask": jnp.ones((token_ids.shape[0], 1), "int32"),
    }
    ops = keras.src.ops
    with (
        vllm_context_scope(paged_attention, positions),
        _families_without_a_way_in(backbone, positions),
        patched(ops, "matmul", flat_matmul(current(ops, "matmul"))),
        patched(ops, "einsum", flat_einsum(current(ops, "einsum"))),
    ):
        return run_layers(backbone, inputs, execution)[:, 0]


def run_layers(
    backbone: keras.Model,
    inputs: Batch,
    execution: Execution,
    training: bool = False,
) -> Array:
    """Run the backbone on a batch; returns `(rows, length, hidden)`.

    Args:
        backbone: A Keras-Hub backbone.
        inputs: Its inputs.
        execution: Says whether each decoder layer is rematerialized. (Keras'
            own `keras.remat` crashes around these layers, Keras 3.15.)
        training: Whether dropout is on.
    """
    remat = execution.rematerializes
    if not remat and data_parallel_size() == 1:
        return backbone(inputs, training=training)
    layers = {id(layer) for layer in backbone.transformer_layers}

    def operation(layer: Any) -> Any:
        run = functional.operation_fn(layer, training=training)
        if id(layer) not in layers:
            return run

        def call(hidden: Array, *args: Any, **kwargs: Any) -> Array:
            # Otherwise a mesh shards states by features, like some kernels.
            hidden = rows_on_devices(hidden)
            if not remat:
                return run(hidden, *args, **kwargs)
            return _computed_again(lambda x: run(x, *args, **kwargs), hidden)

        return call

    inputs = backbone._standardize_inputs(inputs)
    return backbone._run_through_graph(inputs, operation)


def _computed_again(layer: Callable[[Array], Array], inputs: Array) -> Array:
    """`layer(inputs)`, rematerialized from its inputs in the backward pass.

    `jax.checkpoint` would do, but XLA's CPU backend (JAX 0.10) drops its
    barriers and recomputes all layers at the start of the backward pass, which
    saves no memory. Here the inputs wait for the gradient: a sum that no
    optimization may drop.
    """
    converted, constants = jax.closure_convert(layer, inputs)

    @jax.custom_vjp
    def run(inputs: Array, *constants: Array) -> Array:
        return converted(inputs, *_gathered_after(inputs, constants))

    def forward(inputs: Array, *constants: Array) -> tuple[Array, Any]:
        return run(inputs, *constants), (inputs, constants)

    def backward(kept: Any, gradient: Array) -> tuple[Array, ...]:
        inputs, constants = kept
        inputs = inputs + 0.0 * gradient.astype(inputs.dtype)
        constants = _gathered_after(gradient, constants)
        d_inputs, *d_constants = jax.vjp(converted, inputs, *constants)[1](
            gradient
        )
        if _simulates_mesh():
            # Otherwise all layers' gradients are summed at the end, unsharded.
            for d in d_constants:
                if jnp.issubdtype(d.dtype, jnp.floating):
                    first = d.reshape(-1)[0].astype(d_inputs.dtype)
                    d_inputs = d_inputs + 0.0 * first
        return d_inputs, *d_constants

    run.defvjp(forward, backward)
    return run(inputs, *constants)


def _gathered_after(signal: Array, kernels: Sequence[Array]) -> Sequence[Array]:
    """Kernels that are gathered for this pass only.

    Otherwise fully sharded kernels would be gathered once for both passes,
    which keeps a whole copy of the policy in memory.
    """
    if data_parallel_size() == 1:
        return kernels
    if not _simulates_mesh():
        return jax.lax.optimization_barrier(tuple(kernels))
    wait = 0.0 * signal.reshape(-1)[0]
    return [
        k + wait.astype(k.dtype) if jnp.issubdtype(k.dtype, jnp.floating) else k
        for k in kernels
    ]


def _simulates_mesh() -> bool:
    """Whether XLA's CPU backend compiles for a mesh.

    It drops barriers, gathers all layers at the start and sums all gradients
    at the end. Adding zeros limits it to one layer at a time, like other
    backends, so that `keras-dpo plan` predicts what those need.
    """
    return jax.default_backend() == "cpu" and data_parallel_size() > 1


def layer_settings(backbone: keras.Model) -> list[AttentionSettings]:
    """The attention settings of every decoder layer, in order."""
    seen: list[AttentionSettings] = []

    def record(
        query: Array, key: Array, value: Array, settings: AttentionSettings
    ) -> Array:
        seen.append(settings)
        return query

    ids = jax.ShapeDtypeStruct((BLOCK,), "int32")
    with keras.StatelessScope():
        jax.eval_shape(
            lambda ids: run_backbone(backbone, ids, ids, record, Execution()),
            ids,
        )
    return seen


def _row_attention(batch: Batch) -> AttentionFunction:
    """Attention function within each of the batch's rows."""
    rows, length = batch["row_ids"].shape

    def attention(
        query: Array, key: Array, value: Array, settings: AttentionSettings
    ) -> Array:
        attend = _over_sequences if "sequence_slots" in batch else _over_blocks
        q, k, v = (
            array.reshape(rows, length, *array.shape[1:])
            for array in (query, key, value)
        )
        return attend(q, k, v, batch, settings).reshape(query.shape)

    return attention


def _over_sequences(
    query: Array,
    key: Array,
    value: Array,
    batch: Batch,
    settings: AttentionSettings,
) -> Array:
    rows = query.shape[0]
    tokens = batch["sequence_slots"].shape[-1]
    lengths = batch["prompt_lengths"] + batch["completion_lengths"]
    splash = _attends_by_splash()
    attend = functools.partial(
        attend_in_sequences, settings=settings, splash=splash
    )
    # XLA cannot partition the splash kernel over devices itself.
    return (over_rows(attend) if splash else attend)(
        query,
        key,
        value,
        batch["sequence_slots"].reshape(rows, -1, tokens),
        batch["row_slots"],
        lengths.reshape(rows, -1),
    )


def _attends_by_splash() -> bool:
    """Whether to use TPU's splash kernel: it needs whole heads per device."""
    distribution = keras.distribution.distribution()
    devices = (
        1 if distribution is None else distribution.device_mesh.devices.size
    )
    return jax.default_backend() == "tpu" and devices == data_parallel_size()


def _over_blocks(
    query: Array,
    key: Array,
    value: Array,
    batch: Batch,
    settings: AttentionSettings,
) -> Array:
    """`attend_in_blocks` row by row; on a mesh each device runs its own."""
    window = settings.window
    if f"blocks_{window}" not in batch:
        window = 0  # No sequence is longer than the window.
    pattern = Row(
        batch["row_segments"],
        batch["row_positions"],
        batch[f"blocks_{window}"],
        batch[f"block_counts_{window}"],
    )

    def one(inputs: Any) -> Array:
        query, key, value, row = inputs
        output = attend_in_blocks(
            jnp.transpose(query, (1, 2, 0, 3)),
            jnp.transpose(key, (1, 0, 2)),
            jnp.transpose(value, (1, 0, 2)),
            row,
            settings,
        )
        return jnp.transpose(output, (2, 0, 1, 3))

    def each(*inputs: Any) -> Array:
        if inputs[0].shape[0] == 1:
            return one(jax.tree.map(lambda a: a[0], inputs))[None]
        return jax.lax.map(one, inputs)

    return over_rows(each)(query, key, value, pattern)


@contextlib.contextmanager
def _families_without_a_way_in(
    backbone: keras.Model, positions: Array
) -> Iterator[None]:
    """Patch positions and the context's attention into Phi3 and SmolLM3."""
    from keras_hub.src.layers.modeling.rotary_embedding import RotaryEmbedding
    from keras_hub.src.models.phi3.phi3_attention import Phi3Attention
    from keras_hub.src.models.smollm3 import smollm3_layers
    from keras_hub.src.vllm.attention import vllm_paged_attention

    attention_class = {
        "Phi3Backbone": Phi3Attention,
        "SmolLM3Backbone": smollm3_layers.SmolLM3Attention,
    }.get(type(backbone).__name__)
    if attention_class is None:
        yield
        return

    def compute_attention(
        self: Any, query: Array, key: Array, value: Array, *_: Any, **__: Any
    ) -> Array:
        groups = self.num_key_value_groups
        # All heads of a group hold the same repeated key.
        return vllm_paged_attention(
            query,
            key[:, :, ::groups],
            value[:, :, ::groups],
            self._inv_norm_factor,
        )

    def at_positions(original: Any) -> Any:
        """Look up each token's position in a rotary table of all positions."""

        def embedding(self: Any, inputs: Array, *_: Any, **__: Any) -> Any:
            shape = (1, inputs.shape[0], *inputs.shape[2:])
            table = original(self, inputs.reshape(shape))
            return jax.tree.map(
                lambda a: jnp.take(a[0], positions, axis=0)[:, None], table
            )

        return embedding

    if attention_class is Phi3Attention:
        owner, name = RotaryEmbedding, "_compute_cos_sin_embedding"
    else:
        owner, name = smollm3_layers.SmolLM3RotaryEmbedding, "call"
    with (
        patched(attention_class, "_compute_attention", compute_attention),
        patched(owner, name, at_positions(current(owner, name))),
    ):
        yield
