"""Formulas against TRL's numbers, float64 restatements and algebra."""

import jax
import keras
import numpy as np
import oracles
import pytest
from jax.test_util import check_grads

import keras_dpo
from keras_dpo import losses
from keras_dpo.losses import LOSSES, PairLogProbs

DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alpha",
}
NAMES = [name for name in LOSSES if name != "aot_pair"]


def pairs_of(oracle, name):
    rows = np.array(oracle[name], "float32")
    return np.stack([rows[: oracle["pairs"]], rows[oracle["pairs"] :]], 1)


def loss_of(config):
    """Our loss for one of TRL's configurations."""
    parts = []
    for name in config["loss_type"]:
        options = {
            "beta": config["beta"],
            "label_smoothing": config["label_smoothing"],
            "tau": config["discopop_tau"],
            "ld_alpha": config["ld_alpha"],
            "wpo": config["use_weighting"],
            "f_divergence": DIVERGENCES[config["f_divergence_type"]],
        }
        if options["f_divergence"] == "alpha":
            options["f_alpha"] = config["f_alpha_divergence_coef"]
        if name == "sigmoid":
            # TRL 1.16 ignores it there; ours is cDPO.
            options["label_smoothing"] = 0.0
        known = losses.option_names(LOSSES[name])
        options = {k: v for k, v in options.items() if k in known}
        parts.append(losses.get(name, **options))
    weights = config["loss_weights"] or [1.0] * len(parts)
    return losses.get(dict(zip(parts, weights, strict=True)))


def test_values_and_gradients_equal_trl(loss_oracle):
    """All 125 recorded cases, to 1e-5 relative."""
    mask = pairs_of(loss_oracle, "completion_mask")[:, :, 1:]
    policy = pairs_of(loss_oracle, "policy_log_probs")
    reference = PairLogProbs(pairs_of(loss_oracle, "reference_log_probs"), mask)
    squares = pairs_of(loss_oracle, "log_sum_sq_probs")
    assert len(loss_oracle["cases"]) == 125
    for name, case in loss_oracle["cases"].items():
        loss = loss_of(case["config"])

        def per_pair(log_probs, loss=loss):
            pair = PairLogProbs(log_probs, mask, squares)
            return loss.per_pair(pair, reference)

        values = per_pair(policy)
        np.testing.assert_allclose(
            values.mean(), case["mean"], rtol=1e-5, err_msg=name
        )
        if case["per_pair"] is not None:
            np.testing.assert_allclose(
                values, case["per_pair"], rtol=2e-5, atol=1e-6, err_msg=name
            )
        if case["gradient"] is None:
            assert name == "hinge/wpo", name  # TRL crashes there
            continue
        gradient = jax.grad(lambda x, f=per_pair: f(x).mean())(policy)
        rows = np.array(case["gradient"], "float32")
        expected = np.stack([rows[: len(policy)], rows[len(policy) :]], 1)
        # TRL's padding is outside the model; only completion tokens count.
        expected = expected * mask
        np.testing.assert_allclose(
            gradient,
            expected,
            rtol=1e-5,
            atol=1e-5 * np.abs(expected).max(),
            err_msg=name,
        )


@pytest.fixture
def batch():
    """Log-probs of 5 pairs with ragged masks, policy unlike reference."""
    random = np.random.default_rng(0)
    lengths = np.array([[3, 7], [7, 2], [5, 5], [1, 4], [6, 1]])
    mask = (np.arange(7) < lengths[..., None]).astype("float32")
    policy = -random.gamma(2.0, 0.6, mask.shape).astype("float32")
    reference = -random.gamma(2.0, 0.6, mask.shape).astype("float32")
    margin = random.gamma(1.0, 1.0, 5).astype("float32")
    squares = -random.gamma(1.0, 0.5, mask.shape).astype("float32")
    return (
        PairLogProbs(policy, mask, squares, margin),
        PairLogProbs(reference, mask),
    )


