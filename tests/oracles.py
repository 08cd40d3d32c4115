"""Every loss written a second time, in float64 numpy, from the papers.

`w`, `l`: log-ratios; `c`, `r`: the policy's sums; `nc`, `nr`: lengths.
"""

import numpy as np
from scipy.special import expit, log_expit


def smooth(x, e):
    return -(1 - e) * log_expit(x) - e * log_expit(-x)


def score(x, f_divergence="reverse_kl", f_alpha=0.5):
    if f_divergence == "reverse_kl" or (
        f_divergence == "alpha" and f_alpha == 1
    ):
        return x
    if f_divergence == "forward_kl":
        return 1 - np.exp(-x)
    if f_divergence == "js":
        # log 2t / (t + 1) of t = exp(x)
        return np.log(2) - np.log1p(np.exp(-x))
    return (np.exp((f_alpha - 1) * x) - 1) / (f_alpha - 1)


def losses(c, r, c0, r0, nc, nr, margin, beta=0.1, **options):
    """Name -> per-pair values, all from the same inputs."""
    c, r, c0, r0 = (np.asarray(x, "float64") for x in (c, r, c0, r0))
    w, l = c - c0, r - r0  # noqa: E741
    e = options.get("label_smoothing", 0.0)
    f = options.get("f_divergence", "reverse_kl")
    a = options.get("f_alpha", 0.5)
    sw, sl = score(w, f, a), score(l, f, a)
    d = sw - sl
    x = beta * d
    eps = options.get("label_smoothing", 1e-3)
    tau = options.get("tau", 0.05)
    mixing = expit(x / tau)
    q = np.sort(c - r) - np.sort(c0 - r0)
    qu = np.sort(w) - np.sort(l)
    with np.errstate(all="ignore"):
        chi = beta * (np.exp(w) + w - np.exp(l) - l)
    odds = lambda p: p - np.log1p(-np.exp(p))  # noqa: E731
    m = beta * (w - l)
    scale = 1 + options.get("alpha", 0.6) * (m.mean() - 0.0)
    return {
        "sigmoid": smooth(x, e),
        "hinge": np.maximum(0, 1 - x),
        "ipo": (sw / nc - sl / nr - 1 / (2 * beta)) ** 2,
        "exo_pair": expit(x) * (log_expit(x) - np.log(1 - eps))
        + expit(-x) * (log_expit(-x) - np.log(eps)),
        "nca_pair": -log_expit(beta * w)
        - 0.5 * log_expit(-beta * w)
        - 0.5 * log_expit(-beta * l),
        "robust": (-(1 - e) * log_expit(x) + e * log_expit(-x)) / (1 - 2 * e),
        "bco_pair": -log_expit(beta * w) - log_expit(-beta * l),
        "sppo_hard": (w - 1 / (2 * beta)) ** 2 + (l + 1 / (2 * beta)) ** 2,
        "aot": smooth(beta * q, e),
        "aot_unpaired": smooth(beta * qu, e),
        "apo_zero": 1 - expit(beta * w) + expit(beta * l),
        "apo_down": expit(beta * w) + 1 - expit(beta * (w - l)),
        "discopop": -log_expit(x) * (1 - mixing) + np.exp(-x) * mixing,
        "sigmoid_norm": -log_expit(beta * (sw / nc - sl / nr)),
        "sft": -c * len(c) / np.sum(nc),
        "dpop": -log_expit(
            beta
            * (w - l - options.get("dpop_lambda", 50.0) * np.maximum(0, -w))
        ),
        "chi_po": -log_expit(chi),
        "cal_dpo": -log_expit(m)
        + (w - 0.5 / beta) ** 2
        + (l + 0.5 / beta) ** 2,
        "r_dpo": -log_expit(m + options.get("alpha", 0.01) * (nc - nr)),
        "odpo": -log_expit(m - options.get("alpha", 1.0) * margin),
        "beta_dpo": -log_expit(scale * m),
        "simpo": -log_expit(
            beta * (c / nc - r / nr) - options.get("gamma", 0.5)
        ),
        "orpo": -c / nc
        - options.get("orpo_lambda", 0.1)
        * log_expit(odds(c / nc) - odds(r / nr)),
        "cpo": -log_expit(beta * (c - r))
        + options.get("alpha", 1.0) * (-c / nc),
    }
