"""Loading with the right numbers, saving what loads again."""

import json
import shutil

import jax.numpy as jnp
import keras
import numpy as np
import pytest
from chat_tokenizer import save_chat_preset
from conftest import ORACLE

from keras_dpo import DPOPreprocessor, generate, load_policy, save_policy
from keras_dpo.policies.presets import (
    count_layers,
    load_outline,
    load_tokenizer,
)

TEXT = "The quick brown fox jumps over the lazy dog."


def logits_of(policy, ids):
    ids = np.array([ids])
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    return np.asarray(policy(inputs))[0]


@pytest.fixture
def llama_directory(tmp_path):
    """The oracle's Llama, to be changed."""
    directory = tmp_path / "llama"
    shutil.copytree(ORACLE / "tiny_llama", directory)
    return directory


def edit_config(directory, **changes):
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(config))


def restated_logits(directory, ids, epsilon, inverse_frequency):
    """A Llama forward pass in float64 numpy, from the safetensors file."""
    from safetensors.numpy import load_file

    config = json.loads((directory / "config.json").read_text())
    weights = {
        name: value.astype("float64")
        for name, value in load_file(directory / "model.safetensors").items()
    }
    heads, groups = (
        config["num_attention_heads"],
        config["num_key_value_heads"],
    )
    size = config["hidden_size"] // heads

    def norm(x, name):
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
        return x / scale * weights[name]

    angles = np.arange(len(ids))[:, None] * inverse_frequency
    angles = np.concatenate([angles, angles], -1)[None]

    def rotate(x):
        half = x.shape[-1] // 2
        turned = np.concatenate([-x[..., half:], x[..., :half]], -1)
        return x * np.cos(angles) + turned * np.sin(angles)

    x = weights["model.embed_tokens.weight"][ids]
    causal = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for layer in range(config["num_hidden_layers"]):
        part = f"model.layers.{layer}."

        def project(x, name, count, part=part):
            weight = weights[f"{part}self_attn.{name}.weight"]
            return (x @ weight.T).reshape(len(ids), count, size).swapaxes(0, 1)

        y = norm(x, part + "input_layernorm.weight")
        q = rotate(project(y, "q_proj", heads))
        k = rotate(project(y, "k_proj", groups)).repeat(heads // groups, 0)
        v = project(y, "v_proj", groups).repeat(heads // groups, 0)
        scores = q @ k.swapaxes(1, 2) / np.sqrt(size) + causal
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = (scores / scores.sum(-1, keepdims=True)) @ v
        y = y.swapaxes(0, 1).reshape(len(ids), -1)
        x = x + y @ weights[part + "self_attn.o_proj.weight"].T
        y = norm(x, part + "post_attention_layernorm.weight")
        gate = y @ weights[part + "mlp.gate_proj.weight"].T
        up = y @ weights[part + "mlp.up_proj.weight"].T
        y = gate / (1 + np.exp(-gate)) * up
        x = x + y @ weights[part + "mlp.down_proj.weight"].T
    head = "lm_head.weight"
    if config["tie_word_embeddings"]:
        head = "model.embed_tokens.weight"
    return norm(x, "model.norm.weight") @ weights[head].T


def frequencies(directory, theta):
    config = json.loads((directory / "config.json").read_text())
    size = config["hidden_size"] // config["num_attention_heads"]
    return theta ** -(np.arange(0, size, 2) / size)


IDS = [1, 60, 77, 271, 270, 335, 283, 317, 268, 272, 80, 94, 36]


def test_rms_norm_eps_is_read(llama_directory):
    edit_config(llama_directory, rms_norm_eps=0.1)
    config = json.loads((llama_directory / "config.json").read_text())
    theta = (config.get("rope_parameters") or config)["rope_theta"]
    expected = restated_logits(
        llama_directory, IDS, 0.1, frequencies(llama_directory, theta)
    )
    found = logits_of(load_policy(str(llama_directory)), IDS)
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_llama3_rope_scaling_is_read(llama_directory, key):
    """As transformers 4 (rope_scaling) and 5 (rope_parameters) write it."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    theta = 10000.0
    if key == "rope_parameters":
        scaling["rope_theta"] = theta
        edit_config(llama_directory, rope_parameters=scaling)
    else:
        edit_config(
            llama_directory,
            rope_scaling=scaling,
            rope_theta=theta,
            rope_parameters={"rope_theta": theta},
        )
    inverse = frequencies(llama_directory, theta)
    wavelength = 2 * np.pi / inverse
    smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
    between = (1 - smooth) * inverse / 8.0 + smooth * inverse
    scaled = np.where(wavelength > 64, inverse / 8.0, inverse)
    middle = (wavelength <= 64) & (wavelength >= 16)
    scaled = np.where(middle, between, scaled)
    config = json.loads((llama_directory / "config.json").read_text())
    expected = restated_logits(
        llama_directory, IDS, config["rms_norm_eps"], scaled
    )
    found = logits_of(load_policy(str(llama_directory)), IDS)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_keras_hub_still_drops_rms_norm_eps(llama_directory):
    """When this fails, `presets._load_llama` can go."""
    import keras_hub

    edit_config(llama_directory, rms_norm_eps=0.1)
    backbone = keras_hub.models.Llama3Backbone.from_preset(str(llama_directory))
    assert backbone.layer_norm_epsilon == 1e-6


def test_unknown_rope_scaling_is_refused(llama_directory):
    edit_config(llama_directory, rope_scaling={"rope_type": "yarn"})
    with pytest.raises(ValueError, match="yarn"):
        load_policy(str(llama_directory))


@pytest.fixture(scope="module")
def smol_policy(smollm2):
    return load_policy(str(smollm2))


@pytest.mark.slow
def test_smollm2_loads_saves_and_answers(smol_policy, tmp_path):
    """Tied, with a tokenizer Keras-Hub cannot save: both load again."""
    import keras_hub

    policy = smol_policy
    assert policy.backbone.layer_norm_epsilon == pytest.approx(1e-5)
    preprocessor = DPOPreprocessor.from_policy(policy)
    assert "tokenizer.json" in preprocessor.tokenizer.name
    question = [[{"role": "user", "content": "What is the capital of France?"}]]
    answers = generate(policy, preprocessor, question, 12)
    assert "Paris" in answers[0]
    save_policy(policy, tmp_path / "policy", preprocessor)
    plain = keras_hub.models.CausalLM.from_preset(str(tmp_path / "policy"))
    ids = preprocessor.tokenizer.encode([TEXT])[0]
    np.testing.assert_array_equal(logits_of(plain, ids), logits_of(policy, ids))
    plain.compile(sampler="greedy")
    chat = "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n"
    answer = plain.generate(chat, max_length=40, strip_prompt=True)
    assert len(answer.strip()) > 2
    again = load_policy(str(tmp_path / "policy"))
    reread = DPOPreprocessor.from_policy(again)
    assert reread.prompt_ids(question[0]) == preprocessor.prompt_ids(
        question[0]
    )
    assert generate(again, reread, question, 12) == answers


@pytest.mark.slow
def test_a_chat_policy_loads_saves_and_answers_alike(chat_preset, tmp_path):
    """The same of a random one: same ids, template and answers."""
    import keras_hub

    policy = load_policy(chat_preset)
    preprocessor = DPOPreprocessor.from_policy(policy)
    assert "tokenizer.json" in preprocessor.tokenizer.name
    question = [[{"role": "user", "content": "What is the capital of France?"}]]
    answers = generate(policy, preprocessor, question, 12)
    assert len(answers[0]) > 2
    save_policy(policy, tmp_path / "policy", preprocessor)
    plain = keras_hub.models.CausalLM.from_preset(str(tmp_path / "policy"))
    ids = preprocessor.tokenizer.encode([TEXT])[0]
    np.testing.assert_array_equal(logits_of(plain, ids), logits_of(policy, ids))
    again = load_policy(str(tmp_path / "policy"))
    reread = DPOPreprocessor.from_policy(again)
    assert reread.prompt_ids(question[0]) == preprocessor.prompt_ids(
        question[0]
    )
    assert generate(again, reread, question, 12) == answers


def test_keras_hub_still_loses_tied_embeddings(tmp_path):
    """When this fails, `presets._mend_tied` can go."""
    import keras_hub
    from conftest import tiny_policy

    policy = tiny_policy()
    policy.save_to_preset(str(tmp_path / "plain"))
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "tie_word_embeddings" not in config["config"]
    save_policy(policy, tmp_path / "mended")
    again = keras_hub.models.CausalLM.from_preset(str(tmp_path / "mended"))
    np.testing.assert_array_equal(
        logits_of(again, [3, 4, 5]), logits_of(policy, [3, 4, 5])
    )


def test_saved_lora_policy_is_merged(tmp_path):
    import keras_hub
    from conftest import tiny_policy

    policy = tiny_policy()
    policy.backbone.enable_lora(2)
    for variable in policy.trainable_variables:
        variable.assign(0.1 * jnp.ones(variable.shape))
    save_policy(policy, tmp_path / "merged")
    again = keras_hub.models.CausalLM.from_preset(str(tmp_path / "merged"))
    np.testing.assert_allclose(
        logits_of(again, [3, 4, 5]), logits_of(policy, [3, 4, 5]), atol=1e-5
    )


def test_a_failed_save_keeps_the_old_preset(tmp_path, monkeypatch):
    from conftest import tiny_policy

    policy = tiny_policy()
    save_policy(policy, tmp_path / "policy")
    before = sorted(p.name for p in (tmp_path / "policy").rglob("*"))

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(type(policy), "save_to_preset", fail)
    with pytest.raises(OSError, match="no space"):
        save_policy(policy, tmp_path / "policy")
    assert sorted(p.name for p in (tmp_path / "policy").rglob("*")) == before


def test_keras_hub_tokenizer_still_differs(smol_policy, demo_data):
    """When this fails, the model's own tokenizer.json need not win."""
    own = DPOPreprocessor.from_policy(smol_policy).tokenizer
    theirs = DPOPreprocessor(smol_policy.preprocessor.tokenizer).tokenizer
    rows = json.loads(demo_data.read_text())[:20]
    texts = [row["chosen"]["value"] for row in rows]
    differ = [
        a != b
        for a, b in zip(own.encode(texts), theirs.encode(texts), strict=True)
    ]
    assert sum(differ) > 10


def test_no_such_preset(tmp_path):
    with pytest.raises(ValueError, match="no_such_preset"):
        load_policy("no_such_preset")
    with pytest.raises(ValueError, match="no config.json"):
        load_policy(str(tmp_path))


def test_a_directory_wins_over_a_built_in_preset_of_its_name(
    tmp_path, monkeypatch
):
    """`gemma3_instruct_270m` beside us is that, not a download."""
    import keras_hub

    name = "gemma3_instruct_270m"
    assert name in keras_hub.models.Gemma3CausalLM.presets
    monkeypatch.chdir(tmp_path)
    save_chat_preset(name, "Gemma3")
    assert load_policy(name).backbone.hidden_dim == 32
    assert load_outline(name, 1).backbone.hidden_dim == 32
    assert count_layers(name) == 2
    assert load_tokenizer(name).eos_token == "<|im_end|>"


def test_tokenizer_without_weights(chat_preset):
    assert load_tokenizer(chat_preset).eos_token == "<|im_end|>"


def test_generate_leaves_the_sampler(chat_preset):
    policy = load_policy(chat_preset)
    preprocessor = DPOPreprocessor.from_policy(policy)
    before = policy.sampler
    generate(policy, preprocessor, ["Hello"], 2)
    assert policy.sampler is before
    assert isinstance(policy, keras.Model)
