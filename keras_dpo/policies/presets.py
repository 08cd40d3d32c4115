"""Load and save policies correctly.

Works around bugs of Keras-Hub 0.32 with Llama-type models;
`tests/test_presets.py` checks each against recorded logits and tells when
upstream is fixed:

- loading a Hugging Face directory drops `rms_norm_eps` and, where
  transformers >= 5 wrote it, RoPE scaling;
- saving drops `tie_word_embeddings`, and the tokenizer's special tokens.
"""

import contextlib
import copy
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import keras

from keras_dpo.data.chat_templates import FAMILY_TEMPLATES
from keras_dpo.data.preprocessor import DPOPreprocessor
from keras_dpo.data.tokenizers import (
    LLAMA3_DEFAULT_TOKENS,
    HuggingFaceTokenizer,
    TextTokenizer,
    as_text_tokenizer,
)
from keras_dpo.distribution.processes import (
    is_main_process,
    to_host,
    wait_for_processes,
)
from keras_dpo.errors import UserError
from keras_dpo.policies.lora import policy_config

# Subdirectory of a Keras preset, whose own tokenizer.json differs.
TOKENIZER_DIRECTORY = "huggingface_tokenizer"
# Chat formatting that the tokenizer's own files do not record.
CHAT_FORMAT = "chat_format.json"


def load_policy(preset: str, dtype: Any = None) -> keras.Model:
    """Load a `keras_hub.models.CausalLM` with the model's own tokenizer.

    Args:
        preset: A Keras-Hub preset name, `hf://owner/name`, or a local
            directory in Keras-Hub's or Hugging Face's format. A directory
            takes precedence over a preset of the same name.
        dtype: A Keras dtype policy, such as `"mixed_bfloat16"`.

    Raises:
        ValueError: The preset cannot be loaded.
    """
    import keras_hub

    preset = _local_first(preset)
    config = _read_config(preset)
    with _loadable(preset):
        if config.get("model_type") == "llama":
            policy = _load_llama(preset, config, dtype)
        else:
            policy = keras_hub.models.CausalLM.from_preset(preset, dtype=dtype)
    policy._huggingface_tokenizer = _load_tokenizer(preset, config)
    policy._chat_format = load_chat_format(preset)
    return policy


def load_outline(preset: str, num_layers: int, dtype: Any = None) -> Any:
    """Build the policy with `num_layers` layers, without its weights.

    Reads only the preset's configuration.
    """
    import keras_hub

    preset = _local_first(preset)
    config = _read_config(preset)
    options: dict[str, Any] = {"num_layers": num_layers, "load_weights": False}
    if config.get("model_type") == "llama":
        family = keras_hub.models.Llama3Backbone
    else:
        family = keras_hub.models.Backbone
    with _loadable(preset):
        backbone = family.from_preset(preset, dtype=dtype, **options)
    name = type(backbone).__name__.replace("Backbone", "CausalLM")
    task = getattr(keras_hub.models, name)
    return task(backbone=backbone, preprocessor=None)


def count_layers(preset: str) -> int:
    """Number of decoder layers of a preset, from its configuration alone."""
    config = _configuration(preset)
    layers = config.get("num_hidden_layers")
    with _loadable(preset):
        return int(layers or config["config"]["num_layers"])


def load_tokenizer(preset: str) -> Any:
    """Load the tokenizer that `load_policy` would use, without weights."""
    import keras_hub

    preset = _local_first(preset)
    tokenizer = _load_tokenizer(preset, _read_config(preset))
    if tokenizer is not None:
        return tokenizer
    with _loadable(preset):
        return keras_hub.tokenizers.Tokenizer.from_preset(preset)


def load_chat_format(preset: str) -> dict[str, Any]:
    """Load a preset's chat format, else the name of its family's template.

    See `DPOPreprocessor.from_chat_format`; `save_policy` writes the file.
    """
    path = pathlib.Path(preset) / CHAT_FORMAT
    if path.exists():
        return json.loads(path.read_text())
    family = _configuration(preset).get("class_name", "")
    name = FAMILY_TEMPLATES.get(family.removesuffix("Backbone"))
    return {} if name is None else {"family": name}


