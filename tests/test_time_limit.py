"""A limit on time that works in any thread and leaves signals alone."""

import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
from conftest import environment

from keras_dpo.data import chat_templates
from keras_dpo.utils.time_limit import run_within

LOOP = (
    3 * "{% for a in range(99999) %}" + "{% set b = a %}" + 3 * "{% endfor %}"
)
ASKED = [{"role": "user", "content": "x"}]


def forever():
    while True:
        pass


def outcome(function):
    try:
        return function()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def in_threads(functions):
    """What each returns, or raises, all at once."""
    results = [None] * len(functions)

    def run(i):
        results[i] = outcome(functions[i])

    threads = [
        threading.Thread(target=run, args=[i]) for i in range(len(functions))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def test_in_any_thread():
    """Outside the main thread there was no limit at all."""
    functions = [
        lambda: run_within(0.2, forever),
        lambda: run_within(5, lambda: "done"),
        lambda: run_within(0.3, forever),
    ]
    late = [f"TimeoutError: it takes more than 0.{x} s" for x in (2, 3)]
    assert in_threads(functions) == [late[0], "done", late[1]]
    assert outcome(functions[0]) == late[0]


def test_a_template_that_never_ends_in_a_thread(monkeypatch):
    monkeypatch.setattr(chat_templates, "RENDER_SECONDS", 0.3)
    said = in_threads(
        [lambda: chat_templates.render(LOOP, ASKED, True, {})] * 2
    )
    for text in said:
        assert text.startswith("UserError: The chat template refuses")
        assert text.endswith("it takes more than 0.3 s")


def test_an_alarm_of_the_user_s_own_stays():
    chat_templates.render("{{ messages }}", ASKED, True, {})
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        chat_templates.render("{{ messages }}", ASKED, True, {})
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        deadline = time.monotonic() + 5
        while not rung and time.monotonic() < deadline:
            time.sleep(0.01)
        assert rung == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def spin(seconds, result):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass
    return result


def test_calls_that_end_as_their_time_does():
    """Hundreds that end about when their time is up, in several threads: each
    returns or is late, and no interrupt reaches what comes after."""
    late, wrong = [], []

    def many():
        for i in range(500):
            seconds = 0.0008 + (i % 40) / 1e5
            try:
                if run_within(0.001, partial(spin, seconds, i)) != i:
                    wrong.append(i)
            except TimeoutError:
                late.append(i)
            # An interrupt that came too late would end this thread.
            for _ in range(50):
                pass
        return "whole"

    assert in_threads([many] * 3) == ["whole"] * 3
    assert not wrong
    assert 0 < len(late) < 1500


def test_errors_of_the_call_are_its_own():
    def fails():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run_within(5, fails)
    with pytest.raises(KeyboardInterrupt):
        run_within(5, lambda: (_ for _ in ()).throw(KeyboardInterrupt))

    def holds_on():
        while True:
            try:
                forever()
            except Exception:
                continue

    with pytest.raises(TimeoutError):
        run_within(0.2, holds_on)


def test_a_limit_costs_little():
    """Tens of thousands of renders: microseconds each, in a thread or not."""
    begun = time.monotonic()
    for _ in range(20_000):
        run_within(10, int)
    assert time.monotonic() - begun < 4


FORK = """
import os
from keras_dpo.utils.time_limit import run_within

def forever():
    while True:
        pass

run_within(5, int)
child = os.fork()
try:
    run_within(0.2, forever)
except TimeoutError:
    os._exit(os.waitpid(child, 0)[1] if child else 0)
"""


def test_after_a_fork():
    """The child has no watchdog, and begins one."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK],
        env=environment(),
        timeout=60,
    )
    assert done.returncode == 0
