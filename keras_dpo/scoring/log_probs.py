"""Log-probability of every completion token, from a policy and a batch.

The only caller of the model. Runs inside a `keras.StatelessScope` that sets
the values of the model's variables.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import keras

from keras_dpo.scoring.execution import Execution
from keras_dpo.scoring.packed_backbone import packed_hidden_states, run_layers
from keras_dpo.scoring.vocabulary_head import (
    TokenStatistics,
    chunked_statistics,
    head_logits,
    token_statistics,
)

Array = jax.Array
Batch = dict[str, Array]

SPLIT_HEAD = Execution(split_head=True)


def completion_mask(batch: Batch) -> Array:
    """Float mask of the scored `completion_ids`, `(pairs, 2, tokens)`."""
    return batch["completion_mask"].astype("float32")


def completion_statistics(
    policy: keras.Model,
    batch: Batch,
    execution: Execution = SPLIT_HEAD,
    training: bool = False,
    wanted: Collection[str] = (),
) -> TokenStatistics:
    """Statistics of the completion tokens, each `(pairs, 2, tokens)`.

    Values at positions that are not scored are meaningless. The padding mask
    comes from lengths, so a pad token equal to EOS changes nothing.

    Args:
        policy: A Keras-Hub `CausalLM`, or a model from `{"token_ids",
            "padding_mask"}` to logits `(rows, length, vocabulary)`.
        batch: `completion_ids` `(pairs, 2, tokens)`, `prompt_lengths` and
            `completion_lengths` `(pairs, 2)`, all int32, and either
            `token_ids` `(pairs, 2, length)` or the rows of
            `data.packing.pack_batch`.
        execution: Resolved execution. (Rows always run as rows.)
        training: Whether dropout is on.
        wanted: Further fields of `TokenStatistics` to fill.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    if "row_ids" in batch:
        return _row_statistics(policy, batch, execution, wanted)
    pairs, _, length = batch["token_ids"].shape
    tokens = batch["completion_ids"].shape[-1]
    totals = batch["prompt_lengths"] + batch["completion_lengths"]
    inputs: dict[str, Any] = {
        "token_ids": batch["token_ids"].reshape(2 * pairs, length),
        "padding_mask": (
            jnp.arange(length) < totals.reshape(2 * pairs, 1)
        ).astype("int32"),
    }
    # The state at position t - 1 predicts the token at position t.
    positions = batch["prompt_lengths"][..., None] - 1 + jnp.arange(tokens)
    positions = jnp.clip(positions, 0, length - 1)[..., None]

    def at_completion(states: Array) -> Array:
        states = states.reshape(pairs, 2, length, -1)
        return jnp.take_along_axis(states, positions, axis=2)

    if execution.split_head:
        hidden = run_layers(policy.backbone, inputs, execution, training)
        logits = head_logits(
            policy.backbone.token_embedding, at_completion(hidden)
        )
    else:
        outputs = policy(inputs, training=training)
        logits = at_completion(outputs).astype("float32")
    return token_statistics(logits, batch["completion_ids"], wanted)


def _row_statistics(
    policy: keras.Model,
    batch: Batch,
    execution: Execution,
    wanted: Collection[str],
) -> TokenStatistics:
    """Completion statistics of packed rows, in chunks of scored tokens."""
    hidden = packed_hidden_states(policy, batch, execution)
    states = jnp.take_along_axis(
        hidden, batch["scored_states"][..., None], axis=1
    )
    statistics = chunked_statistics(
        policy.backbone.token_embedding,
        states,
        batch["scored_ids"],
        batch["scored_counts"],
        wanted,
    )
    slots = batch["scored_slots"]
    flat = slots.reshape(hidden.shape[0], -1)
    return jax.tree.map(
        lambda values: jnp.take_along_axis(values, flat, axis=1).reshape(
            slots.shape
        ),
        statistics,
    )
