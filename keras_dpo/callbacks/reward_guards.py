"""Guards that diagnose rewards and losses that go wrong."""

import math
from typing import Any

import jax.numpy as jnp

from keras_dpo.callbacks.step_logger import StepLogger
from keras_dpo.data.dataset import PreferenceDataset
from keras_dpo.references.base import vocabulary_size
from keras_dpo.utils.messages import say

# Mean log-ratio to the reference per completion, in nats. A hundred steps at a
# sensible learning rate go far beyond it.
HARDLY_MOVED = 0.01


class _SaidOnce(StepLogger):
    """Base class that warns only once, even across a resume."""

    told = False

    def get_state(self) -> dict[str, Any]:
        return {**super().get_state(), "told": self.told}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self.told = state["told"]


class StuckLossGuard(_SaidOnce):
    """Explains why rewards stay at zero and the loss at its initial value.

    For the sigmoid loss that is ln 2 = 0.693.

    Args:
        every: Optimizer steps between checks that the policy has moved at all.
            From five times as many on, and when training ends, it also warns
            of a policy that has hardly moved.
    """

    def __init__(self, every: int = 20) -> None:
        super().__init__(every)
        self._last: dict[str, Any] = {}

    def write(self, record: dict[str, Any]) -> None:
        # Before the first update every reward is 0.
        if "end_of_epoch" in record or record["step"] < max(self.every, 2):
            return
        self._last = record
        nats = self._nats(record)
        if nats < 1e-6:
            self._tell(record, "every reward is still 0")
        elif record["step"] >= 5 * self.every:
            self._tell_if_hardly_moved()

    def on_train_end(self, logs: Any = None) -> None:
        self._tell_if_hardly_moved()

    def _tell_if_hardly_moved(self) -> None:
        if self._last and self._nats(self._last) < HARDLY_MOVED:
            self._tell(self._last, "the policy has hardly moved")

    def _nats(self, record: dict[str, Any]) -> float:
        """The larger absolute mean log-ratio to the reference, in nats."""
        rewards = [
            abs(record.get(f"{side}_reward", math.nan))
            for side in ("chosen", "rejected")
        ]
        if any(map(math.isnan, rewards)):
            return math.inf
        return max(rewards) / (self._model.preference_loss.beta or 1.0)

    def _tell(self, record: dict[str, Any], what: str) -> None:
        if self.told:
            return
        self.told = True
        loss = record.get("loss", math.nan)
        say(
            f"Warning: after {record['step']} steps {what} "
            f"(loss {loss:.4f}): {why_stuck(self.model)}"
        )


def why_stuck(model: Any) -> str:
    """Explain zero rewards from the weights and the optimizer."""
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
    if reference.keeps_snapshot:
        moved = any(
            bool(jnp.any(own.value != policy.value.astype(own.dtype)))
            for own, policy in reference.variable_pairs()
        )
        if moved:
            return (
                "the weights do move, but too little to be seen in the "
                f"log-probs of {model.policy.compute_dtype}. Raise the "
                f"learning rate ({rate:.3g} now): full fine-tuning takes 5e-7 "
                "to 2e-5, LoRA adapters 1e-5 to 5e-4."
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
        every: Optimizer steps that each check averages over.
        threshold: Chosen reward, in nats times beta, below which to warn.
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


class CollapseGuard(StepLogger):
    """Ends training when the policy does no better than guessing.

    A learning rate that is far too large can leave finite weights that give
    every token about the same log-prob, or make chosen completions impossible.
    Nothing is NaN then, and nothing else stops the run. Needs a reference to
    compare with.

    Args:
        every: Optimizer steps that each check averages over.

    Raises:
        FloatingPointError: In `fit`, when the policy has collapsed.
    """

    def __init__(self, every: int = 10) -> None:
        super().__init__(every)
        self._dataset: PreferenceDataset | None = None

    def before_fit(self, dataset: PreferenceDataset) -> None:
        self._dataset = dataset

    def write(self, record: dict[str, Any]) -> None:
        if not self._model.reference.compares:
            return
        vocabulary = vocabulary_size(self._model.policy)
        log_prob = record.get("chosen_log_prob")
        if vocabulary is None or log_prob is None or self._dataset is None:
            return
        guess = -math.log(vocabulary)
        # A coarse test on mean lengths of the whole dataset: those of the
        # record, and its weights, differ.
        if not log_prob / self._dataset.pairs.lengths[:, 1].mean() < guess / 2:
            return
        batch = self._dataset.make_batch(self._dataset.batch_indices(0))
        now, began = (
            float(found.chosen.sum() / found.lengths[:, 0].sum())
            for found in self.model.pair_log_probs_of(batch)
        )
        # Random weights start at guessing level and have nothing to lose.
        if now >= 0.8 * guess or not began > 0.6 * guess:
            return
        raise FloatingPointError(
            f"The policy has collapsed: at step {record['step']} the chosen "
            f"completions have {now:.2f} nats a token, under the reference "
            f"{began:.2f}, and guessing among {vocabulary:,} tokens has "
            f"{guess:.2f}. Likely cause: training diverged at learning rate "
            f"{float(self._model.optimizer.learning_rate):.3g}. Lower it, or "
            "clip gradients (clip_norm 1.0)."
        )