def restate(name, policy, reference, beta, **options):
    nc, nr = policy.lengths[:, 0], policy.lengths[:, 1]
    return oracles.losses(
        policy.chosen,
        policy.rejected,
        reference.chosen,
        reference.rejected,
        np.asarray(nc, "float64"),
        np.asarray(nr, "float64"),
        policy.margin,
        beta=beta,
        **options,
    )[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_equals_float64(name, beta, batch):
    known = losses.option_names(LOSSES[name])
    options = {"beta": beta} if "beta" in known else {}
    loss = losses.get(name, **options)
    np.testing.assert_allclose(
        loss.per_pair(*batch), restate(name, *batch, beta), rtol=2e-5
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sigmoid", {"label_smoothing": 0.2}),
        ("sigmoid", {"f_divergence": "js"}),
        ("sigmoid", {"f_divergence": "alpha", "f_alpha": 2.0}),
        ("exo_pair", {"label_smoothing": 0.1}),
        ("robust", {"label_smoothing": 0.3}),
        ("aot", {"label_smoothing": 0.1}),
        ("discopop", {"tau": 1.0}),
        ("dpop", {"dpop_lambda": 5.0}),
        ("r_dpo", {"alpha": 0.3}),
        ("odpo", {"alpha": 2.0}),
        ("beta_dpo", {"alpha": 0.2}),
        ("simpo", {"gamma": 1.5}),
        ("orpo", {"orpo_lambda": 1.5}),
        ("cpo", {"alpha": 0.3}),
    ],
)
def test_options_equal_float64(name, options, batch):
    """Each option does what the restatement says, and does something."""
    known = losses.option_names(LOSSES[name])
    beta = {"beta": 0.3} if "beta" in known else {}
    values = losses.get(name, **beta, **options).per_pair(*batch)
    np.testing.assert_allclose(
        values, restate(name, *batch, 0.3, **options), rtol=2e-5
    )
    assert not np.allclose(values, losses.get(name, **beta).per_pair(*batch))


def test_ipo_without_averaging_is_equation_17(batch):
    policy, reference = batch
    loss = losses.get("ipo", beta=0.3, length_average=False)
    d = (policy.chosen - reference.chosen) - (
        policy.rejected - reference.rejected
    )
    np.testing.assert_allclose(
        loss.per_pair(policy, reference), (d - 1 / 0.6) ** 2, rtol=1e-5
    )


# beta_dpo's batch-level beta is outside the gradient by design.
@pytest.mark.parametrize("name", [n for n in NAMES if n != "beta_dpo"])
def test_gradients_by_finite_differences(name, batch):
    """Also proves that no loss leaks a gradient that its value lacks."""
    policy, reference = batch
    loss = losses.get(name)

    def value(log_probs):
        return loss.per_pair(
            policy._replace(log_probs=log_probs), reference
        ).mean()

    check_grads(
        value,
        (policy.log_probs,),
        order=1,
        modes=["rev"],
        eps=1e-2,
        atol=2e-2,
        rtol=2e-2,
    )