def text_tokenizer_of(model: keras.Model) -> TextTokenizer | None:
    """The tokenizer that a model was loaded with, else its own."""
    tokenizer = getattr(model, "_huggingface_tokenizer", None)
    if tokenizer is None:
        preprocessor = getattr(model, "preprocessor", None)
        tokenizer = getattr(preprocessor, "tokenizer", None)
    return None if tokenizer is None else as_text_tokenizer(tokenizer)


def _local_first(preset: str | os.PathLike[str]) -> str:
    """Make a directory's path absolute; Keras-Hub tries preset names first."""
    preset = os.fspath(preset)
    return os.path.abspath(preset) if os.path.isdir(preset) else preset


def _configuration(preset: str) -> dict[str, Any]:
    """The config.json of a directory or a built-in Keras-Hub preset."""
    import keras_hub

    preset = _local_first(preset)
    with _loadable(preset):
        return _read_config(
            preset
        ) or keras_hub.src.utils.preset_utils.load_json(preset)


@contextlib.contextmanager
def _loadable(preset: str) -> Iterator[None]:
    """One line on a preset that is not there, or damaged."""
    try:
        yield
    except KeyError as error:
        raise UserError(
            f"The preset {preset!r} cannot be loaded: its configuration has "
            f"no {error}."
        ) from error
    except (ValueError, OSError) as error:
        text = str(error) or type(error).__name__
        reason = text.splitlines()[0]
        if "Unknown preset identifier" in text:
            reason = (
                "it is neither a directory, nor a preset of Keras-Hub, nor "
                "hf://owner/name"
            )
        raise UserError(
            f"The preset {preset!r} cannot be loaded: {reason}"
        ) from error


def _read_config(preset: str) -> dict[str, Any]:
    """The config.json of a directory; empty for built-in presets."""
    path = pathlib.Path(preset) / "config.json"
    if preset.startswith("hf://"):
        import huggingface_hub

        path = pathlib.Path(
            huggingface_hub.hf_hub_download(preset[5:], "config.json")
        )
    if not path.exists():
        if path.parent.is_dir():
            raise UserError(
                f"The directory {preset!r} has no config.json: it holds no "
                "model."
            )
        return {}
    return _read_json(path)


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"The file {str(path)!r} is not JSON: {error}") from (
            error
        )


def _load_llama(preset: str, config: dict[str, Any], dtype: Any) -> Any:
    import keras_hub

    models = keras_hub.models
    # If both exist, the flat keys hold no scaling (transformers 5).
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    options = {"layer_norm_epsilon": config["rms_norm_eps"]}
    if scaling.get("rope_type") == "llama3":
        options |= {
            "rope_frequency_adjustment_factor": scaling["factor"],
            "rope_low_freq_factor": scaling["low_freq_factor"],
            "rope_high_freq_factor": scaling["high_freq_factor"],
            "rope_pretraining_sequence_length": scaling[
                "original_max_position_embeddings"
            ],
        }
    elif scaling.get("rope_type", "default") == "linear":
        options["rope_position_scaling_factor"] = scaling["factor"]
    elif scaling.get("rope_type", "default") != "default":
        raise UserError(
            "Keras-Hub's Llama knows RoPE scaling of type llama3 and linear. "
            f"Received: rope_type={scaling['rope_type']!r} in {preset!r}."
        )
    backbone = models.Llama3Backbone.from_preset(preset, dtype=dtype, **options)
    preprocessor = models.Llama3CausalLMPreprocessor.from_preset(preset)
    return models.Llama3CausalLM(backbone, preprocessor)


def _load_tokenizer(preset: str, config: dict[str, Any]) -> Any:
    """The Hugging Face tokenizer that belongs to a preset, or None."""
    directory = pathlib.Path(preset)
    if (directory / TOKENIZER_DIRECTORY).is_dir():
        source = str(directory / TOKENIZER_DIRECTORY)
    elif "model_type" not in config:
        return None
    elif preset.startswith("hf://"):
        source = preset[5:]
    elif (directory / "tokenizer.json").exists():
        source = preset
    else:
        return None
    with _loadable(preset):
        return HuggingFaceTokenizer(source).tokenizer


