"""Losses of one pair at a time, relative to a reference.

Notation: w and l are the log-ratios of the chosen and the rejected
completion, d the difference of their divergence scores, e label smoothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
import keras
from jax.nn import log_sigmoid, sigmoid

from keras_dpo.losses.base import (
    Array,
    PairLogProbs,
    PreferenceLoss,
    divergence_score,
    log_ratios,
)

register = keras.saving.register_keras_serializable(package="keras_dpo")
loss_class = dataclasses.dataclass(eq=False, repr=False)


# Limit of a score that is squared: the squares of a thousand pairs, and their
# slopes, still add up within float32's range. (exp(40) is a little less.)
LARGEST_SQUARED_SCORE = 2.5e17


def smoothed_log_loss(x: Array, label_smoothing: float) -> Array:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x), elementwise."""
    return -(1.0 - label_smoothing) * log_sigmoid(
        x
    ) - label_smoothing * log_sigmoid(-x)


@loss_class
class _DivergenceLoss(PreferenceLoss):
    """Adds the choice of an f-divergence to a loss of d."""

    f_divergence: str = dataclasses.field(default="reverse_kl", kw_only=True)
    f_alpha: float = dataclasses.field(default=0.5, kw_only=True)

    def scores(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        """Divergence scores, `(pairs, 2)`."""
        ratios = log_ratios(policy, reference)
        return divergence_score(ratios, self.f_divergence, self.f_alpha)

    def logits(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        """beta * d, `(pairs,)`."""
        scores = self.scores(policy, reference)
        return self.beta * (scores[:, 0] - scores[:, 1])


@register
@loss_class
class Sigmoid(_DivergenceLoss):
    """-(1-e) log sigmoid(beta d) - e log sigmoid(-beta d).

    Args:
        label_smoothing: Assumed share e of flipped labels, in [0, 1).

    Reference: [Rafailov et al., 2023](https://arxiv.org/abs/2305.18290),
    eq. 7; smoothing from Mitchell's [note on cDPO](
    https://ericmitchell.ai/cdpo.pdf), eq. 3.
    """

    label_smoothing: float = 0.0

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        return smoothed_log_loss(
            self.logits(policy, reference), self.label_smoothing
        )


@register
@loss_class
class Hinge(_DivergenceLoss):
    """max(0, 1 - beta d).

    Reference: [SLiC, Zhao et al., 2023](https://arxiv.org/abs/2305.10425);
    [RSO, Liu et al., 2023](https://arxiv.org/abs/2309.06657), eq. 8.
    """

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        return jax.nn.relu(1.0 - self.logits(policy, reference))


@register
@loss_class
class IPO(_DivergenceLoss):
    """(s(w)/n_chosen - s(l)/n_rejected - 1/(2 beta))^2.

    Args:
        length_average: Whether to divide by the completions' lengths, as the
            authors do in their experiments. The paper's formula does not.

    Reference: [Azar et al., 2023](https://arxiv.org/abs/2310.12036), eq. 17.
    """

    length_average: bool = True

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        scores = self.scores(policy, reference)
        if self.length_average:
            scores = scores / jnp.maximum(policy.lengths, 1.0)
        limit = LARGEST_SQUARED_SCORE
        scores = jnp.clip(scores, -limit, limit)
        margin = scores[:, 0] - scores[:, 1]
        return (margin - 1.0 / (2.0 * self.beta)) ** 2


@register
@loss_class
class ExoPair(_DivergenceLoss):
    """KL from the policy's softmax over the pair to the labels (1-e, e).

    S(x)[log S(x) - log(1-e)] + S(-x)[log S(-x) - log e] with x = beta d.

    Args:
        label_smoothing: e, above 0 and below 1.

    Reference: [Ji et al., 2024](https://arxiv.org/abs/2402.00856), eq. 16.
    """

    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        if self.label_smoothing <= 0:
            raise ValueError(
                "`label_smoothing` of loss 'exo_pair' must be above 0: the "
                "loss takes its logarithm. Received: "
                f"label_smoothing={self.label_smoothing!r}. Leave it out for "
                "the paper's 1e-3."
            )
        super().__post_init__()

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        x, e = self.logits(policy, reference), self.label_smoothing
        return sigmoid(x) * (log_sigmoid(x) - jnp.log1p(-e)) + sigmoid(-x) * (
            log_sigmoid(-x) - jnp.log(e)
        )


@register
@loss_class
class NCAPair(PreferenceLoss):
    """-log S(beta w) - 0.5 log S(-beta w) - 0.5 log S(-beta l).

    Reference: [Chen et al., 2024](https://arxiv.org/abs/2402.05369), eq. 11.
    """

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        reward = self.rewards(policy, reference)
        return -log_sigmoid(reward[:, 0]) - 0.5 * jnp.sum(
            log_sigmoid(-reward), axis=-1
        )


@register
@loss_class
class Robust(_DivergenceLoss):
    """[-(1-e) log S(beta d) + e log S(-beta d)] / (1 - 2e).

    Its expectation under labels flipped at rate e is the clean loss.

    Args:
        label_smoothing: Rate e of flipped labels, in [0, 0.5).

    Reference: [Chowdhury et al., 2024](https://arxiv.org/abs/2403.00409),
    eq. 12.
    """

    label_smoothing: float = 0.0

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        x, e = self.logits(policy, reference), self.label_smoothing
        clean = -(1.0 - e) * log_sigmoid(x) + e * log_sigmoid(-x)
        return clean / (1.0 - 2.0 * e)


@register
@loss_class
class SPPOHard(PreferenceLoss):
    """(w - 1/(2 beta))^2 + (l + 1/(2 beta))^2.

    Reference: [Wu et al., 2024](https://arxiv.org/abs/2405.00675), eq. 4.7
    with the winner's probability set to 1.
    """

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        ratios = log_ratios(policy, reference)
        return calibration_error(ratios, self.beta)


def calibration_error(ratios: Array, beta: float) -> Array:
    """Squared distances of the log-ratios from +-1/(2 beta), `(pairs,)`."""
    target = jnp.array([0.5 / beta, -0.5 / beta], ratios.dtype)
    return jnp.sum((ratios - target) ** 2, axis=-1)


@register
@loss_class
class APOZero(PreferenceLoss):
    """1 - S(beta w) + S(beta l): chosen up, rejected down.

    Reference: [D'Oosterlinck et al., 2024](https://arxiv.org/abs/2408.06266),
    eq. 7.
    """

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        reward = self.rewards(policy, reference)
        return sigmoid(-reward[:, 0]) + sigmoid(reward[:, 1])


@register
@loss_class
class APODown(PreferenceLoss):
    """S(beta w) + 1 - S(beta (w - l)): both down, the rejected further.

    Reference: [D'Oosterlinck et al., 2024](https://arxiv.org/abs/2408.06266),
    eq. 8.
    """

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        reward = self.rewards(policy, reference)
        return sigmoid(reward[:, 0]) + sigmoid(reward[:, 1] - reward[:, 0])


@register
@loss_class
class DiscoPOP(_DivergenceLoss):
    """-log S(x) (1 - m) + exp(-x) m with x = beta d and m = S(x / tau).

    Args:
        tau: Temperature of the mixing. Positive.

    Reference: [Lu et al., 2024](https://arxiv.org/abs/2406.08414), eq. 5.
    """

    tau: float = 0.05

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        x = self.logits(policy, reference)
        mixing = sigmoid(x / self.tau)
        # exp(-x) S(x / tau) = exp(log S(x / tau) - x) cannot overflow where
        # the mixing vanishes faster than exp(-x) grows (tau < 1).
        exponential = jnp.exp(jnp.minimum(log_sigmoid(x / self.tau) - x, 80.0))
        return -log_sigmoid(x) * (1.0 - mixing) + exponential


@register
@loss_class
class SigmoidNorm(_DivergenceLoss):
    """-log S(beta (s(w)/n_chosen - s(l)/n_rejected)).

    Reference: [Lambert et al., 2024](https://arxiv.org/abs/2411.15124),
    eq. 6.
    """

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        scores = self.scores(policy, reference)
        average = scores / jnp.maximum(policy.lengths, 1.0)
        return -log_sigmoid(self.beta * (average[:, 0] - average[:, 1]))


@register
@loss_class
class DPOP(PreferenceLoss):
    """-log S(beta (w - l - lambda max(0, -w))).

    Args:
        dpop_lambda: Penalty on a chosen completion that falls below the
            reference. The paper uses 50.

    Reference: [Pal et al., 2024](https://arxiv.org/abs/2402.13228), eq. 3.
    """

    dpop_lambda: float = 50.0

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        ratios = log_ratios(policy, reference)
        penalty = self.dpop_lambda * jax.nn.relu(-ratios[:, 0])
        margin = ratios[:, 0] - ratios[:, 1] - penalty
        return -log_sigmoid(self.beta * margin)


@register
@loss_class
class ChiPO(PreferenceLoss):
    """-log S(beta (s(w) - s(l))) with s(x) = exp(clip(x, -88, 20)) + x.

    The chi-squared divergence added to KL keeps rare completions from being
    over-optimised.

    Reference: [Huang et al., 2024](https://arxiv.org/abs/2407.13399),
    algorithm 1 and figure 1.
    """

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        ratios = log_ratios(policy, reference)
        scores = jnp.exp(jnp.clip(ratios, -88.0, 20.0)) + ratios
        return -log_sigmoid(self.beta * (scores[:, 0] - scores[:, 1]))


@register
@loss_class
class CalDPO(PreferenceLoss):
    """-log S(beta (w - l)) + (w - 1/(2 beta))^2 + (l + 1/(2 beta))^2.

    Reference: [Xiao et al., 2024](https://arxiv.org/abs/2412.14516).
    """

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        ratios = log_ratios(policy, reference)
        contrast = -log_sigmoid(self.beta * (ratios[:, 0] - ratios[:, 1]))
        return contrast + calibration_error(ratios, self.beta)


@register
@loss_class
class RDPO(PreferenceLoss):
    """-log S(beta (w - l) + alpha (n_chosen - n_rejected)).

    The sign follows from the paper's objective, reward minus alpha times
    length: its optimum has r = beta log(pi/ref) + alpha n, so a chosen
    completion that is longer needs a *smaller* margin.

    Args:
        alpha: Nats of margin per token of difference in length.

    Reference: [Park et al., 2024](https://arxiv.org/abs/2403.19159), eq. 9.
    """

    alpha: float = 0.01

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        ratios = log_ratios(policy, reference)
        lengths = policy.lengths
        excess = self.alpha * (lengths[:, 0] - lengths[:, 1])
        return -log_sigmoid(self.beta * (ratios[:, 0] - ratios[:, 1]) + excess)


@register
@loss_class
class ODPO(PreferenceLoss):
    """-log S(beta (w - l) - alpha * margin), with the data's own margin.

    Args:
        alpha: Scale of the `margin` column.

    Reference: [Amini et al., 2024](https://arxiv.org/abs/2402.10571), eq. 8,
    with the identity as the scaling function.
    """

    alpha: float = 1.0

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        ratios = log_ratios(policy, reference)
        margin = 0.0 if policy.margin is None else policy.margin
        return -log_sigmoid(
            self.beta * (ratios[:, 0] - ratios[:, 1]) - self.alpha * margin
        )
