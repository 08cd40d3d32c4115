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
# Seconds to wait for an interrupt that is already on its way.
DELIVERY_SECONDS = 5.0


class _Late(BaseException):
    """Raised inside a call that has exceeded its time limit.

    Not an `Exception`, so that the called code does not catch it.
    """


class _Call:
    """A call under watch: its thread and its deadline."""

    def __init__(self, seconds: float) -> None:
        self.thread = threading.get_ident()
        self.deadline = time.monotonic() + seconds


class _Watchdog(threading.Thread):
    """Interrupts calls that have passed their deadlines.

    Whichever thread removes a call from `calls`, its own or this one, decides
    how it ends; `dict.pop` is atomic, so exactly one of them does.
    """

    def __init__(self) -> None:
        super().__init__(name="keras_dpo time limit", daemon=True)
        self.calls: dict[_Call, None] = {}
        # Not an `Event`: an interrupt inside its `set` would leave its lock
        # held, while a queue implemented in C is always consistent.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        # When this thread wakes next; later deadlines need not wake it.
        self._looks_at = math.inf
        self.start()

    def watch(self, call: _Call) -> None:
        self.calls[call] = None
        if call.deadline < self._looks_at:
            self._wake.put(None)

    def run(self) -> None:
        while True:
            # Reset before listing the calls, so that none slips through.
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
    """Return the function's result, or raise if it takes too long.

    Python code is interrupted between two bytecode instructions; a single C
    call is not.

    Raises:
        TimeoutError: The call took more than `seconds`.
    """
    global _watchdog
    watchdog = _watchdog
    # A forked child does not inherit the thread.
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
    """Remove the call, or wait for the interrupt already sent to it."""
    if watchdog.calls.pop(call, watchdog) is None:
        return
    until = time.monotonic() + DELIVERY_SECONDS
    while time.monotonic() < until:
        time.sleep(0.001)
    # The interrupt was lost in code whose exceptions Python ignores.
    raise _Late


def _raise_in(thread: int) -> None:
    late: Any = ctypes.py_object(_Late)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), late)
