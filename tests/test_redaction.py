"""What no file, W&B or report may hold."""

from keras_dpo.utils.redaction import without_secrets


def test_secrets_are_hidden_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct-horse")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    key = "hf_" + "a" * 34
    value = {
        "dataset_name": "https://me:pass@host/x.jsonl?token=abc&v=1",
        "names": [key, f"uses {key}.", "correct-horse battery"],
        "flag": "false",
        "seed": 3,
    }
    assert without_secrets(value) == {
        "dataset_name": "https://[hidden]@host/x.jsonl?token=[hidden]&v=1",
        "names": ["[hidden]", "uses [hidden].", "[hidden] battery"],
        "flag": "false",
        "seed": 3,
    }


def test_what_only_resembles_one_stays():
    for text in ("hf_short", "skating", "a/b@main", "hf://owner/name", ""):
        assert without_secrets(text) == text
