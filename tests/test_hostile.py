"""Files that would run code, or run forever."""

import json
import pickle

import pytest

from keras_dpo import DPOConfig, load_policy
from keras_dpo.data import chat_templates
from keras_dpo.data.tokenizers import HuggingFaceTokenizer
from keras_dpo.runs.train import train

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
}


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_is_never_opened(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    marker = tmp_path / "ran"
    content = pickle.dumps(Bomb(marker))
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors"):
        load_policy(str(tmp_path))
    assert not marker.exists()
    # The pickle itself is a working one.
    pickle.loads(content).close()
    assert marker.exists()


def test_code_beside_a_tokenizer_is_never_run(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "Evil",
                "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
            }
        )
    )
    with pytest.raises(ValueError, match="contains custom code"):
        HuggingFaceTokenizer(str(tmp_path))
    assert not marker.exists()


def test_a_template_that_never_ends(monkeypatch):
    monkeypatch.setattr(chat_templates, "RENDER_SECONDS", 0.5)
    loop = "{% for a in range(99999) %}"
    template = 3 * loop + "{% set b = a %}" + 3 * "{% endfor %}"
    with pytest.raises(ValueError, match="more than 0.5 s"):
        chat_templates.render(
            template, [{"role": "user", "content": "x"}], True, {}
        )


def test_a_run_does_not_write_through_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    config = DPOConfig(
        repo_id="none",
        dataset_name="none",
        save_directory=str(tmp_path),
        model_name="run",
    )
    with pytest.raises(ValueError, match="symbolic link"):
        train(config)
    assert not list((tmp_path / "elsewhere").iterdir())
