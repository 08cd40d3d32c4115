"""Prepare a user's dataset for a model: checks, reference, packing."""

import dataclasses
import functools
from typing import Any

import jax

from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.distribution.processes import check_processes_agree
from keras_dpo.references.precompute import (
    drop_reference_model,
    fill_in_reference,
)
from keras_dpo.training.checks import (
    check_dataset,
    check_one_reference,
    check_same_source_of_reference,
)
from keras_dpo.training.memory import layers_must_be_rematerialized


def prepare(model: Any, dataset: PreferenceDataset) -> PreferenceDataset:
    """Prepare the model's own view of a dataset for scoring."""
    view = view_of(model, dataset)
    _fill_in_reference(model, view)
    return in_rows(model, view)


def prepare_training(
    model: Any,
    train: PreferenceDataset,
    valid: PreferenceDataset | None,
    epochs: int,
) -> tuple[PreferenceDataset, PreferenceDataset | None]:
    """Prepare the model's views of the datasets that `fit` was given.

    Releases a reference model whose log-probs are stored, and resolves
    `remat="auto"`.

    Args:
        model: A compiled `DPOModel`.
        train: The training pairs.
        valid: The validation pairs, if any.
        epochs: Epochs for which row lengths are chosen.
    """
    micro_batches = model.gradient_accumulation_steps
    views = [view_of(model, train, micro_batches)]
    if valid is not None:
        views.append(view_of(model, valid))
    check_same_source_of_reference(model, views)
    _fill_in_reference(model, *views)
    train = in_rows(model, views[0], micro_batches, epochs)
    if valid is not None:
        valid = in_rows(model, views[1])
    if jax.process_count() > 1:
        check_processes_agree(
            {
                "steps of an epoch": train.batches_per_epoch,
                "the training pairs": train.pairs.hash_token_ids(),
                "the order's seed": train.seed,
            }
        )
    if model.precompute_reference:
        drop_reference_model(model)
    if model.resolved_execution.remat == "auto":
        must = layers_must_be_rematerialized(model, train)
        model.execution = dataclasses.replace(
            model.resolved_execution, remat="layers" if must else "none"
        )
    if train.preprocessor.tokenizer is not None:
        # `save_policy` saves the preprocessor used in training.
        model.policy._trained_with = train.preprocessor
    return train, valid


def view_of(
    model: Any, dataset: PreferenceDataset, micro_batches: int = 1
) -> PreferenceDataset:
    """The model's own view of a dataset, validated against the model."""
    model._ensure_reference()
    view = dataset.view()
    view.check(
        functools.partial(check_dataset, model, micro_batches=micro_batches)
    )
    check_one_reference(model, view)
    return view


def in_rows(
    model: Any,
    view: PreferenceDataset,
    micro_batches: int = 1,
    epochs: int = 1,
) -> PreferenceDataset:
    """Pack a view into rows, if the policy runs on packed rows."""
    if not model.execution.in_rows:
        return view
    return view.packed(model._packing(view, micro_batches), epochs)


def _fill_in_reference(model: Any, *views: PreferenceDataset) -> None:
    """Fill in stored log-probs, if the reference is precomputed."""
    missing = [view for view in views if not view.has_reference]
    if missing and model.precompute_reference and model.reference.compares:
        fill_in_reference(model, missing)
