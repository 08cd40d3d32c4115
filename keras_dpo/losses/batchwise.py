"""Losses that couple a batch's pairs, or keep a running mean over steps.

They see the *global* batch of a mesh. Under gradient accumulation they see
one micro-batch at a time, so accumulation changes their value.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.nn import log_sigmoid

from keras_dpo.losses.base import (
    Array,
    PairLogProbs,
    PreferenceLoss,
    log_ratios,
)
from keras_dpo.losses.pairwise import loss_class, register, smoothed_log_loss


def is_real_pair(pair: PairLogProbs) -> Array:
    """False for the empty rows that pad a short batch, `(pairs,)`."""
    return jnp.min(pair.lengths, axis=-1) > 0


def sorted_difference(x: Array, y: Array, real: Array) -> Array:
    """sort(x) - sort(y) over the real pairs, then zeros, `(pairs,)`."""
    last = jnp.inf
    difference = jnp.sort(jnp.where(real, x, last)) - jnp.sort(
        jnp.where(real, y, last)
    )
    return jnp.where(jnp.arange(x.shape[0]) < jnp.sum(real), difference, 0.0)


@register
@loss_class
class AOT(PreferenceLoss):
    """Smoothed log loss of beta q, q = sort(c - r) - sort(c0 - r0).

    Stochastic dominance of the policy's margins over the reference's. The
    value at position i belongs to the i-th smallest margin, not to pair i.

    Args:
        label_smoothing: e, in [0, 1).

    Reference: [Melnyk et al., 2024](https://arxiv.org/abs/2406.05882),
    algorithm 1 (paired).
    """

    label_smoothing: float = 0.0
    sorts_pairs = True
    couples_pairs = True

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        q = sorted_difference(
            policy.chosen - policy.rejected,
            reference.chosen - reference.rejected,
            is_real_pair(policy),
        )
        return smoothed_log_loss(self.beta * q, self.label_smoothing)


@register
@loss_class
class AOTUnpaired(PreferenceLoss):
    """Smoothed log loss of beta q, q = sort(w) - sort(l).

    Args:
        label_smoothing: e, in [0, 1).

    Reference: [Melnyk et al., 2024](https://arxiv.org/abs/2406.05882),
    algorithm 1 (unpaired).
    """

    label_smoothing: float = 0.0
    sorts_pairs = True
    couples_pairs = True

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        ratios = log_ratios(policy, reference)
        q = sorted_difference(ratios[:, 0], ratios[:, 1], is_real_pair(policy))
        return smoothed_log_loss(self.beta * q, self.label_smoothing)


class _RunningMean:
    """Keeps an exponential mean of a batch statistic in a Keras variable."""

    momentum: float

    def make_mean(self) -> keras.Variable:
        return keras.Variable(
            "zeros",
            shape=(),
            dtype="float32",
            trainable=False,
            name="running_mean",
        )

    def move_mean(
        self, mean: keras.Variable, values: Array, real: Array
    ) -> None:
        batch_mean = jnp.sum(values * real) / jnp.maximum(jnp.sum(real), 1.0)
        batch_mean = jax.lax.stop_gradient(batch_mean)
        moved = self.momentum * mean + (1.0 - self.momentum) * batch_mean
        # A micro-batch of a short batch can hold only empty rows.
        mean.assign(jnp.where(jnp.any(real), moved, mean.value))


@register
@loss_class
class BCOPair(_RunningMean, PreferenceLoss):
    """-log S(beta w - D) - log S(-(beta l - D)).

    Args:
        delta: `None` for D = 0, or `"ema"` for the running mean of both
            rewards, outside the gradient.
        momentum: Share of the old mean that a step keeps.

    Reference: [Jung et al., 2024](https://arxiv.org/abs/2404.04656), eq. 10
    and 11.
    """

    delta: str | None = None
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.delta not in (None, "ema"):
            raise ValueError(
                "`delta` of loss 'bco_pair' must be None or 'ema'. "
                f"Received: delta={self.delta!r}."
            )
        super().__post_init__()
        self.running_mean: Any = self.make_mean() if self.delta else None

    @property
    def variables(self) -> list[keras.Variable]:
        return [self.running_mean] if self.delta else []

    def update_state(
        self, policy: PairLogProbs, reference: PairLogProbs
    ) -> None:
        if self.delta:
            values = jnp.mean(self.rewards(policy, reference), axis=-1)
            self.move_mean(self.running_mean, values, is_real_pair(policy))

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        delta = self.running_mean.value if self.delta else 0.0
        reward = self.rewards(policy, reference) - delta
        return -log_sigmoid(reward[:, 0]) - log_sigmoid(-reward[:, 1])


@register
@loss_class
class BetaDPO(_RunningMean, PreferenceLoss):
    """Sigmoid loss with one beta per batch: beta (1 + alpha (m - m0)).

    m is the batch's mean reward margin, m0 its running mean; no gradient
    flows through either, and the scaled beta stays above 1e-3.

    Args:
        alpha: How far beta follows the margin.
        momentum: Share of the old mean that a step keeps.

    Reference: [Wu et al., 2024](https://arxiv.org/abs/2407.08639), eq. 7
    and 8.
    """

    alpha: float = 0.6
    momentum: float = 0.9
    couples_pairs = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.running_mean = self.make_mean()

    @property
    def variables(self) -> list[keras.Variable]:
        return [self.running_mean]

    def margins(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        """Reward margins at the loss's own beta, `(pairs,)`."""
        reward = self.rewards(policy, reference)
        return reward[:, 0] - reward[:, 1]

    def update_state(
        self, policy: PairLogProbs, reference: PairLogProbs
    ) -> None:
        values = self.margins(policy, reference)
        self.move_mean(self.running_mean, values, is_real_pair(policy))

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        margins = self.margins(policy, reference)
        real = is_real_pair(policy)
        mean = jnp.sum(margins * real) / jnp.maximum(jnp.sum(real), 1.0)
        scale = 1.0 + self.alpha * (mean - self.running_mean.value)
        scale = jnp.maximum(scale, 1e-3 / self.beta)
        return -log_sigmoid(jax.lax.stop_gradient(scale) * margins)


@register
@loss_class
class SFT(PreferenceLoss):
    """Negative log-likelihood per chosen token of the whole batch.

    Each pair's value is its own tokens' sum times pairs over tokens, so that
    the mean over pairs is -(sum of chosen log-probs) / (number of tokens).
    Meant as a term of a weighted sum; needs no reference.

    Reference: [Pang et al., 2024](https://arxiv.org/abs/2404.19733), eq. 1;
    [Liu et al., 2024](https://arxiv.org/abs/2405.16436).
    """

    beta: Any = dataclasses.field(default=None, init=False)
    # The oracle does not discount the likelihood term under length
    # desensitisation, which is about margins.
    ld_alpha: Any = dataclasses.field(default=None, init=False)
    needs_reference = False
    couples_pairs = True

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        tokens = policy.lengths[:, 0]
        pairs_per_token = jnp.sum(tokens > 0) / jnp.maximum(jnp.sum(tokens), 1)
        return -policy.chosen * pairs_per_token
