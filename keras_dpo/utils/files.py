"""Atomic file writes and the cache directory."""

import contextlib
import os
import pathlib
import secrets
import socket


def cache_directory() -> pathlib.Path:
    """Cache directory: `$KERAS_DPO_CACHE`, or `~/.cache/keras_dpo`."""
    root = os.environ.get("KERAS_DPO_CACHE", "~/.cache/keras_dpo")
    return pathlib.Path(root).expanduser()


def write_beside(path: pathlib.Path, content: bytes) -> None:
    """Write a file atomically: to a temporary sibling, then rename it.

    Hosts, processes and threads may write the same file concurrently; the
    last rename wins.
    """
    writer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    beside = path.with_name(f"{path.name}.writing-{writer}")
    try:
        # "x" fails if another writer already has this file.
        with open(beside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        raise
