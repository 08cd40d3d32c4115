"""Validation and start-up messages before training starts."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.distribution.processes import data_parallel_size
from keras_dpo.distribution.sharding import check_on_mesh, sharding_table
from keras_dpo.errors import UserError, UserTypeError
from keras_dpo.policies.positions import num_positions
from keras_dpo.policies.presets import text_tokenizer_of
from keras_dpo.references.base import vocabulary_size
from keras_dpo.utils.messages import say


def check_policy(policy: Any, reference: Any) -> None:
    """Raise if `DPOModel` cannot be built from this policy and reference."""
    if not isinstance(policy, keras.Model):
        raise UserTypeError(
            "`policy` must be a Keras model. Received: "
            f"{type(policy).__name__}. Load one with "
            "keras_dpo.load_policy(preset)."
        )
    if reference is policy:
        raise UserError(
            "The reference must not be the policy itself: training would move "
            'both. Use reference="initial" for the policy as it is now.'
        )
    known = reference in ("initial", "precomputed", None) or isinstance(
        reference, keras.Model
    )
    if not known:
        raise UserError(
            "`reference` must be 'initial', 'precomputed', None or a Keras "
            f"model. Received: {reference!r}."
        )
    if not policy.built:
        raise UserError(
            "The policy has no variables yet. Call it on a batch, or "
            "policy.build(...), before DPOModel(policy)."
        )
    check_on_mesh(policy)
    if isinstance(reference, keras.Model):
        check_on_mesh(reference)
    if not policy.trainable_variables:
        raise UserError(
            "The policy has no trainable variable. Set policy.trainable = "
            "True, or call policy.backbone.enable_lora(rank) (Keras-Hub finds "
            "no layer to adapt in some families: name them with "
            "target_layer_names)."
        )


def check_reference_options(
    reference: Any,
    precompute_reference: bool,
    reference_cache: str | None,
    snapshot_dtype: str | None,
) -> None:
    """Raise if an option has no effect on the chosen reference."""
    if precompute_reference and reference is None:
        raise UserError(
            "precompute_reference=True needs a reference. Received: "
            "reference=None. Leave one of them out."
        )
    is_precomputed = precompute_reference or reference == "precomputed"
    if reference_cache is not None and not is_precomputed:
        raise UserError(
            "`reference_cache` has no effect on a reference that runs "
            f"online. Received: {reference_cache!r}. Use "
            'reference="precomputed", or precompute_reference=True beside a '
            "reference model, or leave it out."
        )
    has_snapshot = reference == "initial" and not is_precomputed
    if snapshot_dtype is not None and not has_snapshot:
        raise UserError(
            "`snapshot_dtype` has no effect without a snapshot. Received: "
            f"snapshot_dtype={snapshot_dtype!r} with a reference that is "
            "not 'initial'. Leave it out."
        )


# Texts that different tokenizers encode differently.
PROBES = (
    "What is 12 + 345?  It's 357.",
    "def f(x):\n\treturn x  # naïve café, 東京, 🙂\r\n",
    "<|im_start|>user\nHello<|im_end|>\n<start_of_turn>model\n",
)


def check_same_vocabulary(policy: keras.Model, reference: keras.Model) -> None:
    """Raise if an id is one token to the policy and another to the reference.

    Control tokens are exempt: every checkpoint may name them as it likes.
    """
    ours, theirs = text_tokenizer_of(policy), text_tokenizer_of(reference)
    if ours is None or theirs is None:
        return
    control = {*ours.control_tokens, *theirs.control_tokens}
    their_tokens = {i: token for token, i in theirs.token_ids().items()}
    for token, i in ours.token_ids().items():
        other = their_tokens.get(i, token)
        if other != token and not {other, token} & control:
            raise UserError(
                "Policy and reference must have the same tokens. Received: id "
                f"{i}, which is {token!r} to the policy and {other!r} to the "
                "reference. Use a reference with the policy's tokenizer."
            )


def check_same_ids(policy: keras.Model, reference: keras.Model) -> None:
    """Raise if policy and reference tokenize a text into different ids."""
    ours, theirs = text_tokenizer_of(policy), text_tokenizer_of(reference)
    if ours is None or theirs is None:
        return
    probes = list(PROBES)
    for text, a, b in zip(
        probes, ours.encode(probes), theirs.encode(probes), strict=True
    ):
        if a != b:
            raise UserError(
                "Policy and reference must make the same ids of a text. "
                f"Received: {a[:8]}... from the policy ({ours.name}) and "
                f"{b[:8]}... from the reference ({theirs.name}), of {text!r}. "
                "Load both with the tokenizer that they were trained with; "
                "keras_dpo.save_policy keeps it beside a preset."
            )


def describe_text(preprocessor: Any) -> list[str]:
    """Lines describing the tokenizer and chat template that a run uses."""
    tokenizer = getattr(preprocessor, "tokenizer", None)
    if tokenizer is None:
        return []
    return [
        f"Tokenizer: {tokenizer.name}",
        f"Chat template: {preprocessor.describe_template()}",
    ]


def check_trainable_variables(policy: keras.Model, wrapped: list[str]) -> None:
    """Raise if training would silently do nothing, or the wrong thing."""
    now = [v.path for v in policy.trainable_variables]
    if now != wrapped:
        raise UserError(
            "The policy's trainable variables changed after DPOModel(policy). "
            f"Received: {len(wrapped)} then, {len(now)} now. Call enable_lora "
            "or set `trainable` before DPOModel(policy), or make a new one."
        )
    short = [
        v
        for v in policy.trainable_variables
        if v.dtype in ("bfloat16", "float16")
    ]
    if short:
        raise UserError(
            "Trainable variables must be float32: Keras' Adam does not move "
            f"16-bit ones. Received: {len(short)} in {short[0].dtype}, such as "
            f"{short[0].path}. Load the policy with dtype='mixed_bfloat16', "
            "or train LoRA adapters, which are float32."
        )


def check_differentiable(policy: keras.Model) -> None:
    """Raise if Keras would compute wrong gradients for a layer."""
    for layer in policy._flatten_layers():
        if getattr(layer, "quantization_mode", None) is not None:
            raise UserError(
                "Keras 3.15 differentiates quantized layers wrongly: training "
                f"would go astray. Received: {layer.path} quantized to "
                f"{layer.quantization_mode}. Train LoRA on a bfloat16 base, "
                "and quantize afterwards; evaluate and predict work."
            )


def check_dataset(
    model: Any, dataset: PreferenceDataset, micro_batches: int = 1
) -> None:
    """Raise if the model cannot run on a dataset.

    Args:
        model: A `DPOModel` whose reference is set.
        dataset: The model's own view of the pairs.
        micro_batches: Micro-batches per step.

    Raises:
        ValueError: A token id is beyond the embedding, the batch does not
            divide, or the data lacks something that the loss needs.
    """
    parts = micro_batches * data_parallel_size()
    if dataset.batch_size % parts:
        raise UserError(
            "The batch must divide into micro-batches and devices. "
            f"Received: batch_size={dataset.batch_size}, {micro_batches} "
            f"accumulation steps x {data_parallel_size()} data-parallel "
            f"devices. Use a multiple of {parts}."
        )
    _check_positions(model, dataset)
    vocabulary = vocabulary_size(model.policy)
    tokenizer = dataset.preprocessor.tokenizer
    if vocabulary is not None:
        if tokenizer and tokenizer.vocabulary_size > vocabulary:
            raise UserError(
                "The tokenizer is larger than the policy's embedding. "
                f"Received: {tokenizer.vocabulary_size} tokens, "
                f"{vocabulary} rows. Use the policy's own tokenizer."
            )
        largest = dataset.pairs.largest_ids
        beyond = np.flatnonzero(largest >= vocabulary)
        if len(beyond):
            raise UserError(
                f"Row {dataset.report.rows[beyond[0]]} holds token id "
                f"{largest[beyond[0]]}, beyond the policy's vocabulary of "
                f"{vocabulary}."
            )
    loss = model.preference_loss
    weights = np.nan_to_num(dataset.pairs.extra("weight"), nan=1.0)
    if loss.sorts_pairs and (weights != 1).any():
        raise UserError(
            f"{type(loss).__name__} sorts the pairs of a batch, so "
            "per-pair weights would go to the wrong pairs. Remove the "
            "`weight` column or use another loss."
        )
    stored = model.reference.is_stored
    by_token = {
        "ld_alpha": loss.needs_token_log_probs,
        "The metric kl": "kl" in model._optional_metrics,
    }
    for name, needed in by_token.items():
        if stored and dataset.reference_is_summed and needed:
            raise UserError(
                f"{name} needs reference log-probs of every token, and the "
                "data holds those of whole completions. Leave "
                f"{name.split()[-1]} out, or let the reference be computed."
            )


def _check_positions(model: Any, dataset: PreferenceDataset) -> None:
    """Raise if a pair is longer than a model's position embedding table."""
    models = [model.policy, *model.reference.models]
    known = [x for x in map(num_positions, models) if x is not None]
    lengths = dataset.pairs.sequence_lengths
    longest = int(lengths.argmax())
    padded = 0 if model.execution.in_rows else dataset.shapes[-1][0]
    if known and lengths[longest] > min(known):
        raise UserError(
            f"Row {dataset.report.rows[longest]} has {lengths[longest]} "
            f"tokens, and the model knows {min(known)} positions. Lower "
            f"max_length to {min(known)}, or leave the row out."
        )
    if known and padded > min(known):
        raise UserError(
            "Rows must be padded to no more than the model's positions. "
            f"Received: a bucket of {padded} tokens, {min(known)} "
            f"positions. Pass buckets that end with {min(known)}."
        )


