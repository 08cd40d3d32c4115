"""Several processes on localhost against one."""

import concurrent.futures
import json
import os
import signal
import socket
import sys
from itertools import chain
from subprocess import PIPE, Popen, TimeoutExpired

import jax
import numpy as np
import pytest
from conftest import (
    environment_of_devices,
    random_pairs,
    tiny_policy,
    values_of,
)

import keras_dpo
from keras_dpo.callbacks import training_backup
from keras_dpo.distribution import start_processes

SCRIPT = """
import json, pathlib, sys, time
import keras_dpo
mesh, directory, epochs = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
every, pause = sys.argv[4], float(sys.argv[5])
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
class Tell(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        print("step", batch, flush=True)
        time.sleep(pause)
history = model.fit(data, epochs=int(epochs), verbose=0, callbacks=[
    keras_dpo.callbacks.MetricsFile(directory / "metrics.jsonl", every=1),
    keras_dpo.callbacks.ReferenceSync(every=2, alpha=0.5), Tell(),
    keras_dpo.callbacks.TrainingBackup(directory / "backups", every=every)]
).history
keras_dpo.save_policy(policy, directory / "policy")
saved = keras_hub.models.Llama3CausalLM.from_preset(str(directory / "policy"))
rewards = model.predict(data, verbose=0)["reward_margin"]
stored = keras_dpo.DPOModel(policy, "precomputed",
    reference_cache=str(directory / f"reference-{epochs}"))
stored.compile()
print("RESULT" + json.dumps(dict(
    processes=jax.process_count(), devices=len(jax.devices()),
    losses=history["loss"], rewards=np.asarray(rewards).tolist(),
    evaluated=model.evaluate(data, verbose=0, return_dict=True)["loss"],
    stored=stored.evaluate(data, verbose=0, return_dict=True)["loss"],
    saved=[to_host(v.value).ravel().tolist() for v in saved.weights],
    weights=[to_host(v.value).ravel().tolist() for v in policy.weights])))
"""


def start(mesh, directory, processes=1, epochs=2, every=2, pause=0.0):
    directory.mkdir(exist_ok=True)
    options = map(str, (mesh, directory, epochs, every, pause))
    devices = 8 // processes if mesh != "one" else 1
    return launch(["-c", SCRIPT, *options], processes, devices)


def by_hand(port, index, processes):
    return {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
    }


def by_slurm(port, index, processes):
    """What `srun` sets; JAX makes the port of the job's number."""
    return {
        "SLURM_JOB_ID": str(port % 2**12),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(processes),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
    }


def launch(arguments, processes, devices, variables=by_hand):
    """Python processes that meet, each with so many devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for index in range(processes):
        environment = environment_of_devices(devices)
        if processes > 1:
            environment |= variables(port, index, processes)
        started.append(
            Popen(
                [sys.executable, *arguments],
                env=environment,
                stdout=PIPE,
                stderr=PIPE,
                text=True,
            )
        )
    return started


def outputs(started):
    """(status, output, errors) of each."""

    def read(process):
        try:
            return process.communicate(timeout=300)
        except TimeoutExpired:
            process.kill()
            return process.communicate()

    # At once: a process whose output nobody reads keeps the others waiting.
    with concurrent.futures.ThreadPoolExecutor() as readers:
        texts = list(readers.map(read, started))
    return [
        (process.returncode, *text)
        for process, text in zip(started, texts, strict=True)
    ]


def run(*arguments, **options):
    """Every process's result."""
    return results(start(*arguments, **options))


def results(started):
    found = []
    for status, out, err in outputs(started):
        assert status == 0, err[-3000:]
        line = next(x for x in out.splitlines() if x.startswith("RESULT"))
        found.append(json.loads(line.removeprefix("RESULT")))
    return found


# By hand: KERAS_DPO_PROCESSES=4, KERAS_DPO_MESH=data=8.
PROCESSES = int(os.environ.get("KERAS_DPO_PROCESSES", 2))
MESH = os.environ.get("KERAS_DPO_MESH", "data=4,model=2")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def one(root):
    """The result of one process with one device."""
    (result,) = run("one", root / "one")
    return result


@pytest.fixture(scope="module")
def many(root):
    """The results of several processes, eight devices in all."""
    return run(MESH, root / "many", PROCESSES)