DIVERGENCE_OPTIONS = [
    *({"f_divergence": name} for name in ("reverse_kl", "forward_kl", "js")),
    *(
        {"f_divergence": "alpha", "f_alpha": alpha}
        for alpha in (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
    ),
]
FORMULAS = [
    (name, options)
    for name in NAMES
    for options in (
        DIVERGENCE_OPTIONS
        if "f_divergence" in losses.option_names(LOSSES[name])
        else [{}]
    )
]


@pytest.mark.parametrize(("name", "options"), FORMULAS)
def test_finite_at_extremes(name, options, batch):
    """Values and gradients stay finite 10,000 nats from the reference."""
    policy, reference = batch
    loss = losses.get(name, **options)

    def value(log_probs):
        return loss.per_pair(
            policy._replace(log_probs=log_probs), reference
        ).mean()

    value_and_gradient = jax.jit(jax.value_and_grad(value))
    sizes = [1e4, 100.0, 50.0, 20.0, 0.0, -20.0, -50.0, -100.0, -1e4]
    for chosen in sizes:
        for rejected in sizes:
            shift = np.zeros_like(policy.log_probs)
            shift[:, 0, 0] = chosen
            shift[:, 1, 0] = rejected
            found = value_and_gradient(policy.log_probs + shift)
            assert all(np.isfinite(x).all() for x in found), (chosen, rejected)


@pytest.mark.parametrize("options", DIVERGENCE_OPTIONS[1:])
def test_ipo_is_exact_where_its_square_is_finite(options):
    """Up to a score of exp(39) = 9e16: nothing is cut off before."""
    steepness = max(1.0, abs(options.get("f_alpha", 0.0) - 1.0))
    ratios = np.array([-39, -20, -3, 0.5, 3, 20, 39], "float32") / steepness
    log_probs = np.stack([ratios, ratios[::-1]], 1)[..., None]
    mask = np.ones_like(log_probs)
    margin = np.zeros(len(ratios))
    policy = PairLogProbs(log_probs, mask, margin=margin)
    reference = PairLogProbs(np.zeros_like(log_probs), mask)
    loss = losses.get("ipo", **options)
    values = loss.per_pair(policy, reference)
    expected = restate("ipo", policy, reference, 0.1, **options)
    np.testing.assert_allclose(values, expected, rtol=2e-5)


RELATIVE = [
    name
    for name in NAMES
    # aot sorts the two models' own margins, before any ratio is taken.
    if LOSSES[name].needs_reference and name != "aot"
]


@pytest.mark.parametrize("name", RELATIVE)
def test_shifting_both_models_changes_nothing(name, batch):
    """Only log-ratios count: a constant added to both cancels."""
    policy, reference = batch
    loss = losses.get(name)
    moved = [x._replace(log_probs=x.log_probs - 0.5) for x in batch]
    np.testing.assert_allclose(
        loss.per_pair(*moved), loss.per_pair(policy, reference), rtol=1e-4
    )


def test_swapping_a_pair_mirrors_the_sigmoid_loss(batch):
    """LS(x) - LS(-x) = x: the two losses differ by beta d."""
    flip = lambda x: PairLogProbs(x.log_probs[:, ::-1], x.mask[:, ::-1])  # noqa: E731
    loss = losses.get("sigmoid", beta=0.4)
    forward, back = loss.per_pair(*batch), loss.per_pair(*map(flip, batch))
    reward = loss.rewards(*batch)
    np.testing.assert_allclose(
        back - forward, reward[:, 0] - reward[:, 1], rtol=1e-4
    )


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name, batch):
    """More masked positions, and empty rows at the end, leave values alone."""

    def pad(x):
        wider = [(0, 2), (0, 0), (0, 3)]
        log_probs = np.pad(x.log_probs, wider, constant_values=-9.0)
        return x._replace(
            log_probs=log_probs,
            mask=np.pad(x.mask, wider),
            margin=None if x.margin is None else np.pad(x.margin, (0, 2)),
        )

    loss = losses.get(name)
    policy, reference = batch
    plain = loss.per_pair(
        policy._replace(log_sum_squared_probs=None), reference
    )
    padded = loss.per_pair(
        pad(policy._replace(log_sum_squared_probs=None)), pad(reference)
    )
    np.testing.assert_allclose(padded[:5], plain, rtol=1e-5)


def test_ld_alpha_one_is_the_plain_loss_and_zero_cuts(batch):
    plain = losses.get("sigmoid").per_pair(*batch)
    one = losses.get("sigmoid", ld_alpha=1.0).per_pair(*batch)
    np.testing.assert_allclose(one, plain, rtol=1e-6)
    shorter = np.min(batch[0].lengths, axis=1)[:, None, None]
    cut = [x._replace(mask=x.mask * (np.arange(7) < shorter)) for x in batch]
    zero = losses.get("sigmoid", ld_alpha=0.0).per_pair(*batch)
    np.testing.assert_allclose(
        zero, losses.get("sigmoid").per_pair(*cut), rtol=1e-5
    )


