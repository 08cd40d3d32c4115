"""Which fast paths a policy is run on, and why not."""

import dataclasses
from collections.abc import Sequence

import jax
import keras

from keras_dpo.errors import UserError
from keras_dpo.scoring.log_probs import can_split_head
from keras_dpo.scoring.packed_backbone import PACKED_FAMILIES

AUTO = "auto"
Choice = bool | str


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the policy runs on a batch; every choice gives the same numbers.

    Args:
        split_head: Whether logits are computed of completion tokens alone.
        packing: Whether all pairs stand in one row without padding.
        prompt_sharing: Whether a prompt is computed once per pair.
        attention: `"blocks"` and `"fused"` keep no scores and take packed
            rows; `"keras"` is the family's own, on padded sequences.
        notes: What was asked for or usual and is off, and why.
    """

    split_head: bool
    packing: bool
    prompt_sharing: bool
    attention: str
    notes: tuple[str, ...] = ()

    @property
    def in_rows(self) -> bool:
        """Whether batches are rows of `data.packing`."""
        return self.attention != "keras"


def choose_execution(
    policy: keras.Model,
    reference: keras.Model | None,
    disable_dropout: bool,
    split_head: Choice = AUTO,
    packing: Choice = AUTO,
    prompt_sharing: Choice = AUTO,
    attention: str = AUTO,
) -> Execution:
    """Fast paths where they are proven; see `DPOModel` for the arguments.

    Raises:
        ValueError: A path was asked for that the model cannot take.
    """
    _check_choices(split_head, packing, prompt_sharing, attention)
    models = [m for m in (policy, reference) if m is not None]
    can_split = can_split_head(policy)
    if split_head is True and not can_split:
        raise UserError(
            "split_head=True needs a family whose head is proven to split. "
            f"Received: {type(policy).__name__}. Use split_head='auto'."
        )
    asked = {
        "packing": packing is True,
        "prompt_sharing": prompt_sharing is True,
        "attention": attention in ("blocks", "fused"),
    }
    plain = attention == "keras" or split_head is False
    why_not = (
        "attention='keras' and split_head=False take padded sequences"
        if plain
        else _why_not_in_rows(models, disable_dropout)
    )
    split = can_split and split_head is not False
    if why_not:
        names = [name for name, is_asked in asked.items() if is_asked]
        if names:
            raise UserError(
                f"`{names[0]}` needs packed rows. Received: {why_not}. Leave "
                f"{names[0]} at 'auto'."
            )
        notes = () if plain else (f"Padded sequences, not rows: {why_not}.",)
        return Execution(split, False, False, "keras", notes)
    if attention == AUTO:
        attention = "blocks" if jax.default_backend() == "cpu" else "fused"
    return Execution(
        split, packing is not False, prompt_sharing is not False, attention
    )


def _check_choices(
    split_head: Choice, packing: Choice, prompt_sharing: Choice, attention: str
) -> None:
    for name, value in (
        ("split_head", split_head),
        ("packing", packing),
        ("prompt_sharing", prompt_sharing),
    ):
        if value not in (AUTO, True, False):
            raise UserError(
                f"`{name}` must be 'auto', True or False. Received: {value!r}."
            )
    known = (AUTO, "blocks", "fused", "keras")
    if attention not in known:
        raise UserError(
            f"`attention` must be one of {known}. Received: {attention!r}."
        )


def _why_not_in_rows(
    models: Sequence[keras.Model], disable_dropout: bool
) -> str | None:
    """What keeps one of the models from running on packed rows."""
    for model in models:
        name = type(model).__name__
        family = name.removesuffix("CausalLM")
        if family not in PACKED_FAMILIES or not can_split_head(model):
            return f"{name} is not among the families proven for them"
        if getattr(model.backbone, "rope_scaling_type", None) == "su":
            return "Phi3's long-context scaling depends on the padded length"
        dropout: float = getattr(model.backbone, "dropout", 0.0)
        if dropout and not disable_dropout:
            return "disable_dropout=False, and rows have no attention dropout"
    return None


def check_remat(
    remat: str, policy: keras.Model, execution: Execution, disable_dropout: bool
) -> bool:
    """Whether layers can be computed again, as one of three choices asks.

    Raises:
        ValueError: It is none of the three, or `"layers"` cannot be.
    """
    if remat not in ("none", "layers", "auto"):
        raise UserError(
            f"`remat` must be 'none', 'layers' or 'auto'. Received: {remat!r}."
        )
    why_not = None
    backbone = getattr(policy, "backbone", None)
    dropout: float = getattr(backbone, "dropout", 0.0)
    if not execution.split_head:
        why_not = "the policy runs as a whole, without a split head"
    elif dropout and not disable_dropout:
        why_not = "dropout would be drawn twice"
    if remat == "layers" and why_not:
        raise UserError(
            f"remat='layers' cannot be: {why_not}. Received: "
            f"split_head={execution.split_head}, disable_dropout="
            f"{disable_dropout}. Use remat='none'."
        )
    return why_not is None