def check_one_reference(model: Any, dataset: Any) -> None:
    """Raise if a reference model and the data both supply log-probs."""
    was_given = model._reference_was_dropped or model.reference.models
    if model.precompute_reference and was_given and dataset.has_reference:
        raise UserError(
            "The data holds reference log-probs, and another model was given "
            "as the reference to compute them with. Received: "
            "reference_chosen_log_prob and reference_rejected_log_prob in the "
            "data, precompute_reference=True. Remove the columns, or use "
            "reference='precomputed' to read them."
        )


def check_same_source_of_reference(
    model: Any, views: Sequence[PreferenceDataset]
) -> None:
    """Raise where training and validation would have other references."""
    if not model.reference.is_stored or len(views) < 2:
        return
    names = ("training", "validation")
    with_columns = [
        name
        for name, view in zip(names, views, strict=True)
        if view.has_reference
    ]
    if len(with_columns) == 1:
        (name,) = with_columns
        raise UserError(
            f"The {name} pairs alone hold reference log-probs; the others' "
            "would be of the initial policy, which is another reference. "
            "Received: reference_chosen_log_prob and "
            f"reference_rejected_log_prob in the {name} data. Give both or "
            "neither."
        )


def report_start(
    model: Any,
    dataset: Any = None,
    epochs: int = 1,
    print_fn: Callable[[str], None] | None = None,
) -> None:
    """Print the reference, what is trained, and how it runs."""
    print_fn = print_fn or say
    reference = model._ensure_reference()
    trained = model.trainable_variables
    count = sum(int(np.prod(v.shape)) for v in trained)
    total = sum(int(np.prod(v.shape)) for v in model.policy.weights)
    preprocessor = getattr(dataset, "preprocessor", model.preprocessor)
    for line in describe_text(preprocessor):
        print_fn(line)
    print_fn(f"Reference: {reference.describe()}")
    print_fn(
        f"Trained: {count:,} of {total:,} parameters in {len(trained)} "
        f"variables; loss {model.preference_loss!r}"
    )
    if not reference.compares and model.preference_loss.needs_reference:
        print_fn(
            "The loss takes the reference's log-probs as zero: training is "
            "reference-free."
        )
    columns = getattr(dataset, "reference_is_summed", False)
    if columns and not reference.is_stored:
        print_fn(
            "Note: the data's own reference log-probs are not read; "
            "reference='precomputed' reads them."
        )
    for note in model.execution.notes:
        print_fn(note)
    if dataset is not None and dataset.packing is not None:
        print_fn(dataset.describe_rows())
    if keras.distribution.distribution() is not None:
        for line in sharding_table(model.policy.variables):
            print_fn(line)
    if model.execution.rematerializes:
        print_fn("Decoder layers are rematerialized in the backward pass.")
    if reference.runs_online and epochs > 1:
        once = 'reference="precomputed"'
        if reference.models:
            once = "precompute_reference=True"
        print_fn(
            f"The reference runs in each of {epochs} epochs; with {once} it "
            "runs once (if it is not synced)."
        )


