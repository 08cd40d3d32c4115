"""`locked`: an exclusive lock on a directory, held by one run at a time."""

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
# Errors of file systems that do not support locks.
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


@contextlib.contextmanager
def locked(
    directory: str | os.PathLike[str], what: str, wait: bool = False
) -> Iterator[None]:
    """Acquire an exclusive lock on a directory for the context.

    The operating system holds the lock (`flock`), so it is released when the
    process ends, however it ends; the file's content is only for messages. The
    file is removed on release. Other threads and runs of this process are
    excluded, too. The first of a run's processes acquires it for all.

    Args:
        directory: Created if it does not exist.
        what: Holder named in messages: "Training", "TrainingBackup".
        wait: Whether to wait for the other run instead of raising.

    Raises:
        ValueError: Another run holds the lock (raised in all processes).
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
        # A soft lock would outlive a killed process.
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
            # Unlinked while held: a waiter that had opened this file and then
            # gets the lock sees that the file is gone, and opens a new one.
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
        # filelock detects that this thread would deadlock with itself.
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
    """Description of a lock's holder, as recorded in its file."""
    try:
        holder: dict[str, Any] = json.loads(path.read_text())
        return (
            f"process {holder['process']} on {holder['host']}, since "
            f"{holder['since']}"
        )
    except (OSError, ValueError):
        # The holder is just starting or ending.
        return "a process that has not said who it is"
