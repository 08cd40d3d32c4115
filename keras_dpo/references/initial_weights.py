"""`InitialWeights`: a policy's initial weights, while they are alive."""

import operator
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import jax
import keras
import numpy as np

from keras_dpo.errors import UserError

INITIAL_WEIGHTS_GONE = (
    "The reference is made of the initial weights, and the initial weights are "
    "gone: the policy was trained, or other weights were loaded, after "
    "DPOModel(policy) was made. Make a new DPOModel(policy); the policy as it "
    "is now is then the reference."
)


# All instances in this process: running one model may replace the arrays of
# another model's policy or reference.
_HELD: "weakref.WeakSet[InitialWeights]" = weakref.WeakSet()


@contextmanager
def initial_weights_kept(trained: keras.Model | None = None) -> Iterator[None]:
    """Keep all initial weights valid across a run that donates variables.

    Args:
        trained: The policy that the run trains, if any.
    """
    with ExitStack() as stack:
        for weights in list(_HELD):
            if trained is None or not weights.belong_to(trained):
                stack.enter_context(weights.kept())
        yield


class InitialWeights:
    """The policy's values at the time `DPOModel(policy)` was created.

    JAX arrays are immutable, so holding references costs nothing until
    training replaces them; its first step then deletes them by donation.

    Args:
        policy: A built Keras model.
    """

    def __init__(self, policy: keras.Model) -> None:
        self._policy = policy
        self._variables = list(policy.weights)
        self._values = self._now
        _HELD.add(self)

    def belong_to(self, policy: keras.Model) -> bool:
        """Whether these are the weights of the given policy."""
        return self._policy is policy

    @property
    def are_current(self) -> bool:
        """Whether the policy still has exactly these values, bit for bit."""
        return all(map(_same, self._now, self._values))

    def trainable_values(self) -> list[jax.Array]:
        """Initial values of the policy's trainable variables, in order.

        Raises:
            UserError: They are gone, or a frozen variable has changed.
        """
        trainable = {id(v) for v in self._policy.trainable_variables}
        values = {}
        for variable, value in zip(self._variables, self._values, strict=True):
            if id(variable) in trainable:
                values[id(variable)] = value
                gone = isinstance(value, jax.Array) and value.is_deleted()
            else:
                gone = not _same(variable.value, value)
            if gone:
                raise UserError(INITIAL_WEIGHTS_GONE)
        return [values[id(v)] for v in self._policy.trainable_variables]

    @property
    def _now(self) -> list[jax.Array]:
        return [variable.value for variable in self._variables]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the values valid across a run that does not change them.

        Keras donates its state to test and prediction steps, too, and replaces
        it by new arrays with the same values.
        """
        held = list(map(operator.is_, self._now, self._values))
        try:
            yield
        finally:
            self._values = [
                now if was_held else then
                for was_held, now, then in zip(
                    held, self._now, self._values, strict=True
                )
            ]


def _same(now: jax.Array, then: jax.Array) -> bool:
    if now is then or isinstance(then, jax.ShapeDtypeStruct):
        return True
    if then.is_deleted():
        return False
    if not then.is_fully_addressable:
        return bool(jax.numpy.array_equal(now, then))
    return np.array_equal(np.asarray(now), np.asarray(then))