READ = """
import json, sys
import keras_dpo
keras_dpo.distribution.start_processes()
import jax
from conftest import random_pairs
from keras_dpo.data import reading
reading.RECORDS_AT_ONCE = 8
rows = [{**row, "weight": 1 + i / 7} if i % 3 else row
        for i, row in enumerate(random_pairs(44))]
rows[5] = {**rows[5], "rejected_ids": rows[5]["chosen_ids"]}
rows[8] = {**rows[8], "rejected_ids": rows[8]["chosen_ids"]}
rows[9]["margin"] = 1.5
rows[:int(sys.argv[1])] = []
tokenized = []
tokenize = keras_dpo.DPOPreprocessor.tokenize
def counting(self, records, rows=None):
    if sys.argv[2] == "refused" and 31 in rows:
        raise ValueError("Row 31 is refused.")
    tokenized.extend(rows)
    return tokenize(self, records, rows)
keras_dpo.DPOPreprocessor.tokenize = counting
try:
    data = keras_dpo.PreferenceDataset(rows, batch_size=16, verbose=False)
    read = list(tokenized)
    stream = keras_dpo.data.PreferenceStream(
        rows, keras_dpo.DPOPreprocessor(None, 64, 32), batch_size=8,
        steps_per_epoch=4, verbose=False)
except ValueError as caught:
    print("RESULT" + json.dumps([tokenized, str(caught)]))
else:
    print("RESULT" + json.dumps([read, dict(
        stream=[stream[i]["completion_ids"].tolist() for i in range(9)
                if len(rows) > 8],
        report=data.report.lines(), rows=data.report.rows,
        records=data.records, example=data.report.example,
        ids=data.pairs.hash_token_ids(), extras=data.pairs.hash_extras(),
        keys=data.pairs.prompt_keys.tolist(),
        largest=data.pairs.largest_ids.tolist(),
        pairs=[[*pair[:5], pair.extras] for pair in data.pairs])]))
"""


