"""All that a run needs to go on as if it had never stopped.

Variables by order (the paths of two processes differ), the place in the data,
what callbacks counted; and what must be the same for it to mean anything.
"""

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import keras
import numpy as np

from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.references.content import computed_with
from keras_dpo.references.store import hash_weights
from keras_dpo.training.after_step import AfterStep

# Raised when states of an earlier version must not be read.
FORMAT = 3
# What Keras' own callbacks count, beyond their settings.
KERAS_CALLBACKS = {
    "EarlyStopping": ("wait", "best", "best_epoch", "stopped_epoch"),
    "ReduceLROnPlateau": ("wait", "best", "cooldown_counter"),
    "ModelCheckpoint": (
        "best",
        "_batches_seen_since_last_saving",
        "_last_batch_seen",
    ),
    "History": ("history", "epoch"),
}
# What to do where some settings are others, by the beginning of their path.
REMEDIES = {
    r"date ": (
        "The chat template writes the date: give the run's own, "
        "DPOPreprocessor(date=...) or --template_date."
    ),
    r"optimizer\.(.+\.)?learning_rate\.(decay_|warmup_)?steps ": (
        "The schedule was made for the steps that the run began with: keep "
        "their number (--max_steps, --num_train_epochs), or begin a new run "
        "from the policy that this one saved."
    ),
}


class Place(NamedTuple):
    """Where a run stands: `batch` steps of `epoch` are done."""

    epoch: int
    batch: int


def changing_variables(model: Any) -> dict[str, list[keras.Variable]]:
    """The variables that training changes, in groups.

    Frozen kernels and a reference that nobody synced are left out: they are
    what the run began with, which a hash holds to.
    """
    fixed = {id(v) for v in fixed_variables(model)}
    return {
        "trainable": model.trainable_variables,
        "other": [
            v for v in model.non_trainable_variables if id(v) not in fixed
        ],
        "optimizer": model.optimizer.variables,
        "metrics": model.metrics_variables,
    }


def fixed_variables(model: Any) -> list[keras.Variable]:
    """The variables that training does not change."""
    trained = {id(v) for v in model.trainable_variables}
    fixed = [
        v
        for v in model.policy.weights
        # Vectors may be running statistics.
        if id(v) not in trained and len(v.shape) > 1
    ]
    if not model.reference.synced:
        fixed += model.reference.weights
    return fixed


def settings(
    model: Any, dataset: PreferenceDataset, callbacks: Iterable[Any]
) -> dict[str, Any]:
    """What must be the same when a run goes on, by name."""
    asked = [c.resume_settings() for c in callbacks if isinstance(c, AfterStep)]
    date = getattr(dataset.preprocessor, "written_date", None)
    return {
        "format": FORMAT,
        "date": None if date is None else str(date),
        "pairs": dataset.pairs.hash_token_ids(),
        "weights and margins": dataset.pairs.hash_extras(),
        "batch_size": dataset.batch_size,
        "seed": dataset.seed,
        "shuffle": dataset.shuffle,
        "steps_per_epoch": dataset.batches_per_epoch,
        "batches": [
            dataset.packing is not None,
            list(map(list, dataset.shapes)),
        ],
        "optimizer": _settings_of(model.optimizer),
        "loss": _settings_of(model.preference_loss),
        "reference": model.reference_choice,
        "sync": [settings for settings in asked if settings is not None],
        "disable_dropout": model.disable_dropout,
        **computed_with(model.policy),
        "gradient_accumulation_steps": model.gradient_accumulation_steps,
    }


def variable_shapes(model: Any) -> dict[str, Any]:
    """Shape and type of the variables that change, which must be the same."""
    return {
        group: [[list(v.shape), str(v.dtype)] for v in variables]
        for group, variables in changing_variables(model).items()
    }


def differences(
    found: dict[str, Any], now: dict[str, Any], inside: str = ""
) -> list[str]:
    """One phrase for each thing that is not the same, named by its path."""
    phrases = []
    for name in {**found, **now}:
        a, b = found.get(name), now.get(name)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            phrases += differences(a, b, f"{inside}{name}.")
        else:
            phrases.append(_difference(inside + name, a, b))
    return phrases


def remedies(phrases: Iterable[str]) -> str:
    """What to do about some of the differences, as sentences."""
    phrases = list(phrases)
    return "".join(
        f"{remedy} "
        for path, remedy in REMEDIES.items()
        if any(re.match(path, phrase) for phrase in phrases)
    )


def hash_fixed(model: Any) -> str:
    """Of the values that training does not change."""
    return hash_weights(fixed_variables(model))


def callback_states(callbacks: Iterable[Any]) -> list[list[Any]]:
    """(class name, what it counted) of every callback that counts."""
    states = []
    for callback in callbacks:
        name = type(callback).__name__
        if hasattr(callback, "get_state"):
            states.append([name, callback.get_state()])
            continue
        state = {
            key: _plain(getattr(callback, key))
            for key in _counted_by_keras(callback)
            if hasattr(callback, key)
        }
        if state:
            states.append([name, state])
    return states


def _counted_by_keras(callback: Any) -> list[str]:
    """What a callback counts as one of Keras' own, or a subclass of one."""
    classes = type(callback).__mro__
    return [key for c in classes for key in KERAS_CALLBACKS.get(c.__name__, ())]


def restore_callbacks(
    callbacks: Iterable[Any], states: list[list[Any]]
) -> None:
    """Give callbacks their counts back, by class name and order."""
    left = list(states)
    for callback in callbacks:
        name = type(callback).__name__
        state = next((s for s in left if s[0] == name), None)
        if state is None:
            continue
        left.remove(state)
        if hasattr(callback, "set_state"):
            callback.set_state(state[1])
        else:
            for key, value in state[1].items():
                setattr(callback, key, value)


def _difference(name: str, before: Any, now: Any) -> str:
    texts = [json.dumps(value) for value in (before, now)]
    if max(map(len, texts)) > 60:
        return f"{name} differs"
    return f"{name} was {texts[0]} and is {texts[1]}"


def _settings_of(item: Any) -> dict[str, Any]:
    """A serializable object's configuration, without names.

    Keras numbers them within a process: they are no settings.
    """
    return _plain(_without_names(keras.saving.serialize_keras_object(item)))


def _without_names(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_without_names(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "class_name" not in value or not isinstance(value.get("config"), dict):
        return {key: _without_names(item) for key, item in value.items()}
    name = value["class_name"]
    config = {
        key: _without_names(item)
        for key, item in value["config"].items()
        # A number type is its name.
        if key != "name" or name.endswith("DTypePolicy")
    }
    return {"class": name, **config}


def _plain(value: Any) -> Any:
    """The value as JSON reads it back."""
    return json.loads(json.dumps(value, default=_number))


def _number(value: Any) -> Any:
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return np.asarray(value).tolist()
    return repr(value)
