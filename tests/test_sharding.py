"""Where variables go on a mesh, and families on eight devices against one."""

import json
import math
import os
import re
from collections import Counter

import keras
import numpy as np
import pytest
from conftest import on_eight_devices, tiny_policy

from keras_dpo import DPOConfig, DPOModel
from keras_dpo.distribution.sharding import MeshDistribution, parse_mesh

# In CI; `KERAS_DPO_ALL_FAMILIES=1` for all that run in rows.
CASES = ["Gemma3, sliding window", "Phi3"]
SCRIPT = """
import json, sys
import keras, jax, numpy as np
import keras_dpo
from conftest import random_pairs
from test_log_probs import make
import itertools
for case, kind in itertools.product(json.loads(sys.argv[1]), ("one", "mesh")):
    keras.distribution.set_distribution(None)
    if kind == "mesh":
        keras_dpo.distribution.set_mesh({"data": 4, "model": 2})
    policy = make(case)
    # Keras draws other numbers where a variable is sharded.
    random = np.random.default_rng(0)
    for v in policy.trainable_variables:
        noise = 0.2 * random.standard_normal(v.shape)
        v.assign(noise + (len(v.shape) == 1))
    model = keras_dpo.DPOModel(policy)
    model.compile(keras.optimizers.SGD(0.05))
    data = keras_dpo.PreferenceDataset(
        random_pairs(16, longest=20), batch_size=8, verbose=False)
    losses = model.fit(data, epochs=2, verbose=0).history["loss"]
    split = {str(a) for v in policy.weights
             for a in (getattr(v.value.sharding, "spec", None) or ()) if a}
    print("RESULT" + json.dumps(dict(
        case=case, kind=kind, losses=losses,
        devices=len(policy.weights[0].value.sharding.device_set),
        split=sorted(split),
        weights=[np.asarray(v.value).ravel().tolist()
                 for v in policy.trainable_variables])), flush=True)
"""


@pytest.mark.slow
def test_families_on_a_mesh_equal_one_device():
    """Losses and trained weights after four steps on data=4, model=2."""
    cases = CASES
    if os.environ.get("KERAS_DPO_ALL_FAMILIES"):
        from test_packed_backbone import CASES as cases
    found = {
        (result["case"], result["kind"]): result
        for result in on_eight_devices(SCRIPT, json.dumps(cases))
    }
    for case in cases:
        one, mesh = found[case, "one"], found[case, "mesh"]
        assert (one["devices"], mesh["devices"]) == (1, 8)
        assert mesh["split"] == ["data", "model"], case
        np.testing.assert_allclose(mesh["losses"], one["losses"], rtol=1e-5)
        for a, b in zip(mesh["weights"], one["weights"], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=case)


class OnEightDevices(MeshDistribution):
    """The rules alone, for a mesh that this process does not have."""

    def __init__(self, data, model, shard_parameters=True):
        self.shard_parameters = shard_parameters
        self.sizes = (data, model)

    @property
    def device_mesh(self):
        class Mesh:
            axis_names = ("data", "model")
            shape = self.sizes

        return Mesh


@pytest.mark.parametrize(
    ("path", "shape", "axes"),
    [
        (
            "transformer_layer_0/self_attention/query/kernel",
            (64, 8, 16),
            ("data", "model", None),
        ),
        (
            "decoder_block_3/attention/query/kernel",
            (8, 64, 16),
            ("model", "data", None),
        ),
        # One key head cannot be split over two devices.
        (
            "decoder_block_3/attention/key/kernel",
            (1, 64, 16),
            (None, "data", None),
        ),
        (
            "layer/self_attention/attention_output/kernel",
            (8, 16, 64),
            ("model", None, "data"),
        ),
        ("layer_1/mlp/down_proj/kernel", (128, 64), ("model", "data")),
        ("layer_1/feedforward_gate_dense/kernel", (64, 128), ("data", "model")),
        ("token_embedding/embeddings", (4096, 64), ("model", "data")),
        ("token_embedding/reverse_embeddings", (64, 4096), ("data", "model")),
        # 49,155 rows divide by neither: the other axis is split.
        ("token_embedding/embeddings", (49155, 64), (None, "data")),
        ("layer_norm/scale", (64,), (None,)),
        ("odd/kernel", (33, 65), (None, None)),
    ],
)
def test_rules(path, shape, axes):
    assert OnEightDevices(4, 2).axes_of(path, shape) == axes
    whole = OnEightDevices(4, 2, shard_parameters=False).axes_of(path, shape)
    assert whole == tuple(None if a == "data" else a for a in axes)


