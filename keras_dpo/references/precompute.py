"""Precompute a dataset's reference log-probs once, and read them later."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.data.packing import choose_lengths
from keras_dpo.data.stream import need_an_end
from keras_dpo.distribution.processes import distribute_batch, to_host
from keras_dpo.errors import UserError
from keras_dpo.references.base import replace_reference
from keras_dpo.references.content import content_of
from keras_dpo.references.kinds import PrecomputedReference
from keras_dpo.references.store import ReferenceStore
from keras_dpo.scoring.log_probs import Array
from keras_dpo.utils.files import cache_directory

# Tokens per batch when no gradients are needed.
PRECOMPUTE_TOKENS = 8192


def fill_in_reference(
    model: Any, datasets: Sequence[PreferenceDataset]
) -> list[pathlib.Path]:
    """Fill in the reference log-probs of the model's datasets.

    Those on disk are read; the rest are computed, in larger batches than in
    training, because no activations are kept for gradients.

    Args:
        model: A `DPOModel` whose reference is set.
        datasets: The model's own views of the pairs.

    Returns:
        The stores' directories.

    Raises:
        UserError: Log-probs are missing on disk, and the weights are gone.
    """
    can_run = _can_run(model)
    if can_run:
        # Rehashed each time, since weights may have been loaded in between.
        model._reference_content = _content(model)
    elif model._reference_content is None:
        raise UserError(_GONE)
    return [_fill_in(model, dataset, can_run) for dataset in datasets]


def _fill_in(
    model: Any, dataset: PreferenceDataset, can_run: bool
) -> pathlib.Path:
    """Fill in the reference log-probs of one dataset."""
    need_an_end(dataset, "A precomputed reference is one of all pairs")
    store = ReferenceStore(
        model.reference_cache or cache_directory() / "reference",
        dataset.pairs,
        model._reference_content,
        strict=model.reference_cache is not None,
    )
    if not can_run and not store.is_whole:
        raise UserError(_GONE)
    store.fill(_log_probs_of_parts(model, dataset, store))
    dataset.use_reference(store)
    return store.directory


def _can_run(model: Any) -> bool:
    """Whether the weights of the reference are still available."""
    if model.reference.models:
        return True
    return not model.has_trained and not model._reference_was_dropped


_GONE = (
    'reference="precomputed" needs reference_chosen_log_prob and '
    "reference_rejected_log_prob in the data, or a policy that has not been "
    "trained: the reference's weights are gone, and no store holds log-probs "
    "of these pairs. Call precompute(pairs) before fit, or make a new DPOModel."
)


def _content(model: Any) -> dict[str, str]:
    """Hash what the reference's log-probs depend on beyond token ids."""
    for other in model.reference.models:
        return content_of(other)
    return content_of(model.policy, model._initial_values())


def _log_probs_of_parts(
    model: Any, dataset: PreferenceDataset, store: ReferenceStore
) -> Callable[[int], Iterator[tuple[int, np.ndarray]]]:
    """A function from a part's number to its pairs' places and log-probs."""
    # JAX caches the function, so it must not capture the reference.
    of_policy = not model.reference.models

    @functools.partial(jax.jit, compiler_options=model.compiler_options)
    def run(trainable: Any, non_trainable: Any, batch: Any) -> Array:
        placeholder = jnp.zeros(batch["completion_ids"].shape, "float32")
        batch = {**batch, "reference_log_probs": placeholder}
        policy, stored, *_ = model._forward(
            trainable, non_trainable, batch, False
        )
        found = policy if of_policy else stored
        return found.log_probs * found.mask

    @functools.cache
    def parts() -> list[PreferenceDataset]:
        return _parts(model, dataset, store)

    def compute(n: int) -> Iterator[tuple[int, np.ndarray]]:
        trainable = [v.value for v in model.trainable_variables]
        if of_policy:
            trainable = model._initial_values()
        non_trainable = [v.value for v in model.non_trainable_variables]
        part = parts()[n]
        for indices in part.all_batches():
            batch = distribute_batch(part.make_batch(indices))
            values = to_host(run(trainable, non_trainable, batch))
            yield from zip(indices, values, strict=False)

    return compute


def drop_reference_model(model: Any) -> None:
    """Release a reference model whose log-probs are stored."""
    if model.reference.models:
        replace_reference(model, PrecomputedReference())
        model.reference_choice = "precomputed"
        model._reference_was_dropped = True


def _parts(
    model: Any, dataset: PreferenceDataset, store: ReferenceStore
) -> list[PreferenceDataset]:
    """Split a dataset into the store's parts, in batches of few shapes."""
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
