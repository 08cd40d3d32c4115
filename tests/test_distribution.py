"""8 simulated devices against one, each in a process of its own."""

import functools
import json

import numpy as np
import pytest
from conftest import on_eight_devices

JOBS = [
    (kind, lora, "sigmoid")
    for lora, kinds in (
        ("full", ("one", "data", "model", "fsdp", "mesh", "whole")),
        ("lora", ("one", "mesh")),
    )
    for kind in kinds
] + [("one", "full", "aot"), ("data", "full", "aot")]
SCRIPT = """
import json, sys, tempfile
import keras, jax, numpy as np
import keras_dpo, keras_hub
from conftest import random_pairs, tiny_policy

devices = keras.distribution.list_devices()
assert len(devices) == 8

def distribute(kind):
    keras.distribution.set_distribution(None)
    if kind == "data":
        keras.distribution.set_distribution(
            keras.distribution.DataParallel(devices=devices))
    elif kind == "model":
        mesh = keras.distribution.DeviceMesh(
            (2, 4), ("batch", "model"), devices)
        layout = keras_hub.models.Llama3Backbone.get_layout_map(
            mesh, model_parallel_dim_name="model",
            data_parallel_dim_name="batch")
        keras.distribution.set_distribution(keras.distribution.ModelParallel(
            layout_map=layout, batch_dim_name="batch"))
    elif kind != "one":
        keras_dpo.distribution.set_mesh(
            {"data": 4, "model": 2} if kind == "mesh" else "data=8",
            shard_parameters=kind != "whole")

def run(kind, lora, loss):
    distribute(kind)
    policy = tiny_policy(layers=1)
    if lora == "lora":
        keras.utils.set_random_seed(1)
        policy.backbone.enable_lora(2)
        for v in policy.trainable_variables:
            v.assign(0.1 * np.random.default_rng(2).standard_normal(v.shape))
    model = keras_dpo.DPOModel(policy)
    model.compile(optimizer=keras.optimizers.Adam(5e-3), loss=loss,
                  gradient_accumulation_steps=2)
    data = keras_dpo.PreferenceDataset(random_pairs(78), batch_size=16,
                                       verbose=False, buckets=[32])
    losses = []
    class Keep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            losses.append(float(logs["loss"]))
    model.fit(data, verbose=0, callbacks=[
        Keep(), keras_dpo.callbacks.ReferenceSync(every=2, alpha=0.5)])
    # Compiled for one mesh of each kind.
    scores, evaluated = {"reward_margin": []}, 0.0
    if lora == "full" and kind in ("one", "data", "mesh"):
        scores = model.predict(data, verbose=0)
        evaluated = model.evaluate(data, verbose=0, return_dict=True)["loss"]
    stored, answers = 0.0, []
    if lora == "full" and kind in ("one", "mesh"):
        again = keras_dpo.DPOModel(policy, "precomputed",
                                   reference_cache=tempfile.mkdtemp())
        again.compile()
        stored = again.evaluate(data, verbose=0, return_dict=True)["loss"]
        prompts = np.random.default_rng(3).integers(3, 64, (8, 12))
        answers = policy.generate(dict(
            token_ids=prompts.astype("int32"),
            padding_mask=(np.arange(12) < 5) * np.ones((8, 1), "int32")),
            stop_token_ids=None)["token_ids"].tolist()
    shard = lambda vs: [str(getattr(v.value.sharding, "spec", None))
                        for v in vs]
    large = lambda vs: [v.value for v in vs if v.value.size >= 1024]
    local = lambda vs: sum(
        v.addressable_shards[0].data.nbytes for v in large(vs))
    size = lambda vs: sum(v.nbytes for v in large(vs))
    parts = dict(policy=policy.trainable_variables,
                 snapshot=model.reference.snapshot,
                 optimizer=model.optimizer.variables)
    return dict(
        share={name: local(vs) / size(vs)
               for name, vs in parts.items() if large(vs)},
        devices=len(policy.weights[0].value.sharding.device_set),
        losses=losses,
        evaluated=evaluated,
        stored=stored,
        answers=answers,
        margins=[float(x) for x in scores["reward_margin"]],
        weights=[np.asarray(v.value).ravel().tolist()
                 for v in policy.weights],
        snapshot=[np.asarray(v.value).ravel().tolist()
                  for v in model.reference.snapshot],
        policy_sharding=shard(model.trainable_variables),
        snapshot_sharding=shard(model.reference.snapshot))

for job in json.loads(sys.argv[1]):
    print("RESULT" + json.dumps([job, run(*job)]), flush=True)
"""


@functools.cache
def results():
    found = on_eight_devices(SCRIPT, json.dumps(JOBS))
    return {tuple(job): result for job, result in found}


def run(kind, lora="full", loss="sigmoid"):
    return results()[kind, lora, loss]


def assert_equal(found, expected):
    assert found["devices"] == 8
    assert expected["devices"] == 1
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5)
    assert len(found["losses"]) == 5
    if found["margins"]:
        np.testing.assert_allclose(
            found["margins"], expected["margins"], atol=1e-4
        )
        assert found["evaluated"] == pytest.approx(
            expected["evaluated"], rel=1e-5
        )
    for name in ("weights", "snapshot"):
        for a, b in zip(found[name], expected[name], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert found["snapshot_sharding"] == found["policy_sharding"]


@pytest.mark.parametrize("kind", ["data", "model"])
@pytest.mark.slow
def test_meshes_equal_one_device(kind):
    """Losses, rewards, policy and synced reference after five steps."""
    found = run(kind)
    assert_equal(found, run("one"))
    assert found["margins"] or kind == "model"
    if kind == "model":
        assert any("model" in spec for spec in found["snapshot_sharding"])


@pytest.mark.parametrize(
    ("kind", "lora"),
    [("fsdp", "full"), ("mesh", "full"), ("mesh", "lora"), ("whole", "full")],
)
@pytest.mark.slow
def test_our_meshes_equal_one_device(kind, lora):
    """And hold, fully sharded, an eighth of the bytes on each device."""
    found = run(kind, lora)
    assert_equal(found, run("one", lora))
    assert found["margins"] or (kind, lora) != ("mesh", "full")
    if (kind, lora) == ("mesh", "full"):
        # The policy against what is stored of itself, and its greedy answers.
        assert found["stored"] == pytest.approx(np.log(2), rel=1e-6)
        assert found["answers"] == run("one")["answers"]
        assert np.shape(found["answers"]) == (8, 12)
    if lora == "full" and kind == "whole":
        assert set(found["share"].values()) == {1.0}
    elif lora == "full":
        assert set(found["share"].values()) == {1 / 8}


@pytest.mark.slow
def test_a_loss_that_couples_pairs_sees_the_global_batch():
    assert_equal(run("data", loss="aot"), run("one", loss="aot"))


def test_batch_that_does_not_divide_is_told(monkeypatch):
    from conftest import random_pairs, tiny_policy

    from keras_dpo import DPOModel
    from keras_dpo.training import checks

    monkeypatch.setattr(checks, "data_parallel_size", lambda: 8)
    model = DPOModel(tiny_policy())
    model.compile()
    with pytest.raises(ValueError, match="Use a multiple of 8"):
        model.fit(random_pairs(4), batch_size=4, verbose=0)