@pytest.mark.parametrize(
    ("left_out", "kind", "pairs"),
    [
        pytest.param(0, "whole", 42, marks=pytest.mark.slow),
        (42, "whole", 2),
        pytest.param(0, "refused", 0, marks=pytest.mark.slow),
    ],
)
def test_each_process_tokenizes_its_share(left_out, kind, pairs):
    """And all hold what one process would; of 2 rows the third has none."""
    arguments = ["-c", READ, str(left_out), kind]
    ((_, one),) = results(launch(arguments, 1, 1))
    found = results(launch(arguments, 3, 1))
    assert all(result == one for _, result in found)
    reads = [read for read, _ in found]
    if kind != "whole":
        assert one.startswith("Row 31")
    else:
        assert len(one["pairs"]) == len(one["rows"]) == pairs
        assert sorted(chain(*reads)) == one["rows"]
        assert max(map(len, reads)) <= -(-pairs // 3) + 1


MEET = """
import json, sys
import keras_dpo
if sys.argv[1] == "met":
    import jax
    jax.distributed.initialize()
    keras_dpo.distribution.start_processes()
else:
    keras_dpo.distribution.start_processes(sys.argv[1])
import jax, keras
print("RESULT" + json.dumps([jax.process_index(), jax.process_count(),
                             float(keras.random.uniform((1,))[0])]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["SLURM", "met"])
def test_processes_meet_as_on_slurm(method):
    """Without a seed of their own they draw the same numbers."""
    found = results(launch(["-c", MEET, method], 2, 1, by_slurm))
    assert [result[:2] for result in found] == [[0, 2], [1, 2]]
    assert found[0][2] == found[1][2]


@pytest.mark.slow
def test_processes_with_other_rows_are_told():
    script = READ.replace("rows[9]", "rows[9 + jax.process_index()]")
    for _, error in results(launch(["-c", script, "0", "whole"], 2, 1)):
        assert "Processes 0 and 1 read other rows of the list" in error


def check_weights(found, expected, tolerance):
    for a, b in zip(found["weights"], expected["weights"], strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)


@pytest.mark.slow
def test_processes_equal_one(root, one, many):
    """Losses, weights after a sync, evaluate, predict, saving, precompute."""
    assert len(many) == PROCESSES
    for result in many:
        assert (result["processes"], result["devices"]) == (PROCESSES, 8)
        for name in ("losses", "rewards", "evaluated"):
            np.testing.assert_allclose(
                result[name], one[name], rtol=1e-5, atol=1e-5
            )
        check_weights(result, one, 1e-5)
        assert result["saved"] == result["weights"]
        # The policy against itself.
        assert result["stored"] == pytest.approx(np.log(2), rel=1e-5)
    # The first alone writes.
    lengths = [
        len((root / name / "metrics.jsonl").read_text().splitlines())
        for name in ("one", "many")
    ]
    assert lengths[0] == lengths[1]


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(root, one):
    """From one device to eight, in the middle; to 1e-6."""
    run("one", root / "moved", epochs=1)
    (found,) = run("data=4,model=2", root / "moved")
    assert found["devices"] == 8
    np.testing.assert_allclose(
        found["losses"], one["losses"], rtol=1e-6, atol=1e-6
    )
    check_weights(found, one, 1e-6)


@pytest.mark.slow
def test_one_is_told_to_end_and_all_go_on_with_the_same_bits(root, many):
    """SIGTERM to the last alone: all end with 75 after the same step."""
    started = start(MESH, root / "told", PROCESSES, every=100, pause=0.5)
    assert any(line.startswith("step") for line in started[-1].stdout)
    started[-1].send_signal(signal.SIGTERM)
    for status, _, err in outputs(started):
        assert status == 75, err[-3000:]
    assert run(MESH, root / "told", PROCESSES, every=100) == many


@pytest.mark.slow
def test_the_command_over_processes_equals_one(root):
    """`keras-dpo train` as a user starts it on every host."""
    keras_dpo.save_policy(tiny_policy(), root / "preset")
    lines = [json.dumps(pair) + "\n" for pair in random_pairs(20)]
    (root / "pairs.jsonl").write_text("".join(lines))

    def train(name, processes, devices, *more):
        command = f"""-m keras_dpo train --repo_id {root / "preset"}
            --dataset_name {root / "pairs.jsonl"} --model_name {name}
            --save_directory {root} --total_batch_size 4 --log_steps 1
            --num_train_epochs 1 --learning_rate 1e-3 --reference precomputed
            --reference_cache {root / name}-reference
            --num_sample_prompts 0""".split()
        ended = outputs(launch([*command, *more], processes, devices))
        assert [status for status, *_ in ended] == [0] * processes, ended
        texts = (root / name / "metrics.jsonl").read_text().splitlines()
        policy = keras_dpo.load_policy(str(root / name / "policy"))
        losses = [json.loads(text)["loss"] for text in texts]
        return losses, values_of(policy.weights), ended

    one = train("command_one", 1, 1)
    many = train("command_many", 2, 2, "--distributed", "auto")
    np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
    for a, b in zip(many[1], one[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    # The first alone prints.
    assert "Policy:" in many[2][0][1]
    assert "Policy:" not in many[2][1][1]


def test_processes_without_a_mesh_are_told(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    model = keras_dpo.DPOModel(tiny_policy())
    model.compile()
    with pytest.raises(ValueError, match=r'set_mesh\(\{"data": 1\}\)'):
        model.fit(random_pairs(4), verbose=0)


def test_a_directory_that_hosts_do_not_share(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        training_backup, "wait_for_processes", lambda place: None
    )
    with pytest.raises(ValueError, match="Only 1 of 2 processes"):
        training_backup.TrainingBackup(tmp_path)._open()


def test_a_time_becomes_steps(monkeypatch, tmp_path):
    """By the first process's pace; the step that compiles is left out."""
    seconds = iter(10.0 * i for i in range(100))
    monkeypatch.setattr(
        training_backup.time, "monotonic", lambda: next(seconds)
    )
    backup = training_backup.TrainingBackup(tmp_path, every="2 minutes")
    backup._begun_at = None
    for step in range(1, 13):
        backup.step = step
        if backup.every_steps is None:
            backup._agree_on_steps()
    assert backup.every_steps == 12


def test_incomplete_variables_are_named(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES, JAX_PROCESS_ID"):
        start_processes()
