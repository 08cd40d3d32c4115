"""Files that are whole or not there."""

import os
import pathlib

import jax


def write_beside(path: pathlib.Path, content: bytes) -> None:
    """Write a file beside its place, and rename it there."""
    # Processes of one host may write the same.
    beside = path.with_name(f"{path.name}.writing-{jax.process_index()}")
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
