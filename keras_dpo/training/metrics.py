"""Metrics of `fit` and `evaluate`, each a ratio of sums.

Every metric is a `keras.metrics.Mean` weighted by the pairs' own weights or
the completion tokens, so it is invariant to a short last batch, gradient
accumulation and sharding.
"""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import keras

from keras_dpo.errors import UserError
from keras_dpo.losses import PairLogProbs
from keras_dpo.scoring.vocabulary_head import TokenStatistics

Array = jax.Array
Weighted = tuple[Array, Array]

DEFAULT_METRICS = (
    "chosen_reward",
    "rejected_reward",
    "reward_margin",
    "reward_accuracy",
    "chosen_log_prob",
    "rejected_log_prob",
)
# Optional metric -> the field of TokenStatistics that it needs.
OPTIONAL_METRICS = {
    "chosen_logit": "mean_logit",
    "rejected_logit": "mean_logit",
    "entropy": "entropy",
    "token_accuracy": "top1_hit",
    "kl": None,
    "chosen_length": None,
    "rejected_length": None,
}


def make_metrics(optional: Collection[str] = ()) -> list[keras.metrics.Mean]:
    """Create the default metrics and the named optional ones.

    Raises:
        ValueError: A name is unknown.
    """
    unknown = [name for name in optional if name not in OPTIONAL_METRICS]
    if unknown:
        raise UserError(
            f"Unknown metric {unknown[0]!r}. On request there are: "
            f"{', '.join(OPTIONAL_METRICS)}; always reported: loss, "
            f"{', '.join(DEFAULT_METRICS)}."
        )
    names = [*DEFAULT_METRICS, *dict.fromkeys(optional)]
    return [keras.metrics.Mean(name=name) for name in names]


def pair_statistics(
    policy: PairLogProbs,
    reference: PairLogProbs,
    rewards: Array,
    statistics: TokenStatistics,
    weight: Array,
) -> dict[str, Weighted]:
    """Values and weights of every metric that the inputs determine.

    Args:
        policy: The policy's log-probs.
        reference: The reference's log-probs; zeros without a reference.
        rewards: Rewards of shape `(pairs, 2)`.
        statistics: Fields are `(pairs, 2, tokens)` or None.
        weight: `(pairs,)`, 0 for rows that pad a short batch.
    """
    margin = rewards[:, 0] - rewards[:, 1]
    # A tie counts as one half.
    accuracy = 0.5 * (1.0 + jnp.sign(margin))
    per_pair = {
        "chosen_reward": rewards[:, 0],
        "rejected_reward": rewards[:, 1],
        "reward_margin": margin,
        "reward_accuracy": accuracy,
        "chosen_log_prob": policy.chosen,
        "rejected_log_prob": policy.rejected,
        "chosen_length": policy.lengths[:, 0],
        "rejected_length": policy.lengths[:, 1],
    }
    values = {name: (value, weight) for name, value in per_pair.items()}
    tokens = policy.mask * weight[:, None, None]
    # Schulman's k3 estimator, never negative. Tokens come from the data, not
    # from the policy, so it is a distance rather than the true divergence.
    ratio = (policy.log_probs - reference.log_probs) * policy.mask
    values["kl"] = (jnp.expm1(jnp.minimum(-ratio, 80.0)) + ratio, tokens)
    if statistics.entropy is not None:
        values["entropy"] = (statistics.entropy, tokens)
    if statistics.top1_hit is not None:
        values["token_accuracy"] = (statistics.top1_hit[:, 0], tokens[:, 0])
    if statistics.mean_logit is not None:
        for index, name in enumerate(("chosen_logit", "rejected_logit")):
            logits = statistics.mean_logit[:, index]
            values[name] = (logits, tokens[:, index])
    return values
