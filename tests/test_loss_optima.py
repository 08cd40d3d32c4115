"""Exact results of the papers: train a table of logits until it stands still.

A "model" here is one row of logits over completions of one token; the losses
see log-probabilities of single tokens, as they would from a language model.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import sigmoid

from keras_dpo import losses
from keras_dpo.losses import PairLogProbs


def train_table(
    loss,
    logits,
    reference,
    pairs,
    weights,
    steps=4000,
    rate=0.05,
    features=None,
):
    """Minimise the expected loss over (chosen, rejected) index pairs.

    With features the parameters are a direction: logits = features @ it.
    """
    features = np.eye(len(logits)) if features is None else features
    chosen, rejected = np.array(pairs).T
    weights = jnp.asarray(weights, "float32")
    mask = jnp.ones((len(pairs), 2, 1))

    def pick(log_probs):
        both = jnp.stack([log_probs[chosen], log_probs[rejected]], axis=1)
        return PairLogProbs(both[..., None], mask)

    def objective(logits):
        policy = pick(jax.nn.log_softmax(features @ logits))
        values = loss.per_pair(policy, pick(jax.nn.log_softmax(reference)))
        return jnp.sum(weights * values)

    def step(state, index):
        logits, mean, square = state
        gradient = jax.grad(objective)(logits)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        t = index + 1.0
        update = (mean / (1 - 0.9**t)) / (
            jnp.sqrt(square / (1 - 0.999**t)) + 1e-9
        )
        decay = 0.5 * (1 + jnp.cos(jnp.pi * index / steps))
        return (logits - rate * decay * update, mean, square), None

    zeros = jnp.zeros_like(logits)
    (logits, _, _), _ = jax.lax.scan(
        step, (logits, zeros, zeros), jnp.arange(steps)
    )
    return np.asarray(jax.nn.softmax(features @ logits))


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_ipo_stops_at_its_own_target(beta):
    """Two actions, uniform reference, a always preferred.

    h(a) - h(b) = logit(p) must be 1 / (2 beta), so p(a) = S(1 / (2 beta)).
    """
    loss = losses.get("ipo", beta=beta, length_average=False)
    probs = train_table(loss, jnp.zeros(2), jnp.zeros(2), [(0, 1)], [1.0])
    assert probs[0] == pytest.approx(float(sigmoid(0.5 / beta)), abs=1e-4)


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_dpo_goes_to_one_for_every_beta(beta):
    loss = losses.get("sigmoid", beta=beta)
    probs = train_table(
        loss, jnp.zeros(2), jnp.zeros(2), [(0, 1)], [1.0], rate=1.0
    )
    assert probs[0] > 0.999


@pytest.mark.parametrize("flips", [0.1, 0.3])
def test_flipped_labels(flips):
    """True preference rate p, labels flipped at rate e, observed rate q.

    robust: unbiased, so beta h = logit(p). Plain sigmoid: logit(q) with
    q = p (1 - e) + (1 - p) e. Smoothing by e flips once more.
    """
    p, beta = 0.8, 0.5
    q = p * (1 - flips) + (1 - p) * flips
    logit = lambda x: np.log(x / (1 - x))  # noqa: E731

    def margin(name, **options):
        loss = losses.get(name, beta=beta, **options)
        probs = train_table(
            loss, jnp.zeros(2), jnp.zeros(2), [(0, 1), (1, 0)], [q, 1 - q]
        )
        return beta * logit(probs[0])

    assert margin("robust", label_smoothing=flips) == pytest.approx(
        logit(p), abs=1e-3
    )
    assert margin("sigmoid") == pytest.approx(logit(q), abs=1e-3)
    twice = q * (1 - flips) + (1 - q) * flips
    smoothed = margin("sigmoid", label_smoothing=flips)
    assert smoothed == pytest.approx(logit(twice), abs=1e-3)
    assert abs(smoothed) < abs(logit(q)) < abs(logit(p))


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_bradley_terry_gives_the_tilted_reference(beta):
    """DPO on BT pairs of a reward R: reference * exp(R / beta), normalised;
    k hard syncs at convergence: reference * exp(k R / beta)."""
    reward = np.array([0.5, -0.3, 1.0, 0.0])
    first = np.log(np.array([0.4, 0.3, 0.1, 0.2]))
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    weights = [float(sigmoid(reward[i] - reward[j])) for i, j in pairs]
    loss = losses.get("sigmoid", beta=beta)
    reference = first
    for syncs in (1, 2):
        probs = train_table(
            loss, jnp.asarray(reference), reference, pairs, weights
        )
        expected = np.exp(first + syncs * reward / beta)
        np.testing.assert_allclose(probs, expected / expected.sum(), atol=2e-3)
        reference = np.log(probs)


def test_shared_features_make_the_chosen_fall_and_dpop_keeps_it():
    """Two completions that nearly share their features, among others.

    The margin grows through the shared direction's complement while both
    probabilities fall; dpop's penalty keeps the chosen one up.
    """
    features = np.array([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0]], "float32")
    start = jnp.asarray([1.0, 0.0])
    reference = features @ start
    before = np.asarray(jax.nn.softmax(reference))

    def train(name, **options):
        return train_table(
            losses.get(name, beta=1.0, **options),
            start,
            reference,
            [(0, 1)],
            [1.0],
            rate=0.1,
            features=features,
        )

    # The gradient of the margin is the difference of the two features, and
    # completion 2 lies further along it than the chosen one.
    dpo = train("sigmoid")
    assert dpo[0] / dpo[1] > 2 * before[0] / before[1]
    assert dpo[0] < 1e-3 * before[0]
    assert train("dpop", dpop_lambda=50.0)[0] > 0.99 * before[0]
