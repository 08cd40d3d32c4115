"""Reference log-probs on disk."""

import gc
import json
import signal
import subprocess
import sys
import time
import weakref

import keras
import numpy as np
import pytest
from conftest import environment, random_pairs, tiny_policy

from keras_dpo import DPOModel, PreferenceDataset
from keras_dpo.references import store as store_module
from keras_dpo.references.store import ReferenceStore


def compiled(policy, **options):
    model = DPOModel(policy, **options)
    model.compile()
    return model


def data(count=30):
    return PreferenceDataset(random_pairs(count), batch_size=4, verbose=False)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(store_module, "PAIRS_PER_PART", 8)


def test_second_run_reads_what_the_first_wrote(small_parts, tmp_path):
    records = random_pairs(30)
    model = compiled(
        tiny_policy(),
        reference="precomputed",
        reference_cache=str(tmp_path),
    )
    directory = model.precompute(records, batch_size=4)
    parts = sorted(directory.glob("part-*"))
    assert [p.name for p in parts] == [
        f"part-{n:06d}.float32" for n in range(4)
    ]
    before = [p.stat().st_mtime_ns for p in parts]
    again = compiled(
        tiny_policy(),
        reference="precomputed",
        reference_cache=str(tmp_path),
    )
    scores = again.predict(records, batch_size=4, verbose=0)
    assert [p.stat().st_mtime_ns for p in parts] == before
    online = compiled(tiny_policy()).predict(records, batch_size=4, verbose=0)
    for name in ("reference_chosen_log_prob", "reference_rejected_log_prob"):
        np.testing.assert_allclose(scores[name], online[name], atol=1e-5)


def test_a_stale_store_is_refused_by_name(tmp_path):
    records = random_pairs(6)
    options = {
        "precompute_reference": True,
        "reference_cache": str(tmp_path),
    }
    compiled(tiny_policy(), **options).precompute(records)
    with pytest.raises(ValueError, match="with other reference weights"):
        compiled(tiny_policy(seed=9), **options).precompute(records)
    # Other pairs are another store; both are kept.
    compiled(tiny_policy(), **options).precompute(records[:3])
    assert len(list(tmp_path.glob("reference-*"))) == 2