def test_bco_running_mean_shifts_and_has_no_gradient(batch):
    loss = losses.get("bco_pair", delta="ema", momentum=0.5)
    before = loss.per_pair(*batch)
    np.testing.assert_allclose(before, losses.get("bco_pair").per_pair(*batch))
    loss.update_state(*batch)
    mean = float(loss.rewards(*batch).mean())
    assert float(loss.running_mean.value) == pytest.approx(0.5 * mean)
    reward = np.asarray(loss.rewards(*batch), "float64") - 0.5 * mean
    expected = -oracles.log_expit(reward[:, 0]) - oracles.log_expit(
        -reward[:, 1]
    )
    np.testing.assert_allclose(loss.per_pair(*batch), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"), [("beta_dpo", {}), ("bco_pair", {"delta": "ema"})]
)
def test_a_running_mean_is_moved_by_pairs_alone(name, options, batch):
    """Rows that fill up a batch do not count, nor does a batch of them."""
    policy, reference = batch
    loss, alone = (losses.get(name, **options) for _ in range(2))
    alone.update_state(*batch)
    empty = [x._replace(mask=np.zeros_like(x.mask)) for x in batch]
    both = [
        PairLogProbs(*(np.concatenate([a, b]) for a, b in zip(x, y, strict=True)
                       if a is not None))
        for x, y in zip(batch, empty, strict=True)
    ]  # fmt: skip
    loss.update_state(*both)
    moved = float(loss.running_mean.value)
    assert moved == pytest.approx(float(alone.running_mean.value), rel=1e-6)
    assert moved != 0
    loss.update_state(*empty)
    assert float(loss.running_mean.value) == moved


def test_function_and_mapping(batch):
    def half(policy, reference):
        return 0.5 * (policy.chosen - reference.chosen)

    np.testing.assert_allclose(
        losses.get(half).per_pair(*batch), half(*batch), rtol=1e-6
    )
    mixed = losses.get({"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0})
    expected = sum(
        weight * losses.get(name).per_pair(*batch)
        for name, weight in (("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0))
    )
    np.testing.assert_allclose(mixed.per_pair(*batch), expected, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_serialization(name, batch):
    loss = losses.get(name)
    config = keras.saving.serialize_keras_object(loss)
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == loss.get_config()
    np.testing.assert_array_equal(again.per_pair(*batch), loss.per_pair(*batch))


def test_mixture_serialization(batch):
    mixed = losses.get({"sigmoid": 0.8, "sft": 1.0})
    config = keras.saving.serialize_keras_object(mixed)
    again = keras.saving.deserialize_keras_object(config)
    np.testing.assert_array_equal(
        again.per_pair(*batch), mixed.per_pair(*batch)
    )


def test_call_is_the_weighted_mean(batch):
    policy, reference = batch
    loss = losses.get("sigmoid")
    weight = np.array([1.0, 0.0, 2.0, 1.0, 1.0])
    values = np.asarray(loss.per_pair(policy, reference))
    assert float(loss(reference, policy, weight)) == pytest.approx(
        np.average(values, weights=weight), rel=1e-5
    )


@keras.saving.register_keras_serializable(package="tests")
class ExponentialLoss(keras_dpo.losses.PreferenceLoss):
    def per_pair(self, policy, reference):
        margin = (policy.chosen - reference.chosen) - (
            policy.rejected - reference.rejected
        )
        return keras.ops.exp(-self.beta * margin)


def test_own_loss_of_five_lines(batch):
    loss = ExponentialLoss(beta=0.2)
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(loss)
    )
    assert again.beta == 0.2
    np.testing.assert_array_equal(again.per_pair(*batch), loss.per_pair(*batch))
    with pytest.raises(ValueError, match="Override `formula` instead"):
        ExponentialLoss(beta=0.2, wpo=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.get("kto"), "Known losses: sigmoid, hinge"),
        (lambda: losses.get("hinge", label_smoothing=0.1), "does not read"),
        (lambda: losses.get("sft", beta=0.1), "does not read beta"),
        (lambda: losses.get("sigmoid", beta=0), "above 0"),
        (lambda: losses.get("sigmoid", beta=-1.0), "above 0"),
        (lambda: losses.get("robust", label_smoothing=0.5), "0.5"),
        (lambda: losses.get("exo_pair", label_smoothing=0.0), "logarithm"),
        (lambda: losses.get("sigmoid", f_divergence="kl"), "reverse_kl"),
        (lambda: losses.get("sigmoid", f_alpha=0.3), "left out unless"),
        (lambda: losses.get("sigmoid", ld_alpha=2.0), r"in \[0, 1\]"),
        (lambda: losses.get(3), "must be a name"),
        (lambda: losses.get(losses.Sigmoid(), beta=1.0), "go with the name"),
    ],
)
def test_mistakes_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wpo_without_its_statistic_is_an_error(batch):
    policy, reference = batch
    with pytest.raises(ValueError, match="log_sum_squared_probs"):
        losses.get("sigmoid", wpo=True).per_pair(
            policy._replace(log_sum_squared_probs=None), reference
        )
