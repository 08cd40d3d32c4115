"""`config.yaml`: the settings of a run, written when it begins."""

import dataclasses
import datetime
import pathlib
from typing import Any

import keras
import yaml

from keras_dpo.distribution.processes import is_main_process
from keras_dpo.runs.config import DPOConfig
from keras_dpo.utils.files import write_beside
from keras_dpo.utils.redaction import without_secrets


class ConfigFile(keras.callbacks.Callback):
    """Writes a run's config when training begins.

    Not earlier, because a rejected start must not overwrite the config of the
    run already in the directory.
    """

    def __init__(self, config: DPOConfig, path: pathlib.Path) -> None:
        super().__init__()
        self._config, self._path = config, path

    def on_train_begin(self, logs: Any = None) -> None:
        if is_main_process():
            write_config(self._config, self._path)


def write_config(config: DPOConfig, path: pathlib.Path) -> None:
    """Write the config atomically, without secrets."""
    text = yaml.safe_dump(
        without_secrets(dataclasses.asdict(config)), sort_keys=False
    )
    write_beside(path, text.encode())


def with_date_of_run(config: DPOConfig, directory: pathlib.Path) -> DPOConfig:
    """The config with the date on which the run began, for chat templates.

    A run resumed on another day then sees the same prompts.
    """
    if config.template_date is not None:
        return config
    # Directories that may hold the backup to resume from.
    places = {"auto": [directory], "never": []}.get(
        config.resume, list(pathlib.Path(config.resume).parents)[:2]
    )
    for place in places:
        path = place / "config.yaml"
        if path.exists() and any(place.glob("backups/[0-9]*")):
            saved = yaml.safe_load(path.read_text())
            date = saved.get("template_date")
            if date is not None:
                return dataclasses.replace(config, template_date=str(date))
    today = datetime.date.today().isoformat()
    return dataclasses.replace(config, template_date=today)