def test_a_damaged_part_is_told(small_parts, tmp_path):
    pairs = data().pairs
    store = ReferenceStore(tmp_path, pairs, {})
    longest = max(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    zeros = np.zeros((2, longest), "float32")
    store.fill(lambda n: ((i, zeros) for i in range(len(store.indices(n)))))
    part = store.directory / "part-000001.float32"
    part.write_bytes(part.read_bytes()[:-4])
    with pytest.raises(ValueError, match="part-000001.* is damaged"):
        ReferenceStore(tmp_path, pairs, {})[9]


def test_log_probs_come_back_as_they_went_in(small_parts, tmp_path):
    pairs = data().pairs
    random = np.random.default_rng(0)
    longest = max(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    given = random.standard_normal((len(pairs), 2, longest)).astype("float32")
    store = ReferenceStore(tmp_path, pairs, {})
    store.fill(lambda n: ((i % 8, given[i]) for i in store.indices(n)[::-1]))
    again = ReferenceStore(tmp_path, pairs, {})
    for i, pair in enumerate(pairs):
        found = again[i]
        for side, ids in enumerate((pair.chosen_ids, pair.rejected_ids)):
            np.testing.assert_array_equal(
                found[side, : len(ids)], given[i, side, : len(ids)]
            )
            assert not found[side, len(ids) :].any()


KILLED = """
import sys, time
from conftest import random_pairs
from keras_dpo import PreferenceDataset
from keras_dpo.references import store as reference_store
reference_store.PAIRS_PER_PART = 4
import numpy as np
pairs = PreferenceDataset(random_pairs(40), verbose=False).pairs
store = reference_store.ReferenceStore({directory!r}, pairs, {{}})
def compute(n):
    for place in range(len(store.indices(n))):
        time.sleep(0.01)
        yield place, np.full((2, 99), n, "float32")
print("ready", flush=True)
store.fill(compute)
print("whole", flush=True)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_next_part(tmp_path):
    script = KILLED.format(directory=str(tmp_path))
    command = [sys.executable, "-c", script]
    done, written = "", 0
    for _ in range(8):
        process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        time.sleep(0.13)
        process.send_signal(signal.SIGKILL)
        done = process.communicate()[0]
        now = len(list(tmp_path.glob("*/part-*.float32")))
        assert now >= written
        written = now
        if "whole" in done:
            break
    finished = subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=True
    )
    assert "whole" in finished.stdout
    assert written > 0
    pairs = PreferenceDataset(random_pairs(40), verbose=False).pairs
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(store_module, "PAIRS_PER_PART", 4)
        store = ReferenceStore(tmp_path, pairs, {})
        for i, pair in enumerate(pairs):
            ids = pair.chosen_ids
            np.testing.assert_array_equal(store[i][0, : len(ids)], i // 4)


def test_the_reference_leaves_memory():
    policy, reference = tiny_policy(), tiny_policy(seed=5)
    # One weight of it, as the device holds it.
    kept = weakref.ref(reference.backbone.token_embedding)
    model = compiled(policy, reference=reference, precompute_reference=True)
    del reference
    before = len(model.variables)
    model.fit(data(), verbose=0)
    gc.collect()
    assert kept() is None
    assert len(model.variables) < before
    assert model.reference.describe().startswith("precomputed")


def test_content_names_what_it_was_computed_from(tmp_path):
    model = compiled(
        tiny_policy(), reference="precomputed", reference_cache=str(tmp_path)
    )
    directory = model.precompute(random_pairs(3))
    content = json.loads((directory / "content.json").read_text())
    assert set(content) == {
        "reference weights",
        "configuration",
        "number types",
        "token_ids",
        "layout",
    }


FILLED_BY_TWO = """
import sys, time
from conftest import random_pairs
from keras_dpo import PreferenceDataset
from keras_dpo.references import store as reference_store
reference_store.PAIRS_PER_PART = 4
import numpy as np
pairs = PreferenceDataset(random_pairs(40), verbose=False).pairs
store = reference_store.ReferenceStore({directory!r}, pairs, {{}})
def compute(n):
    for place in range(len(store.indices(n))):
        time.sleep(0.02)
        yield place, np.full((2, 99), n, "float32")
    print("computed", n, flush=True)
print("ready", flush=True)
sys.stdin.readline()
store.fill(compute)
print("whole", store[39][0, 0], flush=True)
"""


def test_two_runs_fill_one_store_part_by_part(tmp_path):
    """Neither fails, and no part is computed twice."""
    script = FILLED_BY_TWO.format(directory=str(tmp_path))
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    computed = []
    for run in runs:
        out, err = run.communicate(timeout=300)
        assert run.returncode == 0, err[-2000:]
        assert "whole 9.0" in out
        computed += [x for x in out.splitlines() if x.startswith("computed")]
    assert sorted(computed) == sorted(f"computed {n}" for n in range(10))
    (store,) = tmp_path.glob("reference-*")
    names = {p.name for p in store.iterdir()}
    assert names == {
        "content.json",
        *(f"part-{n:06d}.float32" for n in range(10)),
    }


def test_number_types_lie_side_by_side(tmp_path):
    """Also where the directory was named; other weights do not."""
    records = random_pairs(6)
    options = {"precompute_reference": True, "reference_cache": str(tmp_path)}
    stores = {
        dtype: compiled(tiny_policy(dtype=dtype), **options).precompute(records)
        for dtype in ("float32", "mixed_bfloat16")
    }
    assert stores["float32"] != stores["mixed_bfloat16"]
    again = compiled(tiny_policy(), **options).precompute(records)
    assert again == stores["float32"]
    with pytest.raises(ValueError, match="with other reference weights"):
        compiled(tiny_policy(seed=9), **options).precompute(records)


@pytest.mark.slow
def test_what_a_model_computes_with_is_part_of_its_store(tmp_path):
    """The same weights under another RMS epsilon."""
    import keras_hub

    def model(epsilon):
        keras.utils.set_random_seed(0)
        backbone = keras_hub.models.Llama3Backbone(
            vocabulary_size=64,
            num_layers=1,
            num_query_heads=2,
            num_key_value_heads=1,
            hidden_dim=16,
            intermediate_dim=16,
            layer_norm_epsilon=epsilon,
        )
        policy = keras_hub.models.Llama3CausalLM(backbone, None)
        return compiled(policy, reference="precomputed")

    records = random_pairs(6)
    stores = [model(e).precompute(records) for e in (1e-6, 1e-1, 1e-6)]
    assert stores[0] != stores[1]
    assert stores[0] == stores[2]
    rewards = model(1e-1).predict(records, verbose=0)["chosen_reward"]
    np.testing.assert_allclose(rewards, 0, atol=1e-5)


@pytest.mark.slow
def test_adapters_that_add_nothing_share_the_store_of_their_base():
    """`precompute` without LoRA, `train` with it."""
    records = random_pairs(6)
    base = compiled(tiny_policy(), reference="precomputed")
    directory = base.precompute(records)
    policy = tiny_policy()
    policy.backbone.enable_lora(4)
    adapted = compiled(policy, reference="precomputed")
    assert adapted.precompute(records) == directory
    expected = base.predict(records, verbose=0)["reference_chosen_log_prob"]
    found = adapted.predict(records, verbose=0)["reference_chosen_log_prob"]
    np.testing.assert_array_equal(found, expected)
    for variable in policy.trainable_variables:
        variable.assign(0.1 * np.ones(variable.shape))
    trained = compiled(policy, reference="precomputed")
    assert trained.precompute(records) != directory
