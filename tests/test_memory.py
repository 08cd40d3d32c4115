"""What a step takes, predicted; and what is kept between runs."""

import json
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import ROOT, environment, random_pairs, tiny_policy

from keras_dpo import DPOConfig, DPOModel, Execution
from keras_dpo.runs.plan import plan
from keras_dpo.training.memory import extrapolate, kept_by_layers


def report(layers=2, lora=False, **options):
    policy = tiny_policy(layers=layers)
    if lora:
        policy.backbone.enable_lora(2)
    model = DPOModel(policy, **options)
    model.compile(keras.optimizers.Adam(1e-3))
    return model.memory_report(random_pairs(16, longest=200), batch_size=8)


def test_report_is_what_the_compiled_step_takes():
    """Parameters by hand; FLOPs from the kernels' shapes."""
    policy = tiny_policy()
    found = report()
    parameters = sum(int(np.prod(v.shape)) for v in policy.variables)
    assert found.policy == 4 * parameters
    assert found.reference == 4 * parameters
    # Adam's two moments, the step and the rate.
    assert found.optimizer == pytest.approx(8 * parameters, rel=0.01)
    # At least the gradients, and the states of every layer.
    assert found.temporary > 4 * parameters + 2 * 4 * 32 * found.tokens
    layer = 32 * (32 + 2 * 16 + 32 + 3 * 64)
    body = 2.0 * 2 * layer * found.tokens * (3 + 1)
    assert found.flops > body
    assert found.flops < 1.5 * body
    text = "\n".join(found.lines())
    assert f"{found.tokens:,} tokens" in text


@pytest.mark.slow
def test_layers_computed_again_take_less_memory():
    kept, again = (
        report(layers=8),
        report(layers=8, execution=Execution(remat="layers")),
    )
    assert again.temporary < 0.6 * kept.temporary
    assert again.flops > kept.flops


@pytest.mark.slow
def test_estimate_of_what_layers_keep():
    """Not below the truth and not far above: `remat="auto"` decides by it."""
    kept, again = (
        report(layers=8),
        report(layers=8, execution=Execution(remat="layers")),
    )
    saved = kept.temporary - again.temporary
    estimate = kept_by_layers(tiny_policy(layers=8), kept.tokens)
    assert saved < estimate < 2 * saved


@pytest.mark.slow
def test_stored_reference_and_lora_take_less():
    full = report()
    assert report(reference="precomputed").reference == 0
    lora = report(lora=True)
    assert lora.optimizer < 0.1 * full.optimizer
    assert lora.flops < full.flops


@pytest.mark.slow
def test_deeper_models_follow_from_two():
    """Layers are alike: two and four tell twelve, within 15 %."""
    few, more, whole = (report(layers=n) for n in (2, 4, 12))
    found = extrapolate(few, more, (2, 4, 12))
    for name in ("policy", "optimizer", "reference", "flops"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name))
    assert found.peak == pytest.approx(whole.peak, rel=0.15)


# SmolLM2-135M-Instruct.
CONFIG = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
}


@pytest.mark.slow
def test_plan_needs_no_weights(tmp_path):
    """From a directory that holds the configuration alone."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = plan(
        DPOConfig(
            repo_id=str(tmp_path),
            total_batch_size=2,
            max_length=128,
            max_prompt_length=64,
        )
    )
    assert found.policy == pytest.approx(4 * 134.5e6, rel=0.01)
    assert found.real_tokens == 2 * (64 + 2 * 64)


MESH_PLAN = """
import sys
from keras_dpo import DPOConfig
from keras_dpo.losses import LOSSES
from keras_dpo.runs.plan import plan
for name in sorted(set(LOSSES) - {"sft"}):
    DPOConfig(loss_type=name + ",sft")
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
report = plan(DPOConfig(repo_id=sys.argv[1], mesh=sys.argv[2] or None,
    total_batch_size=8, max_length=128, max_prompt_length=64, lora_rank=2))
import jax
print("FOUND", len(jax.devices()), report.policy, report.optimizer,
    report.reference, report.temporary, report.peak)
"""


@pytest.mark.slow
def test_plan_of_a_mesh_that_is_not_there(tmp_path):
    """Bytes of one of eight simulated devices; nothing is held, or begun.

    A configuration alone starts no JAX, or processes could not meet.
    """
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def found(mesh):
        done = subprocess.run(
            [sys.executable, "-c", MESH_PLAN, tmp_path, mesh],
            env=environment(),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        line = next(x for x in done.stdout.splitlines() if "FOUND" in x)
        return [int(x) for x in line.split()[1:]]

    one, eight = found(""), found("data=4,model=2")
    assert (one[0], eight[0]) == (1, 8)
    # The nine heads do not divide by two: they lie over four devices.
    assert one[1] / 8 < eight[1] < one[1] / 6
    temporary = [found[4] for found in (one, eight)]
    assert temporary[1] < 0.6 * temporary[0]


SECOND_START = """
import sys, logging
import jax
from conftest import random_pairs, tiny_policy  # Sets a cache of its own.
from keras_dpo.compat.compilation import keep_compiled
keep_compiled({cache!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
from jax._src import monitoring
counts = dict(hit=0, miss=0)
def listen(event, **kwargs):
    if event.endswith("cache_hits"): counts["hit"] += 1
    if event.endswith("cache_misses"): counts["miss"] += 1
monitoring.register_event_listener(listen)
from keras_dpo import DPOModel
model = DPOModel(tiny_policy())
model.compile()
model.fit(random_pairs(8), batch_size=4, epochs=2, verbose=0)
print("COUNTS", counts["hit"], counts["miss"])
"""


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path):
    script = SECOND_START.format(cache=str(tmp_path))

    def start():
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        found = re.search(r"COUNTS (\d+) (\d+)", done.stdout)
        return int(found[1]), int(found[2])

    assert start()[1] > 0
    hits, misses = start()
    assert misses == 0
    assert hits > 0