def warn_of_swapped_pairs(
    history: dict[str, list[float]], num_pairs: int
) -> None:
    """Warn if training ranks the validation pairs the wrong way round.

    Args:
        history: The history returned by `fit`.
        num_pairs: Number of validation pairs.
    """
    accuracies = history.get("val_reward_accuracy")
    # Two standard errors below an accuracy of one half.
    if not accuracies or not accuracies[-1] < 0.5 - num_pairs**-0.5:
        return
    say(
        f"Warning: after training {accuracies[-1]:.0%} of {num_pairs} "
        "validation pairs are ranked rightly, clearly fewer than one half. "
        "Chosen and rejected may be swapped in the training or the validation "
        "data (keras-dpo inspect shows both), or training diverged."
    )


def steps_done(optimizer: keras.Optimizer) -> int:
    """Number of updates an optimizer has made."""
    return int(keras.ops.convert_to_numpy(optimizer.iterations))


def check_first_batch(model: Any, batch: dict[str, Any]) -> None:
    """Raise if a snapshot and the policy disagree on the first batch.

    At step 0 policy and reference are identical: every reward must be 0.
    """
    if not model.reference.begins_equal:
        return
    loss = model.preference_loss
    policy_log_probs, log_probs = model.pair_log_probs_of(batch)
    found = loss.per_pair(policy_log_probs, log_probs)
    expected = loss.per_pair(policy_log_probs, policy_log_probs)
    rewards = loss.rewards(policy_log_probs, log_probs)
    largest = float(np.max(np.abs(rewards)))
    gap = float(np.max(np.abs(found - expected)))
    if not (largest < 1e-3 and gap < 1e-3):
        raise UserError(
            "Before the first step policy and reference must agree: every "
            "reward 0, every loss at its value for margin 0. Received: a "
            f"reward of {largest:.3g}, a loss {gap:.3g} off. The policy "
            "changed after DPOModel(policy) (weights loaded, a step taken "
            "elsewhere), or gives NaN. Make a new DPOModel(policy)."
        )
