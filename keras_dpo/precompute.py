"""Reference log-probs, computed once for a dataset and then read."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keras_dpo.checks import steps_done
from keras_dpo.compilation import cache_directory
from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.data.packing import choose_lengths
from keras_dpo.data.stream import need_an_end
from keras_dpo.distribution import distribute_batch, to_host
from keras_dpo.errors import UserError
from keras_dpo.log_probs import Array
from keras_dpo.reference import ModelReference, PrecomputedReference
from keras_dpo.reference_store import ReferenceStore, hash_weights

# Tokens of a batch without gradients.
PRECOMPUTE_TOKENS = 8192


def fill_in_reference(model: Any, dataset: PreferenceDataset) -> pathlib.Path:
    """Fill in reference log-probs: read what is on disk, compute the rest.

    Batches are larger than those of training: nothing is kept for a
    gradient.
    """
    need_an_end(dataset, "A precomputed reference is one of all pairs")
    reference = model.reference
    online = reference if isinstance(reference, ModelReference) else None
    scored = model.policy if online is None else online.model
    if model._reference_content is None:
        _check_can_run(model)
        model._reference_content = {
            "reference weights": hash_weights(scored.variables),
            "number types": scored.dtype_policy.name,
        }
    store = ReferenceStore(
        model.reference_cache or cache_directory() / "reference",
        dataset.pairs,
        model._reference_content,
        strict=model.reference_cache is not None,
    )
    if not store.is_whole and online is None:
        _check_can_run(model)
    trainable = [v.value for v in model.trainable_variables]
    non_trainable = [v.value for v in model.non_trainable_variables]
    # JAX keeps the function for a while: it must not keep the reference.
    of_policy = online is None

    @functools.partial(jax.jit, compiler_options=model.compiler_options)
    def run(trainable: Any, non_trainable: Any, batch: Any) -> Array:
        placeholder = jnp.zeros(batch["completion_ids"].shape, "float32")
        batch = {**batch, "reference_log_probs": placeholder}
        policy, stored, *_ = model._forward(
            trainable, non_trainable, batch, False
        )
        found = policy if of_policy else stored
        return found.log_probs * found.mask

    parts = [] if store.is_whole else _parts(model, dataset, store)

    def compute(n: int) -> Iterator[tuple[int, np.ndarray]]:
        for indices in parts[n].all_batches():
            batch = distribute_batch(parts[n].make_batch(indices))
            values = to_host(run(trainable, non_trainable, batch))
            yield from zip(indices, values, strict=False)

    store.fill(compute)
    dataset.use_reference(store)
    return store.directory


def drop_reference_model(model: Any) -> None:
    """Let go of a reference whose log-probs are stored."""
    if isinstance(model.reference, ModelReference):
        # Keras (3.15) keeps a layer whose attribute is replaced or
        # deleted, and a list of all layers of when it was compiled.
        dropped = {id(x) for x in model.reference._flatten_layers()}
        model._tracker.untrack(model.reference)
        model.reference = PrecomputedReference()
        state: Any = model.__dict__.get("_compiled_trainable_state", {})
        model._compiled_trainable_state = {
            layer: trainable
            for layer, trainable in state.items()
            if id(layer) not in dropped
        }
        model.reference_choice = "precomputed"


def _check_can_run(model: Any) -> None:
    """Raise where the reference is no longer there to be run."""
    if isinstance(model.reference, ModelReference) or model._at_step_zero():
        return
    raise UserError(
        'reference="precomputed" needs reference_chosen_log_prob and '
        "reference_rejected_log_prob in the data, or a policy that has not "
        f"been trained. Received: {steps_done(model.optimizer)} steps of "
        "training, and pairs whose log-probs were not stored. Call "
        "precompute(pairs) before fit."
    )


def _parts(
    model: Any, dataset: PreferenceDataset, store: ReferenceStore
) -> list[PreferenceDataset]:
    """The store's parts of a dataset, in batches of few shapes."""
    indices = [store.indices(n) for n in range(store.num_parts)]
    parts = dataset.parts(indices, PRECOMPUTE_TOKENS)
    if not model.execution.in_rows:
        return parts
    packing = model._packing(dataset, 1)
    longest = int(packing.pair_lengths(dataset.pairs.lengths).max())
    packing = dataclasses.replace(packing, longest_pair=longest)
    parts = [part.packed(packing) for part in parts]
    totals = np.concatenate([part.row_totals() for part in parts])
    packing = dataclasses.replace(packing, lengths=choose_lengths(totals))
    return [part.packed(packing) for part in parts]
