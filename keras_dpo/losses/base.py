"""Base classes and building blocks of the preference losses."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
from jax.nn import log_sigmoid

Array = jax.Array


class PairLogProbs(NamedTuple):
    """Log-probabilities of the completion tokens of a batch of pairs.

    Index 0 of the second axis is the chosen completion, index 1 the rejected.

    Args:
        log_probs: `(pairs, 2, tokens)`, float32, nats.
        mask: `(pairs, 2, tokens)`, 1 for a completion token, else 0.
        log_sum_squared_probs: `(pairs, 2, tokens)` or None. The logarithm of
            the sum over the vocabulary of squared probabilities; only `wpo`
            reads it.
        margin: `(pairs,)` or None. The data's own margin; only `odpo` reads
            it.
    """

    log_probs: Array
    mask: Array
    log_sum_squared_probs: Array | None = None
    margin: Array | None = None

    @property
    def sums(self) -> Array:
        """Log-probabilities of whole completions, `(pairs, 2)`."""
        return jnp.sum(self.log_probs * self.mask, axis=-1)

    @property
    def chosen(self) -> Array:
        """Log-probabilities of the chosen completions, `(pairs,)`."""
        return self.sums[:, 0]

    @property
    def rejected(self) -> Array:
        """Log-probabilities of the rejected completions, `(pairs,)`."""
        return self.sums[:, 1]

    @property
    def lengths(self) -> Array:
        """Numbers of completion tokens, `(pairs, 2)`, float32."""
        return jnp.sum(self.mask.astype("float32"), axis=-1)


def log_ratios(policy: PairLogProbs, reference: PairLogProbs) -> Array:
    """log policy/reference of whole completions, `(pairs, 2)`, nats."""
    return policy.sums - reference.sums


def divergence_score(
    log_ratios: Array, f_divergence: str = "reverse_kl", f_alpha: float = 0.5
) -> Array:
    """The score `f'(exp(x))` of a log-ratio x, up to a constant.

    Reference: [Wang et al., 2023](https://arxiv.org/abs/2309.16240), table 1.
    """
    x = log_ratios
    if f_divergence == "reverse_kl":
        return x
    if f_divergence == "forward_kl":
        # The cap keeps the gradient of an extreme ratio finite.
        return 1.0 - jnp.exp(jnp.minimum(-x, 80.0))
    if f_divergence == "js":
        return jnp.log(2.0) + log_sigmoid(x)
    if f_divergence == "alpha":
        power = f_alpha - 1.0
        if abs(power) < 1e-6:
            return x
        return jnp.expm1(jnp.minimum(power * x, 80.0)) / power
    raise ValueError(
        "`f_divergence` must be one of 'reverse_kl', 'forward_kl', 'js', "
        f"'alpha'. Received: f_divergence={f_divergence!r}."
    )


def discount_excess_tokens(pair: PairLogProbs, ld_alpha: float) -> PairLogProbs:
    """Weight tokens beyond the length of the shorter completion by `ld_alpha`.

    Reference: [Liu et al., 2024](https://arxiv.org/abs/2409.06411), eq. 10.
    """
    position = jnp.cumsum(pair.mask, axis=-1)
    shared = jnp.min(pair.lengths, axis=-1)[:, None, None]
    factor = jnp.where(position <= shared, 1.0, ld_alpha)
    return pair._replace(log_probs=pair.log_probs * factor)


def wpo_weights(policy: PairLogProbs) -> Array:
    """Weights of pairs by their likelihood under the policy, `(pairs,)`.

    The product over both completions of exp(mean over tokens of
    [log p_t - log sum_v p_v^2]), without gradient.

    Reference: [Zhou et al., 2024](https://arxiv.org/abs/2406.11827), eq. 2.
    """
    if policy.log_sum_squared_probs is None:
        raise ValueError(
            "wpo=True needs `log_sum_squared_probs` in the policy's "
            "PairLogProbs. Received: None."
        )
    aligned = (policy.log_probs - policy.log_sum_squared_probs) * policy.mask
    means = jnp.sum(aligned, axis=-1) / jnp.maximum(policy.lengths, 1.0)
    return jax.lax.stop_gradient(jnp.exp(jnp.sum(means, axis=-1)))


@dataclasses.dataclass(eq=False, repr=False)
class PreferenceLoss(keras.losses.Loss):
    """Base class of the losses: one value per pair of completions.

    A subclass overrides `formula`, or `per_pair` when it wants neither
    `ld_alpha` nor `wpo`. Fields of a `dataclasses.dataclass` subclass become
    arguments, config entries and command-line options.

    Args:
        beta: Strength of the pull towards the reference; also the scale of
            the rewards. Positive.
        ld_alpha: Weight in [0, 1] of tokens beyond the shorter completion's
            length, in policy and reference alike. None: all count fully.
        wpo: Whether to weight pairs by their likelihood under the policy.

    Example:

    ```python
    @keras.saving.register_keras_serializable(package="mine")
    class ExponentialLoss(keras_dpo.losses.PreferenceLoss):
        def per_pair(self, policy, reference):
            margin = (policy.chosen - reference.chosen) - (
                policy.rejected - reference.rejected
            )
            return keras.ops.exp(-self.beta * margin)
    ```
    """

    beta: float = 0.1
    ld_alpha: float | None = dataclasses.field(default=None, kw_only=True)
    wpo: bool = dataclasses.field(default=False, kw_only=True)

    # What a loss needs and does to a batch: facts of the class, not options.
    needs_reference = True
    averages_log_probs = False
    sorts_pairs = False
    couples_pairs = False

    def __post_init__(self) -> None:
        super().__init__(name=type(self).__name__)
        _check_options(self)

    @property
    def needs_squared_probs(self) -> bool:
        """Whether `policy.log_sum_squared_probs` is required."""
        return self.wpo

    @property
    def needs_token_log_probs(self) -> bool:
        """Whether the reference's log-probs are needed token by token."""
        return self.ld_alpha is not None

    @property
    def variables(self) -> list[keras.Variable]:
        """State carried from step to step; most losses have none."""
        return []

    def update_state(
        self, policy: PairLogProbs, reference: PairLogProbs
    ) -> None:
        """Update `variables` after a training step."""

    def per_pair(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        """The loss of every pair, `(pairs,)`."""
        discounted, discounted_reference = policy, reference
        if self.ld_alpha is not None:
            discounted = discount_excess_tokens(policy, self.ld_alpha)
            discounted_reference = discount_excess_tokens(
                reference, self.ld_alpha
            )
        values = self.formula(discounted, discounted_reference)
        return values * wpo_weights(policy) if self.wpo else values

    def formula(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        """The bare formula of every pair, `(pairs,)`; for subclasses."""
        raise NotImplementedError

    def rewards(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        """The implicit rewards, `(pairs, 2)`; eq. 5 of the DPO paper."""
        scale = 1.0 if self.beta is None else self.beta
        if self.averages_log_probs and not self.needs_reference:
            return scale * average_log_probs(policy)
        return scale * log_ratios(policy, reference)

    def call(self, y_true: PairLogProbs, y_pred: PairLogProbs) -> Array:
        """`per_pair(policy=y_pred, reference=y_true)`, as Keras calls it."""
        return self.per_pair(y_pred, y_true)

    def __call__(
        self,
        y_true: PairLogProbs,
        y_pred: PairLogProbs,
        sample_weight: Array | None = None,
    ) -> Array:
        """The weighted mean over pairs, a scalar."""
        values = self.call(y_true, y_pred)
        if sample_weight is None:
            return jnp.mean(values)
        return jnp.sum(values * sample_weight) / jnp.maximum(
            jnp.sum(sample_weight), 1e-9
        )

    def get_config(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in option_names(type(self))}

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.get_config().items())
        return f"{type(self).__name__}({options})"


def average_log_probs(pair: PairLogProbs) -> Array:
    """Mean log-probability of a completion's tokens, `(pairs, 2)`, nats."""
    return pair.sums / jnp.maximum(pair.lengths, 1.0)


def option_names(loss_class: type[PreferenceLoss]) -> list[str]:
    """Names of the options that a loss class reads."""
    return [f.name for f in dataclasses.fields(loss_class) if f.init]


def _check_options(loss: PreferenceLoss) -> None:
    def check(name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(
                f"`{name}` of loss {loss.name} must be {rule}. "
                f"Received: {name}={getattr(loss, name)!r}."
            )

    options = loss.get_config()
    for name in ("beta", "tau", "orpo_lambda"):
        if name in options:
            value = options[name]
            number = isinstance(value, int | float) and value > 0
            check(name, number, "a number above 0")
    if "label_smoothing" in options:
        below = 0.5 if loss.name == "Robust" else 1.0
        value = options["label_smoothing"]
        check("label_smoothing", 0 <= value < below, f"in [0, {below})")
    if "f_divergence" in options:
        # Raises on an unknown name; computes nothing.
        jax.eval_shape(
            lambda x: divergence_score(x, options["f_divergence"]),
            jax.ShapeDtypeStruct((), "float32"),
        )
        unread = (
            options["f_divergence"] != "alpha" and options["f_alpha"] != 0.5
        )
        check("f_alpha", not unread, "left out unless f_divergence='alpha'")
    if loss.ld_alpha is not None:
        check("ld_alpha", 0 <= loss.ld_alpha <= 1, "in [0, 1]")
    own = type(loss).per_pair is not PreferenceLoss.per_pair
    if own and (loss.wpo or loss.ld_alpha is not None):
        raise ValueError(
            f"{type(loss).__name__} overrides `per_pair`, so it does not read "
            "ld_alpha and wpo. Override `formula` instead."
        )


@keras.saving.register_keras_serializable(package="keras_dpo")
class FunctionLoss(PreferenceLoss):
    """A plain function `f(policy, reference) -> (pairs,)` as a loss.

    Rewards are unscaled log-ratios. It can be saved when the function is
    registered with `keras.saving.register_keras_serializable`.
    """

    def __init__(self, function: Callable[..., Array]) -> None:
        self.function = function
        super().__init__(beta=1.0)

    def per_pair(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        return self.function(policy, reference)

    def get_config(self) -> dict[str, Any]:
        return {"function": keras.saving.serialize_keras_object(self.function)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FunctionLoss":
        return cls(keras.saving.deserialize_keras_object(config["function"]))


@keras.saving.register_keras_serializable(package="keras_dpo")
class WeightedSum(PreferenceLoss):
    """A weighted sum of losses, such as MPO's 0.8, 0.2 and 1.

    Rewards are those of the first loss that has a beta.

    Args:
        losses: A list of `PreferenceLoss`.
        weights: A list of numbers, one for each.

    Reference: [Wang et al., 2024](https://arxiv.org/abs/2411.10442).
    """

    def __init__(
        self, losses: list[PreferenceLoss], weights: list[float]
    ) -> None:
        if not losses or len(losses) != len(weights):
            raise ValueError(
                "A weighted sum needs one weight for each loss. Received: "
                f"{len(losses)} losses, {len(weights)} weights."
            )
        self.losses = losses
        self.weights = [float(weight) for weight in weights]
        main = next((x for x in losses if x.beta is not None), losses[0])
        self.main = main
        super().__init__(beta=main.beta if main.beta is not None else 1.0)
        for fact in ("needs_reference", "sorts_pairs", "couples_pairs"):
            setattr(self, fact, any(getattr(x, fact) for x in losses))

    @property
    def needs_squared_probs(self) -> bool:
        return any(loss.needs_squared_probs for loss in self.losses)

    @property
    def needs_token_log_probs(self) -> bool:
        return any(loss.needs_token_log_probs for loss in self.losses)

    @property
    def variables(self) -> list[keras.Variable]:
        return [v for loss in self.losses for v in loss.variables]

    def update_state(
        self, policy: PairLogProbs, reference: PairLogProbs
    ) -> None:
        for loss in self.losses:
            loss.update_state(policy, reference)

    def per_pair(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        values = [
            weight * loss.per_pair(policy, reference)
            for loss, weight in zip(self.losses, self.weights, strict=True)
        ]
        return jnp.sum(jnp.stack(values), axis=0)

    def rewards(self, policy: PairLogProbs, reference: PairLogProbs) -> Array:
        return self.main.rewards(policy, reference)

    def get_config(self) -> dict[str, Any]:
        return {
            "losses": [
                keras.saving.serialize_keras_object(x) for x in self.losses
            ],
            "weights": self.weights,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "WeightedSum":
        losses = [
            keras.saving.deserialize_keras_object(x) for x in config["losses"]
        ]
        return cls(losses, config["weights"])


LossLike = str | PreferenceLoss | Callable[..., Array] | Mapping[Any, float]
