"""`patched`: one thread's replacement, and nothing left afterwards."""

import contextlib
import threading
import types

import keras
import numpy as np
import pytest
from conftest import random_pairs, tiny_policy, values_of

from keras_dpo import DPOModel, Execution, PreferenceDataset
from keras_dpo.compat.patching import current, patched


def module():
    owner = types.ModuleType("owner")
    owner.greet = lambda name: f"original {name}"
    return owner


class InThread:
    """Runs functions in a thread of its own, one at a time."""

    def __init__(self):
        self._go, self._done = threading.Event(), threading.Event()
        self._function, self._result = None, None
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            self._go.wait()
            self._go.clear()
            self._result = self._function()
            self._done.set()

    def __call__(self, function):
        self._function = function
        self._done.clear()
        self._go.set()
        assert self._done.wait(10)
        return self._result


@pytest.mark.parametrize("first_out", [0, 1])
def test_threads_overlap_and_leave_in_either_order(first_out):
    owner = module()
    original = owner.greet
    threads = [InThread(), InThread()]
    contexts = [
        patched(owner, "greet", lambda name, i=i: f"thread {i} {name}")
        for i in range(2)
    ]
    for thread, context in zip(threads, contexts, strict=True):
        thread(context.__enter__)
    assert threads[0](lambda: owner.greet("a")) == "thread 0 a"
    assert threads[1](lambda: owner.greet("a")) == "thread 1 a"
    assert owner.greet("a") == "original a"
    threads[first_out](lambda: contexts[first_out].__exit__(None, None, None))
    assert threads[first_out](lambda: owner.greet("a")) == "original a"
    left = 1 - first_out
    assert threads[left](lambda: owner.greet("a")) == f"thread {left} a"
    threads[left](lambda: contexts[left].__exit__(None, None, None))
    assert owner.greet is original


def test_nested_use_calls_the_innermost():
    owner = module()
    original = owner.greet

    def outer(name):
        return "outer"

    with patched(owner, "greet", outer):
        below = current(owner, "greet")
        assert below is outer
        with patched(owner, "greet", lambda name: f"inner of {below(name)}"):
            assert owner.greet("a") == "inner of outer"
        assert owner.greet("a") == "outer"
    assert owner.greet is original
    assert current(owner, "greet") is original


def test_a_replacement_calls_the_original_while_another_thread_is_inside():
    """The attribute is a dispatcher then, which would call it again."""
    owner, thread = module(), InThread()
    context = patched(owner, "greet", lambda name: "other")
    thread(context.__enter__)
    below = current(owner, "greet")
    with patched(owner, "greet", lambda name: f"mine of {below(name)}"):
        assert owner.greet("a") == "mine of original a"
    thread(lambda: context.__exit__(None, None, None))


def test_exceptions_put_back():
    owner = module()
    original = owner.greet
    with pytest.raises(KeyError), patched(owner, "greet", None):
        raise KeyError
    assert owner.greet is original


def test_what_was_kept_meanwhile_is_the_original_afterwards():
    owner = module()
    with patched(owner, "greet", lambda name: "replaced"):
        kept = owner.greet
    assert kept("a") == "original a"


class Base:
    def method(self, value):
        return self, value

    @classmethod
    def of_class(cls):
        return cls

    @staticmethod
    def static(value):
        return value

    @property
    def computed(self):
        return "original"


class Derived(Base):
    pass


@pytest.mark.parametrize("owner", [Base, Derived])
def test_methods_of_classes(owner):
    before = dict(vars(owner))
    item, thread = Derived(), InThread()
    with contextlib.ExitStack() as stack:
        for name, replacement in (
            ("method", lambda self, value: (self, -value)),
            ("of_class", classmethod(lambda cls: [cls])),
            ("static", staticmethod(lambda value: -value)),
            ("computed", property(lambda self: "replaced")),
        ):
            stack.enter_context(patched(owner, name, replacement))
        assert item.method(2) == (item, -2)
        assert owner.method(item, 2) == (item, -2)
        assert item.of_class() == Derived.of_class() == [Derived]
        assert item.static(2) == owner.static(2) == -2
        assert item.computed == "replaced"
        assert thread(lambda: item.method(2)) == (item, 2)
        assert thread(lambda: owner.method(item, 2)) == (item, 2)
        assert thread(lambda: Derived.of_class()) is Derived
        assert thread(lambda: item.static(2)) == 2
        assert thread(lambda: item.computed) == "original"
    assert dict(vars(owner)) == before


def test_a_class_as_the_attribute():
    owner, thread = types.ModuleType("owner"), InThread()
    owner.Base = Base
    with patched(owner, "Base", Derived):
        assert type(owner.Base()) is Derived
        assert type(thread(lambda: owner.Base())) is Base
        assert isinstance(Derived(), owner.Base)
        assert not isinstance(Base(), owner.Base)
        assert thread(lambda: isinstance(Base(), owner.Base))
        assert issubclass(Derived, owner.Base)
        assert owner.Base.static(1) == 1

        class Below(owner.Base):
            pass

        assert Below.__mro__[1] is Derived
    assert owner.Base is Base


# --- In `fit` -----------------------------------------------------------------


def originals():
    trainer = keras.src.backend.jax.trainer
    return {
        "matmul": keras.src.ops.matmul,
        "einsum": keras.src.ops.einsum,
        "JAXEpochIterator": trainer.JAXEpochIterator,
        "jit": trainer.jit,
    }


@pytest.mark.slow
def test_two_fits_in_threads_equal_two_after_each_other():
    """With rows and with padded sequences, and nothing stays patched."""

    def make(attention):
        model = DPOModel(
            tiny_policy(), execution=Execution(attention=attention)
        )
        model.compile(keras.optimizers.SGD(0.1))
        return model

    def fit(model, waiting, out):
        data = PreferenceDataset(
            random_pairs(24), batch_size=4, verbose=False, seed=2
        )
        meet = keras.callbacks.LambdaCallback(
            on_train_begin=lambda logs: waiting and waiting.wait(60)
        )
        history = model.fit(data, epochs=2, verbose=0, callbacks=[meet])
        out.append((history.history["loss"], values_of(model.policy.weights)))

    before = originals()
    kinds = ["auto", "keras", "auto"]
    expected, found = [], [[] for _ in kinds]
    for kind in kinds:
        fit(make(kind), None, expected)
    models = [make(kind) for kind in kinds]
    waiting = threading.Barrier(len(kinds))
    threads = [
        threading.Thread(target=fit, args=(model, waiting, out))
        for model, out in zip(models, found, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    for ((losses, weights),), (wanted, values) in zip(
        found, expected, strict=True
    ):
        assert losses == wanted
        for a, b in zip(weights, values, strict=True):
            np.testing.assert_array_equal(a, b)
    for name, original in before.items():
        assert originals()[name] is original, name