@pytest.mark.parametrize("text", ["data", "data=x", "data=4;model=2", ""])
def test_a_mesh_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="written data=4,model=2"):
        parse_mesh(text)


@pytest.mark.parametrize(
    ("mesh", "match"),
    [
        ({"data": 3}, "3 devices, and there are 1"),
        ({"rows": 1}, "has the axes data and model"),
        ({"data": 0}, "at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit(mesh, match):
    with pytest.raises(ValueError, match=match):
        MeshDistribution(mesh)


def test_a_distribution_set_too_late(monkeypatch):
    policy = tiny_policy()

    class Device:
        flat = ("a", "b")

    class Distribution:
        class device_mesh:
            class backend_mesh:
                devices = Device

    monkeypatch.setattr(
        keras.distribution, "distribution", lambda: Distribution
    )
    with pytest.raises(ValueError, match="set after the policy was built"):
        DPOModel(policy)


def test_config_refuses_what_has_no_effect():
    with pytest.raises(ValueError, match="without a mesh"):
        DPOConfig(shard_parameters=False)
    with pytest.raises(ValueError, match="written data=4,model=2"):
        DPOConfig(mesh="4x2")


COLLECTIVES = """
import json, re, sys
import keras_dpo
keras_dpo.distribution.set_mesh(
    "data=8", shard_parameters=sys.argv[1] == "sharded")
import jax, keras
from conftest import random_pairs, tiny_policy
from keras_dpo.training.memory import _shapes, longest_batch
model = keras_dpo.DPOModel(tiny_policy(tied=False), "precomputed")
model.compile(keras.optimizers.Adam(1e-2))
data = keras_dpo.PreferenceDataset(
    random_pairs(16), batch_size=16, verbose=False)
batch = longest_batch(data.packed(model._packing(data, 1)))
batch["reference_log_probs"] = 0.0 * batch["completion_ids"].astype("float32")
state = [_shapes(group) for group in (model.trainable_variables,
    model.non_trainable_variables, model.optimizer.variables,
    model.metrics_variables)]
text = jax.jit(model.train_step).lower(tuple(state), batch).compile().as_text()
found = re.findall(r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|"
    r"collective-permute)(?:-start)?[(]", text)
split = sum(v.value.sharding.shard_shape(v.shape) != tuple(v.shape)
    for v in model.policy.trainable_variables)
print("RESULT" + json.dumps([found, split,
    len(model.policy.trainable_variables), batch["row_ids"].size]))
"""


@pytest.mark.parametrize("kind", ["whole", "sharded"])
@pytest.mark.slow
def test_a_step_holds_no_collective_it_does_not_need(kind):
    """Whole copies: gradients and means are summed, nothing else moves.

    Fully sharded: kernels are gathered, and tokens find their embedding; no
    state of a token goes to a device that does not need it.
    """
    ((found, split, variables, tokens),) = on_eight_devices(COLLECTIVES, kind)
    counts, largest = Counter(), Counter()
    for result, collective in found:
        shapes = re.findall(r"\w+\[([\d,]*)\]", result)
        # The parts of an all-to-all are one; all-reduces are combined.
        counts[collective] += len(shapes) if collective == "all-reduce" else 1
        for shape in shapes:
            size = math.prod(int(n) for n in shape.split(",") if n)
            largest[collective] = max(largest[collective], size)
    assert "collective-permute" not in counts
    kernel = 64 * 32
    assert largest["all-reduce"] <= kernel
    if kind == "whole":
        assert set(counts) == {"all-reduce"}
        # A gradient each, and the means of the metrics.
        assert counts["all-reduce"] <= variables + 20
        return
    assert split > 10
    assert counts["all-gather"] <= 3 * split + 2
    assert largest["all-gather"] <= max(kernel, tokens)
    # There and back, for the embedding.
    assert counts["all-to-all"] <= 2
