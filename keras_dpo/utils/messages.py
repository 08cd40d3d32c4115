"""The one place that writes to the terminal."""

import logging

import jax
import keras


def say(line: str) -> None:
    """Print a line, or log it if Keras' interactive logging is off.

    Only the first of several processes reports.
    """
    if jax.distributed.is_initialized() and jax.process_index() != 0:
        return
    if keras.config.is_interactive_logging_enabled():
        print(line, flush=True)  # noqa: T201
    else:
        logging.getLogger("keras_dpo").info(line)
