"""Every fast path, on and off, in whole training runs."""

import functools
import logging

import keras
import numpy as np
import pytest
from conftest import random_pairs, tiny_policy, values_of

import keras_dpo
from keras_dpo import DPOModel, Execution, losses
from keras_dpo.training.preparation import in_rows, view_of

PLAIN = {"execution": Execution(attention="keras", split_head=False)}
PATHS = {
    name: {"execution": execution}
    for name, execution in {
        "default": Execution(),
        "packing off": Execution(packing=False),
        "prompt sharing off": Execution(prompt_sharing=False),
        "fused attention": Execution(attention="fused"),
        "layers computed again": Execution(remat="layers"),
        "split head on padded sequences": Execution(attention="keras"),
    }.items()
}


def train(
    options,
    loss="sigmoid",
    lora=False,
    metrics=None,
    whole=True,
    **compile_options,
):
    """Two epochs; logs, predictions and weights.

    Not `whole`: of a smaller model, without validation and predictions.
    """
    policy = tiny_policy(layers=2 if whole else 1)
    if lora:
        keras.utils.set_random_seed(1)
        policy.backbone.enable_lora(2)
    model = DPOModel(policy, **options)
    model.compile(
        keras.optimizers.SGD(0.05),
        loss=loss,
        metrics=metrics,
        **compile_options,
    )
    # One batch a step, so that the order does not matter.
    pairs = random_pairs(12, longest=40)
    history = model.fit(
        pairs,
        batch_size=12,
        epochs=2,
        verbose=0,
        validation_data=pairs[:5] if whole else None,
        validation_batch_size=5,
        callbacks=model_callbacks(options),
    ).history
    scores = model.predict(pairs, batch_size=5, verbose=0) if whole else {}
    return history, scores, values_of(policy.trainable_variables)


@functools.cache
def plain_run(whole):
    return train(PLAIN, whole=whole)


def model_callbacks(options):
    if options.get("precompute_reference"):
        return []
    return [keras_dpo.callbacks.ReferenceSync(every=2, alpha=0.5)]


def assert_same(found, expected):
    for name, values in expected[0].items():
        if "accuracy" in name and "token" not in name:
            # At step 0 margins are rounding noise, or ties.
            continue
        np.testing.assert_allclose(
            found[0][name], values, rtol=1e-5, atol=1e-5, err_msg=name
        )
    for name, values in expected[1].items():
        np.testing.assert_allclose(
            found[1][name], values, atol=2e-5, err_msg=name
        )
    for a, b in zip(found[2], expected[2], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("path", list(PATHS))
@pytest.mark.slow
def test_a_run_equals_the_plain_path(path):
    """Losses, metrics and weights, with a sync.

    For the default path validation and predictions, too.
    """
    whole = path == "default"
    assert_same(train(PATHS[path], whole=whole), plain_run(whole))


@pytest.mark.parametrize(
    "options",
    [
        {"lora": True},
        {"gradient_accumulation_steps": 3},
        {"loss": "aot", "gradient_accumulation_steps": 1},
        {"loss": {"sigmoid": 1.0, "sft": 0.2}},
        {"loss": losses.Sigmoid(ld_alpha=0.5)},
        {"loss": losses.Sigmoid(wpo=True)},
        {"loss": losses.IPO(beta=0.5)},
        {
            "metrics": [
                "chosen_logit",
                "rejected_logit",
                "entropy",
                "token_accuracy",
                "kl",
                "chosen_length",
            ]
        },
    ],
    ids=lambda o: str(next(iter(o.values())))[:24],
)
@pytest.mark.slow
def test_options_work_on_fast_paths(options):
    fast = train({}, whole=False, **options)
    assert_same(fast, train(PLAIN, whole=False, **options))


@pytest.mark.slow
def test_stored_reference_on_fast_paths():
    """What is stored equals what runs online, for train and validation."""
    online = train({"reference": tiny_policy(seed=4)})
    stored = train(
        {"reference": tiny_policy(seed=4), "precompute_reference": True}
    )
    plain = train(
        {
            "reference": tiny_policy(seed=4),
            "precompute_reference": True,
            **PLAIN,
        }
    )
    assert_same(stored, plain)
    # Without the sync of `online` the first step is the same.
    assert stored[0]["loss"][0] == pytest.approx(online[0]["loss"][0], rel=1e-5)


@pytest.mark.slow
def test_fast_paths_are_the_default_and_said(caplog):
    caplog.set_level(logging.INFO, "keras_dpo")
    model = DPOModel(tiny_policy())
    assert model.execution.in_rows
    assert model.execution.packing
    assert model.execution.prompt_sharing
    model.compile()
    keras.config.disable_interactive_logging()
    model.fit(random_pairs(4), batch_size=2, verbose=1)
    assert "prompts once per pair" in caplog.text


def test_what_cannot_be_is_told():
    plain = keras.Sequential(
        [keras.Input((None,), dtype="int32"), keras.layers.Embedding(64, 64)]
    )
    model = DPOModel(plain)
    assert not model.execution.in_rows
    assert "not among the families" in model.execution.notes[0]
    with pytest.raises(ValueError, match="packing.*needs packed rows"):
        DPOModel(plain, execution=Execution(packing=True))
    with pytest.raises(ValueError, match="dropout"):
        DPOModel(
            tiny_policy(dropout=0.1),
            disable_dropout=False,
            execution=Execution(prompt_sharing=True),
        )
    assert not DPOModel(
        tiny_policy(dropout=0.1), disable_dropout=False
    ).execution.in_rows
    for mistake in (
        {"attention": "flash"},
        {"packing": "yes"},
        {"remat": True},
        {"remat": "layers", "split_head": False},
        {"attention": "keras", "packing": True},
    ):
        with pytest.raises(ValueError, match="Received"):
            DPOModel(tiny_policy(), execution=Execution(**mistake))
    for mistake in (
        {"reference": None, "precompute_reference": True},
        {"reference_cache": "somewhere"},
    ):
        with pytest.raises(ValueError, match="Received"):
            DPOModel(tiny_policy(), **mistake)


@pytest.mark.slow
def test_layers_are_computed_again_where_memory_is_short(monkeypatch):
    records = random_pairs(4)
    for free, expected in ((1e12, False), (1e4, True)):
        monkeypatch.setattr(
            keras_dpo.training.memory, "free_memory", lambda f=free: f
        )
        model = DPOModel(tiny_policy())
        model.compile()
        model.fit(records, batch_size=4, verbose=0)
        assert model.execution.rematerializes is expected


@pytest.mark.slow
def test_rows_compile_once_per_length():
    data = keras_dpo.PreferenceDataset(
        random_pairs(60, longest=80), batch_size=4, verbose=False
    )
    model = DPOModel(tiny_policy())
    model.compile()
    traces = []
    plain = model.train_step

    def counted(state, batch):
        traces.append(batch["row_ids"].shape)
        return plain(state, batch)

    model.train_step = counted
    model.fit(data, epochs=3, verbose=0)
    prepared = in_rows(model, view_of(model, data), epochs=3)
    assert len(traces) == len(set(traces)) == len(prepared.packing.lengths)


def test_config_keeps_the_choices():
    execution = Execution(packing=False, remat="layers")
    model = DPOModel(tiny_policy(), execution=execution)
    again = DPOModel.from_config(model.get_config())
    assert again.execution == model.execution
    assert not again.execution.packing
    assert again.execution.rematerializes
