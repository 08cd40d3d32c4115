"""`Execution`: the fast paths a policy runs on, and why others are off."""

import dataclasses
from collections.abc import Sequence

import jax
import keras

from keras_dpo.errors import UserError

AUTO = "auto"
Choice = bool | str

# Families whose CausalLM is exactly `token_embedding(backbone(x), reverse)`:
# tests/test_log_probs.py proves each.
SPLIT_FAMILIES = (
    "Bloom",
    "Falcon",
    "Gemma",
    "Gemma3",
    "GPT2",
    "GPTNeoX",
    "Llama",
    "Llama3",
    "Mistral",
    "Mixtral",
    "OPT",
    "Phi3",
    "Qwen",
    "Qwen3",
    "SmolLM3",
)

# Families proven to give the plain path's values and gradients, by
# tests/test_packed_backbone.py.
PACKED_FAMILIES = (
    "Gemma",
    "Gemma3",
    "GPT2",
    "Llama",
    "Llama3",
    "Mistral",
    "OPT",
    "Phi3",
    "Qwen",
    "Qwen3",
    "SmolLM3",
)


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a policy runs on a batch; every choice gives the same numbers.

    `"auto"` takes a fast path if the policy's family is proven to support it.
    `DPOModel.execution` is resolved but for `remat`, which `fit` decides when
    it sees the data.

    Args:
        split_head: Whether logits are computed for completion tokens alone;
            False takes them from the whole output.
        packing: Whether all pairs of a device and micro-batch are packed into
            one row without padding; False gives each pair its own row.
        prompt_sharing: Whether a prompt is computed once per pair; False
            recomputes it with each completion.
        attention: `"blocks"` (loops over blocks of keys, for CPU) and
            `"fused"` (`jax.nn.dot_product_attention` on GPU, the splash kernel
            on TPU) materialize no scores; `"keras"` is the family's own
            attention, on padded sequences: no packing, no sharing.
        remat: `"layers"` rematerializes each decoder layer in the backward
            pass, `"none"` keeps its activations; `"auto"` is `"layers"` only
            if the step would not fit in memory otherwise.
        notes: Fast paths that are off, and why; filled in by `resolve`.

    Raises:
        ValueError: An option has an unknown value.

    Example:

    >>> Execution(packing=False).attention
    'auto'
    """

    split_head: Choice = AUTO
    packing: Choice = AUTO
    prompt_sharing: Choice = AUTO
    attention: str = AUTO
    remat: str = AUTO
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self) -> None:
        for name in ("split_head", "packing", "prompt_sharing"):
            value = getattr(self, name)
            if value not in (AUTO, True, False):
                raise UserError(
                    f"`{name}` must be 'auto', True or False. Received: "
                    f"{value!r}."
                )
        for name, known in (
            ("attention", (AUTO, "blocks", "fused", "keras")),
            ("remat", (AUTO, "none", "layers")),
        ):
            value = getattr(self, name)
            if value not in known:
                raise UserError(
                    f"`{name}` must be one of {known}. Received: {value!r}."
                )

    def get_config(self) -> dict[str, Choice]:
        """The choices, as keyword arguments."""
        config = dataclasses.asdict(self)
        del config["notes"]
        return config

    @property
    def in_rows(self) -> bool:
        """Whether batches are packed rows of `data.packing`."""
        return self.attention != "keras"

    @property
    def rematerializes(self) -> bool:
        """Whether decoder layers are rematerialized in the backward pass."""
        return self.remat == "layers"

    def without_remat(self) -> "Execution":
        """A copy with `remat="none"`, such as for passes without a gradient."""
        return dataclasses.replace(self, remat="none")

    def resolve(
        self,
        policy: keras.Model,
        others: Sequence[keras.Model],
        disable_dropout: bool,
    ) -> "Execution":
        """Resolve what is `"auto"` for the given models.

        Args:
            policy: The policy.
            others: Other models that run on the same batches: a reference.
            disable_dropout: Whether dropout is off while training.

        Raises:
            ValueError: A model does not support a path that was requested.
        """
        resolved = self._resolve_rows(policy, others, disable_dropout)
        why_not = None
        if not resolved.split_head:
            why_not = "the policy runs as a whole, without a split head"
        elif _dropout(policy) and not disable_dropout:
            why_not = "dropout would be drawn twice"
        if self.remat == "layers" and why_not:
            raise UserError(
                f"remat='layers' cannot be: {why_not}. Received: "
                f"split_head={resolved.split_head}, disable_dropout="
                f"{disable_dropout}. Use remat='none'."
            )
        return resolved.without_remat() if why_not else resolved

    def _resolve_rows(
        self,
        policy: keras.Model,
        others: Sequence[keras.Model],
        disable_dropout: bool,
    ) -> "Execution":
        """Resolve all but `remat`."""
        if self.split_head is True and not can_split_head(policy):
            raise UserError(
                "split_head=True needs a family whose head is proven to split. "
                f"Received: {type(policy).__name__}. Use split_head='auto'."
            )
        split_head = can_split_head(policy) and self.split_head is not False
        plain = self.attention == "keras" or self.split_head is False
        why_not = (
            "attention='keras' and split_head=False take padded sequences"
            if plain
            else _why_not_in_rows([policy, *others], disable_dropout)
        )
        if why_not is None:
            attention = self.attention
            if attention == AUTO:
                is_cpu = jax.default_backend() == "cpu"
                attention = "blocks" if is_cpu else "fused"
            return dataclasses.replace(
                self,
                split_head=split_head,
                packing=self.packing is not False,
                prompt_sharing=self.prompt_sharing is not False,
                attention=attention,
            )
        for name, is_asked_for in (
            ("packing", self.packing is True),
            ("prompt_sharing", self.prompt_sharing is True),
            ("attention", self.attention in ("blocks", "fused")),
        ):
            if is_asked_for:
                raise UserError(
                    f"`{name}` needs packed rows. Received: {why_not}. Leave "
                    f"{name} at 'auto'."
                )
        note = f"Using padded sequences instead of packed rows: {why_not}."
        return dataclasses.replace(
            self,
            split_head=split_head,
            packing=False,
            prompt_sharing=False,
            attention="keras",
            notes=() if plain else (note,),
        )


def can_split_head(policy: keras.Model) -> bool:
    """Whether the vocabulary product can run on selected positions alone."""
    name = type(policy).__name__.removesuffix("CausalLM")
    backbone = getattr(policy, "backbone", None)
    embedding = getattr(backbone, "token_embedding", None)
    return name in SPLIT_FAMILIES and hasattr(embedding, "logit_soft_cap")


def _why_not_in_rows(
    models: Sequence[keras.Model], disable_dropout: bool
) -> str | None:
    """Why one of the models cannot run on packed rows, or None."""
    for model in models:
        name = type(model).__name__
        family = name.removesuffix("CausalLM")
        if family not in PACKED_FAMILIES or not can_split_head(model):
            return f"{name} is not among the families proven for them"
        if getattr(model.backbone, "rope_scaling_type", None) == "su":
            return "Phi3's long-context scaling depends on the padded length"
        if _dropout(model) and not disable_dropout:
            return "disable_dropout=False, and rows have no attention dropout"
    return None


def _dropout(model: keras.Model) -> float:
    return getattr(getattr(model, "backbone", None), "dropout", 0.0)