def save_policy(
    policy: keras.Model,
    directory: str | os.PathLike[str],
    preprocessor: DPOPreprocessor | None = None,
) -> None:
    """Save a preset that `keras_hub.models.CausalLM.from_preset` loads.

    LoRA adapters are merged. The preset is written to a temporary directory
    and renamed, so an existing one stays intact until the new one is complete.
    The first process writes, but all processes must call this.

    Args:
        policy: A Keras-Hub CausalLM.
        directory: Directory to write the preset to.
        preprocessor: Its tokenizer and chat template are saved with the
            weights. Defaults to those the policy was trained or loaded with.
    """
    directory = pathlib.Path(directory)
    if preprocessor is None or preprocessor.tokenizer is None:
        preprocessor = getattr(policy, "_trained_with", None)
    if preprocessor is None:
        preprocessor = DPOPreprocessor.from_policy(policy)
    with _values_on_host(policy):
        if is_main_process():
            _save_whole(policy, directory, preprocessor)
        wait_for_processes("the policy is saved")


@contextlib.contextmanager
def _values_on_host(policy: keras.Model) -> Iterator[None]:
    """Gather variables that are sharded over several processes."""
    if jax.process_count() == 1:
        yield
        return
    kept = [(variable, variable.value) for variable in policy.variables]
    try:
        for variable, value in kept:
            variable._value = to_host(value)
        yield
    finally:
        for variable, value in kept:
            variable._value = value


def _save_whole(
    policy: keras.Model,
    directory: pathlib.Path,
    preprocessor: DPOPreprocessor,
) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = directory.with_name(f"{directory.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    policy.save_to_preset(str(beside))
    _mend_tied(policy, beside)
    _mend_llama_tokenizer(policy, beside)
    _save_text(preprocessor, beside)
    replaced = directory.with_name(f"{directory.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if directory.exists():
        directory.rename(replaced)
    beside.rename(directory)
    shutil.rmtree(replaced, ignore_errors=True)


def _save_text(preprocessor: DPOPreprocessor, directory: pathlib.Path) -> None:
    """Save the tokenizer and the chat format."""
    tokenizer, own = preprocessor.tokenizer, preprocessor.chat_format
    if isinstance(tokenizer, HuggingFaceTokenizer):
        kept = tokenizer.tokenizer
        if "chat_template" in own:
            # For readers that load the tokenizer alone.
            kept = copy.copy(kept)
            kept.chat_template = own["chat_template"]
        kept.save_pretrained(directory / TOKENIZER_DIRECTORY)
    if own:
        (directory / CHAT_FORMAT).write_text(json.dumps(own, indent=1))


def _edit_json(path: pathlib.Path, edit: Any) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content, indent=4))


def _mend_tied(policy: keras.Model, directory: pathlib.Path) -> None:
    backbone = policy.backbone
    if not hasattr(backbone, "tie_word_embeddings"):
        return
    tied = policy_config(policy)["config"]["backbone"]["config"][
        "tie_word_embeddings"
    ]

    def mend_backbone(content: dict[str, Any]) -> None:
        content["config"]["tie_word_embeddings"] = tied

    def mend_task(content: dict[str, Any]) -> None:
        mend_backbone(content["config"]["backbone"])

    _edit_json(directory / "config.json", mend_backbone)
    _edit_json(directory / "task.json", mend_task)


def _mend_llama_tokenizer(policy: keras.Model, directory: pathlib.Path) -> None:
    import keras_hub

    preprocessor = getattr(policy, "preprocessor", None)
    tokenizer = getattr(preprocessor, "tokenizer", None)
    if not isinstance(tokenizer, keras_hub.tokenizers.Llama3Tokenizer):
        return
    tokens = {
        "bos_token": tokenizer.start_token,
        "eos_token": tokenizer.end_token,
    }

    def mend(content: Any) -> None:
        """Fix every tokenizer config, however deeply nested."""
        if isinstance(content, dict):
            if content.get("class_name") == "Llama3Tokenizer":
                content["config"].update(tokens)
            for value in content.values():
                mend(value)

    for name in ("tokenizer.json", "preprocessor.json", "task.json"):
        if (directory / name).exists():
            _edit_json(directory / name, mend)

    def alias(vocabulary: dict[str, int]) -> None:
        # The loader requires these two tokens; our texts never contain them.
        unused = max(vocabulary.values()) + 1
        for token in LLAMA3_DEFAULT_TOKENS:
            if token not in vocabulary:
                vocabulary[token] = unused
                unused += 1

    _edit_json(directory / "assets" / "tokenizer" / "vocabulary.json", alias)
