"""Locks on directories, between threads and real processes; atomic writes."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import threading

import filelock
import pytest
from conftest import environment

from keras_dpo.distribution import locks
from keras_dpo.distribution.locks import locked
from keras_dpo.errors import UserError
from keras_dpo.utils.files import write_beside

HOLD = """
import sys, time
from keras_dpo.distribution.locks import locked
with locked(sys.argv[1], "Training"):
    print("held", flush=True)
    sys.stdin.readline()
print("left", flush=True)
"""
TAKE = """
import sys
from keras_dpo.distribution.locks import locked
with locked(sys.argv[1], "Training", wait=sys.argv[2] == "wait"):
    print("held", flush=True)
"""


def start(script, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def holding(directory):
    process = start(HOLD, directory)
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_is_named_and_a_killed_one_forgotten(tmp_path):
    directory = tmp_path / "run"
    process = holding(directory)
    with (
        pytest.raises(UserError, match=r"Training needs .*run for its") as told,
        locked(directory, "Training"),
    ):
        pass
    text = str(told.value)
    assert f"process {process.pid} on {os.uname().nodename}, since 2" in text
    assert "choose another directory" in text
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # What the killed process left is no lock.
    assert (directory / locks.LOCK_FILE).exists()
    with locked(directory, "Training"):
        pass
    assert list(directory.iterdir()) == []


@pytest.mark.slow
def test_a_process_waits_for_another(tmp_path, capfd):
    directory = tmp_path / "run"
    process = holding(directory)
    waiting = start(TAKE, directory, "wait")
    line = waiting.stdout.readline()
    assert line.startswith(f"Waiting for {directory}: process {process.pid}")
    out, _ = process.communicate("\n", timeout=60)
    assert out == "left\n"
    out, err = waiting.communicate(timeout=60)
    assert out == "held\n", err
    assert waiting.returncode == 0
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("wait", [False, True])
def test_nothing_holds_it_twice(wait, tmp_path):
    """Not a thread itself, which would wait for ever, and not its relative."""
    with locked(tmp_path, "Training"):
        for directory in (tmp_path, tmp_path / "x" / ".."):
            with (
                pytest.raises(UserError, match=f"process {os.getpid()} on"),
                locked(directory, "Training", wait),
            ):
                pass
    with locked(tmp_path, "Training"):
        pass


def test_threads_take_turns(tmp_path):
    """An unlinked file is no lock: 8 threads, one of them inside at a time."""
    inside, most, errors = [], [], []

    def work():
        try:
            for _ in range(20):
                with locked(tmp_path, "Work", wait=True):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert most == [1] * 160
    assert list(tmp_path.iterdir()) == []


def test_another_thread_is_kept_out(tmp_path):
    told = []

    def other():
        try:
            with locked(tmp_path, "Training"):
                told.append("held")
        except UserError as error:
            told.append(str(error))

    with locked(tmp_path, "Training"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(told) == 1
    assert f"process {os.getpid()}" in told[0]


def test_an_exception_releases(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path, "Training"):
        raise KeyError
    with locked(tmp_path, "Training"):
        pass


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be written to"),
        locked(tmp_path / "file", "Training"),
    ):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "keras_dpo")

    def acquire(self, **options):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with locked(tmp_path, "Training"):
        assert "has no locks" in caplog.text


def test_every_process_of_a_run_learns_of_a_failure(tmp_path, monkeypatch):
    """Only the first takes the lock; the second raises what it is told."""
    asked = []

    def of_all(value):
        asked.append(value)
        return ["Training needs it: told by process 0", None]

    monkeypatch.setattr(locks.jax, "process_count", lambda: 2)
    monkeypatch.setattr(locks, "is_main_process", lambda: False)
    monkeypatch.setattr(locks, "of_all_processes", of_all)
    with pytest.raises(UserError, match="told by"), locked(tmp_path, "x"):
        pass
    assert asked == [None]
    assert list(tmp_path.iterdir()) == []


# --- Files --------------------------------------------------------------------


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    """Threads of one process: each content is whole."""
    path, found, errors = tmp_path / "content.json", set(), []

    def write(letter):
        try:
            for _ in range(30):
                write_beside(path, letter * 4096)
                found.add(path.read_bytes())
        except BaseException as error:
            errors.append(error)

    letters = [b"a", b"b", b"c", b"d"]
    threads = [threading.Thread(target=write, args=(x,)) for x in letters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert found <= {letter * 4096 for letter in letters}
    assert [p.name for p in tmp_path.iterdir()] == ["content.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_nothing(step, tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text("before")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space"):
        write_beside(pathlib.Path(path), b"after")
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    assert path.read_text() == "before"
