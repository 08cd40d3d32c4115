"""Several processes on localhost against one."""

import concurrent.futures
import json
import os
import socket
import sys
from subprocess import PIPE, Popen

import numpy as np
import pytest
from conftest import ROOT

from keras_dpo.distribution import start_processes

SCRIPT = """
import json, pathlib, sys
import keras_dpo
mesh, directory, epochs = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
if mesh != "one":
    keras_dpo.distribution.start_processes()
    keras_dpo.distribution.set_mesh(mesh)
import jax, keras, keras_hub, numpy as np
from conftest import random_pairs
from keras_dpo.distribution import to_host
policy = keras_hub.models.Llama3CausalLM(keras_hub.models.Llama3Backbone(
    vocabulary_size=64, num_layers=2, num_query_heads=4, hidden_dim=32,
    num_key_value_heads=2, intermediate_dim=64), preprocessor=None)
random = np.random.default_rng(0)
for v in policy.trainable_variables:
    v.assign(0.2 * random.standard_normal(v.shape) + (len(v.shape) == 1))
model = keras_dpo.DPOModel(policy)
model.compile(keras.optimizers.SGD(0.1), gradient_accumulation_steps=2)
data = keras_dpo.PreferenceDataset(
    random_pairs(44), batch_size=16, verbose=False)
callbacks = [
    keras_dpo.callbacks.MetricsFile(directory / "metrics.jsonl", every=1),
    keras_dpo.callbacks.ReferenceSync(every=2, alpha=0.5)]
if jax.process_count() == 1:
    callbacks.append(keras_dpo.callbacks.TrainingBackup(
        directory / "backups", every=2))
history = model.fit(
    data, epochs=int(epochs), verbose=0, callbacks=callbacks).history
print("RESULT" + json.dumps(dict(
    processes=jax.process_count(), devices=len(jax.devices()),
    losses=history["loss"],
    evaluated=model.evaluate(data, verbose=0, return_dict=True)["loss"],
    weights=[to_host(v.value).ravel().tolist() for v in policy.weights])))
"""


def run(mesh, directory, processes=1, epochs=2):
    """Every process's result."""
    directory.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    count = 8 // processes if mesh != "one" else 1
    started = []
    for index in range(processes):
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
        }
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        started.append(
            Popen(
                [sys.executable, "-c", SCRIPT, mesh, directory, str(epochs)],
                env=environment,
                stdout=PIPE,
                stderr=PIPE,
                text=True,
            )
        )
    results = []
    # At once: a process whose output nobody reads keeps the others waiting.
    with concurrent.futures.ThreadPoolExecutor() as readers:
        outputs = list(readers.map(Popen.communicate, started))
    for process, (out, err) in zip(started, outputs, strict=True):
        assert process.returncode == 0, err[-3000:]
        line = next(x for x in out.splitlines() if x.startswith("RESULT"))
        results.append(json.loads(line.removeprefix("RESULT")))
    return results


def test_processes_equal_one(tmp_path):
    """By hand: KERAS_DPO_PROCESSES=4, KERAS_DPO_MESH=data=8."""
    number = int(os.environ.get("KERAS_DPO_PROCESSES", 2))
    mesh = os.environ.get("KERAS_DPO_MESH", "data=4,model=2")
    (expected,) = run("one", tmp_path / "one")
    found = run(mesh, tmp_path / "many", number)
    assert len(found) == number
    for result in found:
        assert (result["processes"], result["devices"]) == (number, 8)
        np.testing.assert_allclose(
            result["losses"], expected["losses"], rtol=1e-5
        )
        assert result["evaluated"] == pytest.approx(
            expected["evaluated"], rel=1e-5
        )
        for a, b in zip(result["weights"], expected["weights"], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    # The first alone writes.
    one, many = (
        (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        for name in ("one", "many")
    )
    assert len(one) == len(many)


def test_a_run_goes_on_on_another_mesh(tmp_path):
    """From one device to eight, in the middle; to 1e-6."""
    (expected,) = run("one", tmp_path / "one")
    run("one", tmp_path / "moved", epochs=1)
    (found,) = run("data=4,model=2", tmp_path / "moved")
    assert found["devices"] == 8
    np.testing.assert_allclose(
        found["losses"], expected["losses"], rtol=1e-6, atol=1e-6
    )
    for a, b in zip(found["weights"], expected["weights"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_incomplete_variables_are_named(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES, JAX_PROCESS_ID"):
        start_processes()
