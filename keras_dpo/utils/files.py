"""Atomic file writes, and where files are cached."""

import contextlib
import os
import pathlib
import secrets
import socket


def cache_directory() -> pathlib.Path:
    """`$KERAS_DPO_CACHE`, else `~/.cache/keras_dpo`."""
    root = os.environ.get("KERAS_DPO_CACHE", "~/.cache/keras_dpo")
    return pathlib.Path(root).expanduser()


def write_beside(path: pathlib.Path, content: bytes) -> None:
    """Write a file beside its place, and rename it there.

    Hosts, processes and threads that write the same file at once do not
    disturb each other: the last rename wins.
    """
    writer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    beside = path.with_name(f"{path.name}.writing-{writer}")
    try:
        # "x": never into a file that somebody else writes.
        with open(beside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        raise
