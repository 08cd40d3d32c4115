"""The one place that writes to the terminal."""

import logging

import keras


def say(line: str) -> None:
    """Show a line as Keras shows its own: printed, or logged."""
    if keras.config.is_interactive_logging_enabled():
        print(line, flush=True)  # noqa: T201
    else:
        logging.getLogger("keras_dpo").info(line)
