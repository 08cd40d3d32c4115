"""`locked`: one run at a time writes to a directory."""

import contextlib
import datetime
import errno
import json
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

import filelock
import jax

from keras_dpo.distribution.processes import is_main_process, of_all_processes
from keras_dpo.errors import UserError
from keras_dpo.utils.messages import say

LOCK_FILE = ".lock"
# Of file systems that know no locks.
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


@contextlib.contextmanager
def locked(
    directory: str | os.PathLike[str], what: str, wait: bool = False
) -> Iterator[None]:
    """Keep every other run out of a directory.

    The operating system holds the lock (`flock`), so that it ends with the
    process, however that ends; what the file says is for the message alone.
    Nothing is left behind. Another thread or run of this process is kept out,
    too. Of several processes of one run the first takes it for all.

    Args:
        directory: It is made if it is not there.
        what: What needs it, for the message: "Training", "Backups".
        wait: Whether to wait for the other run, instead of an error.

    Raises:
        ValueError: Another run is in it (in all processes).
    """
    path = pathlib.Path(directory).expanduser().absolute()
    with contextlib.ExitStack() as stack:
        failure = None
        if is_main_process():
            try:
                stack.enter_context(_locked_file(path, what, wait))
            except UserError as error:
                failure = str(error)
        if jax.process_count() > 1:
            failure = of_all_processes(failure)[0]
        if failure is not None:
            raise UserError(failure)
        yield


@contextlib.contextmanager
def _locked_file(
    directory: pathlib.Path, what: str, wait: bool
) -> Iterator[None]:
    path = directory / LOCK_FILE
    lock = filelock.FileLock(
        path,
        thread_local=False,
        # A soft lock outlives a process that is killed.
        fallback_to_soft=False,
        on_acquired=_write_holder,
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held = _acquire(lock, path, what, wait)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(
                f"{directory} cannot be written to: {error.strerror}. Choose "
                "another directory."
            ) from error
        say(
            f"Note: the file system of {directory} has no locks: see to it "
            "that no other run writes there."
        )
        held = False
    try:
        yield
    finally:
        if held:
            # While it is held: who opened this file before and gets the lock
            # after it sees that the file is gone, and opens the next one.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            lock.release()


def _acquire(
    lock: filelock.BaseFileLock, path: pathlib.Path, what: str, wait: bool
) -> bool:
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        if not wait:
            raise UserError(
                f"{what} needs {path.parent} for itself, and another run is "
                f"in it. Received: {_holder(path)}. Wait for its end, end "
                "it, or choose another directory."
            ) from None
        say(f"Waiting for {path.parent}: {_holder(path)}")
        _wait(lock, path, what)
    return True


def _wait(lock: filelock.BaseFileLock, path: pathlib.Path, what: str) -> None:
    try:
        lock.acquire()
    except RuntimeError as error:
        # The library sees that this thread would wait for itself.
        raise UserError(
            f"{what} needs {path.parent} for itself, and this thread holds "
            f"it already. Received: {_holder(path)}. Choose another directory."
        ) from error


def _write_holder(descriptor: int) -> None:
    now = datetime.datetime.now().astimezone()
    holder = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": now.isoformat(sep=" ", timespec="seconds"),
    }
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, json.dumps(holder).encode())


def _holder(path: pathlib.Path) -> str:
    """Who holds a lock, as far as its file says."""
    try:
        holder: dict[str, Any] = json.loads(path.read_text())
        return (
            f"process {holder['process']} on {holder['host']}, since "
            f"{holder['since']}"
        )
    except (OSError, ValueError):
        # It ends or begins at this moment.
        return "a process that has not said who it is"
