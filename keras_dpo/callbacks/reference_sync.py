"""`ReferenceSync`: update the reference from the policy during training."""

from typing import Any

import jax

from keras_dpo.errors import UserError
from keras_dpo.training.after_step import AfterStep


class ReferenceSync(AfterStep):
    """Moves the reference towards the policy every N steps.

    Computes `reference <- alpha * policy + (1 - alpha) * reference`; with LoRA
    only the adapters, since nothing else differs. The first sync follows
    optimizer step `every`.

    Args:
        every: Optimizer steps between syncs.
        alpha: Weight of the policy, in (0, 1]. 1 copies it.

    Raises:
        ValueError: An argument is out of range, or (when training begins) the
            reference is precomputed or absent.

    Example:

    ```python
    model.fit(train, callbacks=[
        keras_dpo.callbacks.ReferenceSync(every=64, alpha=0.6)])
    ```

    Reference: [TR-DPO, Gorbatovski et al., 2024](
    https://arxiv.org/abs/2404.09656), eq. 3 and 4.
    """

    def __init__(self, every: int = 64, alpha: float = 0.9) -> None:
        super().__init__()
        if every < 1:
            raise UserError(
                f"`every` must be at least 1 step. Received: {every!r}."
            )
        if not 0 < alpha <= 1:
            raise UserError(f"`alpha` must be in (0, 1]. Received: {alpha!r}.")
        self.every = every
        self.alpha = alpha

    def resume_settings(self) -> Any:
        return [self.every, self.alpha]

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        self.model._ensure_reference().variable_pairs()

    def after_step(self, step: int) -> None:
        if step % self.every == 0:
            # Reading `self.model` syncs the variables from the step state.
            self.sync(self.model)

    def sync(self, model: Any) -> None:
        """Update the reference now."""
        for reference, policy in model.reference.variable_pairs():
            reference.assign(_mix(reference.value, policy.value, self.alpha))
        model.reference.synced = True


@jax.jit
def _mix(reference: jax.Array, policy: jax.Array, alpha: float) -> jax.Array:
    mixed = alpha * policy + (1.0 - alpha) * reference
    return mixed.astype(reference.dtype)
