"""`patched`: a library's attribute replaced for one thread and one moment."""

import contextlib
import inspect
import threading
from collections.abc import Iterator
from typing import Any

_lock = threading.Lock()


@contextlib.contextmanager
def patched(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """Replace `owner.name` for the current thread.

    While any thread is inside, the attribute is a dispatcher: it calls the
    innermost replacement of the thread that asks, and the original for every
    other thread. The last thread out puts the original back, whatever the
    order in which they leave.

    A replacement that calls what was there before must take it from
    `current(owner, name)`: the attribute itself may be a dispatcher, which
    would call the replacement again.

    Args:
        owner: A module or a class.
        name: Of its function, method or class.
        replacement: What the current thread sees instead.
    """
    with _lock:
        dispatcher = vars(owner).get(name)
        if not isinstance(dispatcher, _Dispatcher):
            dispatcher = _Dispatcher(owner, name)
            setattr(owner, name, dispatcher)
        dispatcher.num_inside += 1
    # The list itself is kept: a generator may be closed in another thread.
    stack = dispatcher.stack
    entry = (replacement,)
    stack.append(entry)
    try:
        yield
    finally:
        stack[:] = [other for other in stack if other is not entry]
        with _lock:
            dispatcher.num_inside -= 1
            if not dispatcher.num_inside:
                dispatcher.put_back()


def current(owner: Any, name: str) -> Any:
    """What `owner.name` is for this thread, never a dispatcher."""
    found = getattr(owner, name)
    return found.found() if isinstance(found, _Dispatcher) else found


class _Dispatcher:
    """Stands in for an attribute that some thread has replaced.

    It outlives the replacement where somebody kept it (`from module import
    name` at that moment), and is the original then.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.num_inside = 0
        self._owner, self._name = owner, name
        self._inherited = name not in vars(owner)
        # As it lies there: a `staticmethod` is not what it returns.
        find = inspect.getattr_static if isinstance(owner, type) else getattr
        self._original = find(owner, name)
        self._local = threading.local()

    @property
    def stack(self) -> list[Any]:
        """This thread's replacements, the innermost last."""
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    def found(self) -> Any:
        """What this thread sees, as it would lie in the owner."""
        return self.stack[-1][0] if self.stack else self._original

    def put_back(self) -> None:
        """Leave the owner as it was."""
        if self._inherited:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.found()(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any) -> Any:
        """What this thread sees of a class or its instances."""
        found = self.found()
        bind = getattr(type(found), "__get__", None)
        return found if bind is None else bind(found, instance, owner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.found(), name)

    def __mro_entries__(self, bases: Any) -> tuple[Any, ...]:
        return (self.found(),)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self.found())

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self.found())
