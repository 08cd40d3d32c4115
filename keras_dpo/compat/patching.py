"""`patched`: temporary, thread-local replacement of a library's attribute."""

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
    innermost replacement of the calling thread, or the original in threads
    without one. The last thread to leave restores the original, whatever the
    order in which they leave.

    A replacement that wraps the previous value must get it from
    `current(owner, name)`: the attribute itself may be a dispatcher, which
    would call the replacement again.

    Args:
        owner: A module or a class.
        name: Name of the function, method or class to replace.
        replacement: Value that the current thread sees instead.
    """
    with _lock:
        dispatcher = vars(owner).get(name)
        if not isinstance(dispatcher, _Dispatcher):
            dispatcher = _Dispatcher(owner, name)
            setattr(owner, name, dispatcher)
        dispatcher.num_inside += 1
    # Hold the list itself: a generator may be closed in another thread.
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
    """Return `owner.name` as this thread sees it, never a dispatcher."""
    found = getattr(owner, name)
    return found.found() if isinstance(found, _Dispatcher) else found


class _Dispatcher:
    """Stands in for an attribute that some thread has replaced.

    It outlives the replacement if someone kept it (`from module import name`
    in the meantime), and then behaves as the original.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.num_inside = 0
        self._owner, self._name = owner, name
        self._inherited = name not in vars(owner)
        # The raw attribute: `getattr` would unwrap a `staticmethod`.
        find = inspect.getattr_static if isinstance(owner, type) else getattr
        self._original = find(owner, name)
        self._local = threading.local()

    @property
    def stack(self) -> list[Any]:
        """This thread's replacements, innermost last."""
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    def found(self) -> Any:
        """The raw attribute that this thread sees, not bound."""
        return self.stack[-1][0] if self.stack else self._original

    def put_back(self) -> None:
        """Restore the owner's original attribute."""
        if self._inherited:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.found()(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any) -> Any:
        """Bind the attribute that this thread sees."""
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
