"""A time limit on a call, in any thread and without signals."""

import contextlib
import ctypes
import math
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")
# How long an interrupt that is on its way is waited for, in seconds.
DELIVERY_SECONDS = 5.0


class _Late(BaseException):
    """Raised inside a call that is over its time.

    No `Exception`, so that the code that is called does not catch it.
    """


class _Call:
    """A call that is watched."""

    def __init__(self, seconds: float) -> None:
        self.thread = threading.get_ident()
        self.deadline = time.monotonic() + seconds


class _Watchdog(threading.Thread):
    """Interrupts calls that are over their deadlines.

    Whoever takes a call out of `calls`, its own thread or this one, decides
    how it ends; a dict's `pop` is atomic, so exactly one of them does.
    """

    def __init__(self) -> None:
        super().__init__(name="keras_dpo time limit", daemon=True)
        self.calls: dict[_Call, None] = {}
        # No `Event`: an interrupt inside its `set` would leave its lock held,
        # where a queue of C is whole at any time.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        # When this thread looks next; a call that ends later need not wake it.
        self._looks_at = math.inf
        self.start()

    def watch(self, call: _Call) -> None:
        self.calls[call] = None
        if call.deadline < self._looks_at:
            self._wake.put(None)

    def run(self) -> None:
        while True:
            # Before the calls are listed, so that none slips through.
            self._looks_at = math.inf
            calls, now = list(self.calls), time.monotonic()
            for call in calls:
                if call.deadline <= now and self._take(call):
                    _raise_in(call.thread)
            nearest = min(
                (call.deadline for call in calls if call.deadline > now),
                default=math.inf,
            )
            self._looks_at = nearest
            wait = None if nearest == math.inf else nearest - now
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=wait)

    def _take(self, call: _Call) -> bool:
        return self.calls.pop(call, self) is None


_watchdog: _Watchdog | None = None


def run_within(seconds: float, function: Callable[[], Result]) -> Result:
    """The function's result, if it is there in time.

    Code of Python is interrupted between two of its instructions; a single
    call of C is not.

    Raises:
        TimeoutError: It took more than `seconds`.
    """
    global _watchdog
    watchdog = _watchdog
    # After a fork the child has no such thread.
    if watchdog is None or not watchdog.is_alive():
        watchdog = _watchdog = _Watchdog()
    call = _Call(seconds)
    try:
        watchdog.watch(call)
        try:
            result = function()
        except _Late:
            raise
        except BaseException:
            _end(watchdog, call)
            raise
        _end(watchdog, call)
        return result
    except _Late:
        raise TimeoutError(f"it takes more than {seconds:g} s") from None


def _end(watchdog: _Watchdog, call: _Call) -> None:
    """Take the call back, or wait for the interrupt that was sent to it."""
    if watchdog.calls.pop(call, watchdog) is None:
        return
    until = time.monotonic() + DELIVERY_SECONDS
    while time.monotonic() < until:
        time.sleep(0.001)
    # It was lost inside the call, in code whose exceptions Python ignores.
    raise _Late


def _raise_in(thread: int) -> None:
    late: Any = ctypes.py_object(_Late)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), late)
