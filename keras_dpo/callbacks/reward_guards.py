"""What the numbers of a run mean when they go wrong, said once."""

import math
from typing import Any

import jax.numpy as jnp

from keras_dpo.callbacks.step_logger import StepLogger
from keras_dpo.messages import say
from keras_dpo.reference import SnapshotReference


class _SaidOnce(StepLogger):
    """Base class: what was told is not told again, also after a resume."""

    told = False

    def get_state(self) -> dict[str, Any]:
        return {**super().get_state(), "told": self.told}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self.told = state["told"]


class StuckLossGuard(_SaidOnce):
    """Says why rewards stay at zero, and so the loss where it began.

    For the sigmoid loss that is ln 2 = 0.693.

    Args:
        every: Optimizer steps after which it looks, once.
    """

    def __init__(self, every: int = 20) -> None:
        super().__init__(every)

    def write(self, record: dict[str, Any]) -> None:
        # Before the first update every reward is 0.
        if self.told or record["step"] < max(self.every, 2):
            return
        rewards = [record.get("chosen_reward"), record.get("rejected_reward")]
        if any(r is None or not abs(r) < 1e-7 for r in rewards):
            return
        self.told = True
        loss = record.get("loss", math.nan)
        say(
            f"Warning: after {record['step']} steps every reward is still 0 "
            f"(loss {loss:.4f}): {why_stuck(self.model)}"
        )


def why_stuck(model: Any) -> str:
    """Why rewards stay zero, from the weights and the optimizer."""
    rate = float(model.optimizer.learning_rate)
    if rate == 0:
        return (
            "the learning rate is 0 at this step. Look at the schedule and its "
            "number of steps."
        )
    reference = model.reference
    if reference.synced:
        return (
            "the reference is synced to the policy so often that they are "
            "one. Sync less often, or with a smaller alpha."
        )
    if isinstance(reference, SnapshotReference):
        moved = any(
            bool(jnp.any(own.value != policy.value.astype(own.dtype)))
            for own, policy in reference.variable_pairs()
        )
        if moved:
            return (
                "the weights do move, but too little to be seen in the "
                f"log-probs of {model.policy.compute_dtype}. Raise the "
                f"learning rate ({rate:.3g})."
            )
        return (
            f"the updates are lost: no trained weight moved at learning rate "
            f"{rate:.3g}. Raise it; 16-bit weights need far larger steps than "
            "float32 ones."
        )
    return f"look at the learning rate ({rate:.3g}) and at what is trained."


class FallingRewardGuard(_SaidOnce):
    """Warns when the chosen completions become less likely than they were.

    Args:
        every: Optimizer steps that each look averages over.
        threshold: Chosen reward, in nats times beta, that is worth a word.
    """

    def __init__(self, every: int = 50, threshold: float = -1.0) -> None:
        super().__init__(every)
        self.threshold = threshold

    def write(self, record: dict[str, Any]) -> None:
        reward = record.get("chosen_reward")
        if self.told or reward is None or not reward < self.threshold:
            return
        self.told = True
        margin = record.get("reward_margin", math.nan)
        says = (
            "the margin still grows because the rejected ones fall faster: DPO "
            "often does this, and answers may get worse if it goes on"
            if margin > 0
            else "and the margin is not positive: training diverges"
        )
        say(
            f"Warning: at step {record['step']} the chosen reward is "
            f"{reward:.2f}: the chosen completions are less likely than under "
            f"the reference; {says}. Try a lower learning rate, a larger beta, "
            "an sft term (loss_type sigmoid,sft), or dpop."
        )
