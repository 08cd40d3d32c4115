"""Reference-free losses: no reference is built or run for them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.nn import log_sigmoid

from keras_dpo.losses.base import (
    Array,
    PairLogProbs,
    PreferenceLoss,
    average_log_probs,
)
from keras_dpo.losses.pairwise import loss_class, register


@register
@loss_class
class SimPO(PreferenceLoss):
    """-log S(beta (c/n_chosen - r/n_rejected) - gamma).

    Args:
        beta: Scale of the mean log-probabilities; the paper uses 2 to 10.
        gamma: Target margin.

    Reference: [Meng et al., 2024](https://arxiv.org/abs/2405.14734), eq. 6.
    """

    beta: float = 2.0
    gamma: float = 0.5
    needs_reference = False
    averages_log_probs = True

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        average = average_log_probs(policy)
        margin = average[:, 0] - average[:, 1]
        return -log_sigmoid(self.beta * margin - self.gamma)


@register
@loss_class
class ORPO(PreferenceLoss):
    """NLL(chosen) - lambda log S(log-odds(chosen) - log-odds(rejected)).

    Both terms take the mean log-probability of a completion's tokens, as the
    paper's eq. 1 defines log P(y|x); odds(p) = p / (1 - p).

    Args:
        orpo_lambda: Weight of the odds-ratio term. Positive.

    Reference: [Hong et al., 2024](https://arxiv.org/abs/2403.07691), eq. 6
    and 7.
    """

    beta: Any = dataclasses.field(default=None, init=False)
    orpo_lambda: float = 0.1
    needs_reference = False
    averages_log_probs = True

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        average = average_log_probs(policy)
        # A probability that rounds to 1 has no finite odds in float32.
        below_one = jnp.minimum(average, -1e-6)
        log_odds = below_one - jnp.log(-jnp.expm1(below_one))
        odds_ratio = log_odds[:, 0] - log_odds[:, 1]
        return -average[:, 0] - self.orpo_lambda * log_sigmoid(odds_ratio)


@register
@loss_class
class CPO(PreferenceLoss):
    """-log S(beta (c - r)) + alpha NLL(chosen).

    NLL is the mean over the chosen completion's tokens, as in the authors'
    code; the paper's eq. 5 writes the sum.

    Args:
        alpha: Weight of the likelihood term.

    Reference: [Xu et al., 2024](https://arxiv.org/abs/2401.08417), eq. 5.
    """

    alpha: float = 1.0
    needs_reference = False

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        preference = -log_sigmoid(self.beta * (policy.chosen - policy.rejected))
        return preference - self.alpha * average_log_probs(policy)[:, 0]
