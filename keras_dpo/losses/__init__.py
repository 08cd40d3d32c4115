"""Preference losses: one value per pair, each with its formula and paper."""

from collections.abc import Mapping
from typing import Any

from keras_dpo.losses.base import (
    FunctionLoss,
    LossLike,
    PairLogProbs,
    PreferenceLoss,
    WeightedSum,
    option_names,
)
from keras_dpo.losses.batchwise import AOT, SFT, AOTUnpaired, BCOPair, BetaDPO
from keras_dpo.losses.pairwise import (
    DPOP,
    IPO,
    ODPO,
    RDPO,
    APODown,
    APOZero,
    CalDPO,
    ChiPO,
    DiscoPOP,
    ExoPair,
    Hinge,
    NCAPair,
    Robust,
    Sigmoid,
    SigmoidNorm,
    SPPOHard,
)
from keras_dpo.losses.reference_free import CPO, ORPO, SimPO

__all__ = [
    "AOT",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "BCOPair",
    "BetaDPO",
    "CPO",
    "CalDPO",
    "ChiPO",
    "DPOP",
    "DiscoPOP",
    "ExoPair",
    "FunctionLoss",
    "Hinge",
    "IPO",
    "LOSSES",
    "LossLike",
    "NCAPair",
    "ODPO",
    "ORPO",
    "PairLogProbs",
    "PreferenceLoss",
    "RDPO",
    "Robust",
    "SFT",
    "SPPOHard",
    "Sigmoid",
    "SigmoidNorm",
    "SimPO",
    "WeightedSum",
    "get",
    "option_names",
]

LOSSES: dict[str, type[PreferenceLoss]] = {
    "sigmoid": Sigmoid,
    "hinge": Hinge,
    "ipo": IPO,
    "exo_pair": ExoPair,
    "nca_pair": NCAPair,
    "robust": Robust,
    "bco_pair": BCOPair,
    "sppo_hard": SPPOHard,
    "aot": AOT,
    "aot_unpaired": AOTUnpaired,
    "aot_pair": AOTUnpaired,
    "apo_zero": APOZero,
    "apo_down": APODown,
    "discopop": DiscoPOP,
    "sigmoid_norm": SigmoidNorm,
    "sft": SFT,
    "dpop": DPOP,
    "chi_po": ChiPO,
    "cal_dpo": CalDPO,
    "r_dpo": RDPO,
    "odpo": ODPO,
    "beta_dpo": BetaDPO,
    "simpo": SimPO,
    "orpo": ORPO,
    "cpo": CPO,
}


def get(identifier: LossLike, **options: Any) -> PreferenceLoss:
    """The loss that `identifier` stands for.

    Args:
        identifier: A name from `LOSSES`; a `PreferenceLoss`; a function
            `f(policy, reference) -> (pairs,)`; or a mapping of any of these
            to weights.
        **options: Options of a named loss.

    Raises:
        ValueError: The name is unknown, or the loss does not read an option.

    Example:

    >>> import keras_dpo
    >>> keras_dpo.losses.get("ipo", beta=0.2)
    IPO(beta=0.2, ld_alpha=None, wpo=False, f_divergence='reverse_kl', \
f_alpha=0.5, length_average=True)
    """
    if isinstance(identifier, str):
        if identifier not in LOSSES:
            raise ValueError(
                f"Unknown loss {identifier!r}. Known losses: "
                f"{', '.join(LOSSES)}."
            )
        known = option_names(LOSSES[identifier])
        unread = [name for name in options if name not in known]
        if unread:
            raise ValueError(
                f"Loss {identifier!r} does not read {', '.join(unread)}. "
                f"It reads: {', '.join(known)}."
            )
        return LOSSES[identifier](**options)
    if options:
        raise ValueError(
            "Options go with the name of a loss. Received: "
            f"{', '.join(options)} with {identifier!r}."
        )
    if isinstance(identifier, PreferenceLoss):
        return identifier
    if isinstance(identifier, Mapping):
        return WeightedSum(
            [get(key) for key in identifier], list(identifier.values())
        )
    if callable(identifier):
        return FunctionLoss(identifier)
    raise ValueError(
        "`loss` must be a name, a PreferenceLoss, a function of (policy, "
        f"reference) or a mapping of losses to weights. Received: "
        f"{identifier!r}."
    )
