"""The state a run needs to resume as if it had never stopped.

Variables by order (their paths differ between processes), the position in the
data, callback counters, and the settings that must match to resume.
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

# Incremented when states of earlier versions become unreadable.
FORMAT = 3
# Counters of Keras' own callbacks, as opposed to their settings.
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
# Advice for settings that differ, keyed by a regex for the start of the path.
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
    """Position of a run: `batch` steps of `epoch` are done."""

    epoch: int
    batch: int


def changing_variables(model: Any) -> dict[str, list[keras.Variable]]:
    """The variables that training changes, by group.

    Frozen kernels and a reference that was never synced are left out: they
    still hold their initial values, which a hash verifies.
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
        # Frozen vectors may be running statistics.
        if id(v) not in trained and len(v.shape) > 1
    ]
    if not model.reference.synced:
        fixed += model.reference.weights
    return fixed


def settings(
    model: Any, dataset: PreferenceDataset, callbacks: Iterable[Any]
) -> dict[str, Any]:
    """Settings that must match for a run to resume, by name."""
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
    """Shapes and dtypes of the changing variables; they must match, too."""
    return {
        group: [[list(v.shape), str(v.dtype)] for v in variables]
        for group, variables in changing_variables(model).items()
    }


def differences(
    found: dict[str, Any], now: dict[str, Any], inside: str = ""
) -> list[str]:
    """One phrase per setting that differs, named by its path."""
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
    """Advice on how to resolve known differences, as sentences."""
    phrases = list(phrases)
    return "".join(
        f"{remedy} "
        for path, remedy in REMEDIES.items()
        if any(re.match(path, phrase) for phrase in phrases)
    )


def hash_fixed(model: Any) -> str:
    """Hash of the variables that training does not change."""
    return hash_weights(fixed_variables(model))


def callback_states(callbacks: Iterable[Any]) -> list[list[Any]]:
    """(class name, state) of every callback that has state."""
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
    """Counters of a callback that is, or inherits from, one of Keras' own."""
    classes = type(callback).__mro__
    return [key for c in classes for key in KERAS_CALLBACKS.get(c.__name__, ())]


def restore_callbacks(
    callbacks: Iterable[Any], states: list[list[Any]]
) -> None:
    """Restore the state of callbacks, matched by class name and order."""
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
    """The configuration of a serializable object, without names.

    Keras numbers names per process, so they are not settings.
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
        # A dtype policy is identified by its name.
        if key != "name" or name.endswith("DTypePolicy")
    }
    return {"class": name, **config}


def _plain(value: Any) -> Any:
    """The value after a round trip through JSON."""
    return json.loads(json.dumps(value, default=_number))


def _number(value: Any) -> Any:
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return np.asarray(value).tolist()
    return repr(value)
