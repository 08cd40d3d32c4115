"""`DPOConfig`: all settings of a run in one dataclass.

The Python API, YAML files, command-line flags and the saved `config.yaml` all
use this class.
"""

import dataclasses
from typing import Any, Literal

from keras_dpo import losses
from keras_dpo.compat.outline import variables_without_values
from keras_dpo.distribution.sharding import parse_mesh
from keras_dpo.errors import UserError

# Settings passed on to the loss.
LOSS_OPTIONS = (
    "beta",
    "label_smoothing",
    "f_divergence",
    "f_alpha",
    "ld_alpha",
    "wpo",
    "tau",
    "dpop_lambda",
    "orpo_lambda",
    "gamma",
    "alpha",
    "length_average",
)
# Default peak learning rates. All weights: the value on EasyDeL's page.
# Adapters start at zero and have few parameters, so they take rates ten to a
# hundred times larger (docs/real_run.md).
LEARNING_RATE = 1e-6
LORA_LEARNING_RATE = 1e-4


POSITIVE = (
    "beta",
    "learning_rate",
    "total_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "ref_model_sync_steps",
    "max_length",
    "max_prompt_length",
    "log_steps",
    "max_steps",
    "save_steps",
    "num_backups",
    "max_completion_length",
    "max_new_tokens",
    "evaluation_batch_size",
    "clip_norm",
)
NOT_NEGATIVE = ("lora_rank", "weight_decay", "num_sample_prompts", "seed")


@dataclasses.dataclass
class DPOConfig:
    """Settings of a preference-tuning run.

    None means unset for every setting; `resolved` fills in what a run uses.

    Args:
        model_name: Name of the run and of its directory.
        repo_id: Policy: a Keras-Hub preset, `hf://owner/name`, or a
            directory.
        reference: `initial` (a snapshot of the policy), `precomputed`, or
            `none`; see also `reference_model_repo_id`.
        reference_model_repo_id: Another model to use as the reference.
        refrence_model_repo_id: Alias of `reference_model_repo_id`, as EasyDeL
            spells it.
        dtype: `float32`, `bfloat16` (trained weights stay float32) or
            `mixed_bfloat16`.
        attn_mechanism: `vanilla` disables Keras' flash attention, `flash`
            lets Keras use it where the device supports it, `auto` keeps Keras'
            setting.
        attention: `auto`, `blocks`, `fused` or `keras`; see `Execution`.
        packing: Whether to pack all pairs of a step into one row without
            padding: `auto` (where proven), `true` or `false`.
        prompt_sharing: Whether to compute a prompt once per pair: `auto`
            (where proven), `true` or `false`.
        remat: Whether to rematerialize decoder layers in the backward pass,
            to save memory: `auto`, `none` or `layers`.
        reference_cache: Directory of precomputed reference log-probs; defaults
            to the user's cache directory.
        compilation_cache: Directory of the compilation cache; defaults to the
            user's cache directory, `none` disables it.
        distributed: How to initialize multi-process JAX: `none`, `auto`, or a
            cluster type that JAX knows, such as `slurm`.
        mesh: Device mesh to shard over, such as `data=4,model=2`. Defaults to
            one device, or to all devices of several processes as `data`.
        shard_parameters: Whether to shard parameters, optimizer state and
            snapshot over the mesh's data axis (FSDP).
        lora_rank: Rank of LoRA adapters; 0 trains all weights.
        lora_target_layers: Names of the layers to adapt; defaults to the
            family's own (query and value).
        dataset_name: Pairs to train on: a file, a hub dataset or `tfds:NAME`.
        dataset_split: Split of the training pairs, such as `train[:10%]`.
        streaming: Whether to read pairs during training instead of up front;
            it needs `max_steps`, which the epochs share.
        validation_dataset_name: Pairs to validate on, if not a share of
            `dataset_name`.
        validation_split: Split of the validation pairs, or of `dataset_name`
            without a `validation_dataset_name`.
        column_map: Mapping from our field names to the data's columns.
        loss_type: Name of the loss, or several separated by commas.
        loss_weights: Weights of several losses, separated by commas.
        beta: Strength of the pull towards the reference; defaults to the
            loss's own, 0.1 for most.
        label_smoothing: Assumed share of flipped labels; defaults to the
            loss's own, 0 for most.
        f_divergence: `reverse_kl` (the default), `forward_kl`, `js` or
            `alpha`.
        f_alpha: The alpha of `f_divergence=alpha`.
        ld_alpha: Weight of tokens beyond the length of the shorter completion.
        wpo: Whether to weight pairs by the policy's own probability.
        tau: Temperature of discopop.
        dpop_lambda: Lambda of dpop.
        orpo_lambda: Lambda of orpo.
        gamma: Target margin of simpo.
        alpha: Alpha of r_dpo, odpo, beta_dpo and cpo.
        length_average: Whether ipo averages over tokens.
        reference_free: Whether to train without a reference.
        sync_ref_model: Whether to sync the reference to the policy.
        ref_model_sync_steps: Optimizer steps between syncs.
        ref_model_mixup_alpha: Weight of the policy in a sync.
        disable_dropout: Whether to disable dropout.
        max_length: Maximum tokens of prompt and completion together.
        max_prompt_length: Maximum tokens of the prompt.
        max_completion_length: Maximum tokens of a completion; defaults to
            `max_length` minus `max_prompt_length`.
        chat_template: `auto`, a template's name, or Jinja source.
        chat_template_kwargs: Extra variables for the chat template, such as
            `{"enable_thinking": false}`.
        template_date: Date that chat templates insert, such as 2026-11-28;
            defaults to the day on which the run begins.
        on_overflow: `truncate`, `drop` or `error`.
        learning_rate: Peak learning rate; defaults to 1e-6, or 1e-4 for LoRA
            adapters.
        learning_rate_schedule: `constant`, `linear` or `cosine`.
        warmup_ratio: Share of the steps that warm up.
        weight_decay: Weight decay of AdamW.
        clip_norm: Global gradient norm to clip to; no clipping by default.
        total_batch_size: Pairs per optimizer step, over all devices and
            accumulation steps.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        num_train_epochs: Passes through the data.
        max_steps: Maximum number of optimizer steps; all epochs by default.
        seed: Random seed for shuffling, dropout and new adapters.
        save_directory: Parent of the run's directory.
        save_steps: Steps between saved policies; none by default.
        resume: `auto` resumes from the run's newest backup, if any; `never`
            starts over; or the path of a backup.
        backup_every: Optimizer steps between backups, or a time such as
            `10 minutes`.
        num_backups: Number of backups to keep.
        do_last_save: Whether to save the policy at the end.
        log_steps: Steps between logged metrics.
        evaluation_batch_size: Pairs per validation batch.
        num_sample_prompts: Prompts to answer before and after training, held
            out if there are validation pairs.
        max_new_tokens: Maximum tokens of those answers.
        use_wandb: Whether to log to Weights & Biases.
        wandb_project: Name of the Weights & Biases project.
    """

    model_name: str = "DPOTrainer"
    repo_id: str = ""
    reference: Literal["initial", "precomputed", "none"] = "initial"
    reference_model_repo_id: str | None = None
    refrence_model_repo_id: str | None = None
    dtype: Literal["float32", "bfloat16", "mixed_bfloat16"] = "float32"
    attn_mechanism: Literal["vanilla", "flash", "auto"] = "vanilla"
    attention: Literal["auto", "blocks", "fused", "keras"] = "auto"
    packing: Literal["auto", "true", "false"] = "auto"
    prompt_sharing: Literal["auto", "true", "false"] = "auto"
    remat: Literal["auto", "none", "layers"] = "auto"
    reference_cache: str | None = None
    compilation_cache: str | None = None
    distributed: str = "none"
    mesh: str | None = None
    shard_parameters: bool = True
    lora_rank: int = 0
    lora_target_layers: list[str] | None = None

    dataset_name: str = ""
    dataset_split: str = "train"
    streaming: bool = False
    validation_dataset_name: str | None = None
    validation_split: str | None = None
    column_map: dict[str, str] | None = None

    loss_type: str = "sigmoid"
    loss_weights: str | None = None
    beta: float | None = None
    label_smoothing: float | None = None
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] | None = (
        None
    )
    f_alpha: float | None = None
    ld_alpha: float | None = None
    wpo: bool | None = None
    tau: float | None = None
    dpop_lambda: float | None = None
    orpo_lambda: float | None = None
    gamma: float | None = None
    alpha: float | None = None
    length_average: bool | None = None
    reference_free: bool = False
    sync_ref_model: bool = False
    ref_model_sync_steps: int = 64
    ref_model_mixup_alpha: float = 0.9
    disable_dropout: bool = True

    max_length: int = 512
    max_prompt_length: int = 256
    max_completion_length: int | None = None
    chat_template: str = "auto"
    chat_template_kwargs: dict[str, Any] | None = None
    template_date: str | None = None
    on_overflow: Literal["truncate", "drop", "error"] = "truncate"

    learning_rate: float | None = None
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    total_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    num_train_epochs: int = 3
    max_steps: int | None = None
    seed: int = 0

    save_directory: str = "dpo_checkpoints"
    save_steps: int | None = None
    resume: str = "auto"
    backup_every: str = "10 minutes"
    num_backups: int = 2
    do_last_save: bool = True
    log_steps: int = 50
    evaluation_batch_size: int | None = None
    num_sample_prompts: int = 3
    max_new_tokens: int = 64
    use_wandb: bool = False
    wandb_project: str = "keras-dpo"

    def __post_init__(self) -> None:
        if self.refrence_model_repo_id and not self.reference_model_repo_id:
            self.reference_model_repo_id = self.refrence_model_repo_id
        self._check_values_are_there()
        self._check_numbers()
        self._check_flags_that_go_together()
        # JAX backends must not start before multi-process initialization.
        with variables_without_values():
            self.make_loss()

    def _check_values_are_there(self) -> None:
        for field in dataclasses.fields(self):
            missing = getattr(self, field.name) is None
            if missing and field.default is not None:
                raise UserError(
                    f"`{field.name}` must have a value. Received: None. Leave "
                    f"it out for {field.default!r}."
                )

    def _check_numbers(self) -> None:
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(
                    f"`{name}` must be above 0. Received: {value!r}."
                )
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise UserError(
                    f"`{name}` must not be below 0. Received: "
                    f"{getattr(self, name)!r}."
                )
        if self.seed >= 2**32:
            raise UserError(
                f"`seed` must be below 2**32. Received: {self.seed!r}."
            )
        if self.total_batch_size % self.gradient_accumulation_steps:
            raise UserError(
                "`total_batch_size` must divide into "
                "`gradient_accumulation_steps` micro-batches. Received: "
                f"{self.total_batch_size} and "
                f"{self.gradient_accumulation_steps}."
            )
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(
                "`warmup_ratio` must be in [0, 1). Received: "
                f"{self.warmup_ratio!r}."
            )
        name = self.model_name
        if not name or name in (".", "..") or "/" in name or "\\" in name:
            raise UserError(
                "`model_name` must be a plain directory name. Received: "
                f"{name!r}."
            )

    def unread_flags(self) -> list[str]:
        """One line per setting that has no effect on this run."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        names = []
        if not self.sync_ref_model:
            names += ["ref_model_sync_steps", "ref_model_mixup_alpha"]
        return [
            f"`{name}`={getattr(self, name)} has no effect: sync_ref_model is "
            "off."
            for name in names
            if getattr(self, name) != defaults[name]
        ]

    def _check_flags_that_go_together(self) -> None:
        """Raise if settings contradict each other."""
        without = self.reference_free or self.reference == "none"
        if self.reference_cache and self.reference != "precomputed":
            raise UserError(
                "`reference_cache` has no effect without "
                f"reference=precomputed. Received: {self.reference_cache!r}."
            )
        if self.reference_model_repo_id and without:
            raise UserError(
                "`reference_model_repo_id` has no effect together with "
                f"reference={self.reference!r}, reference_free="
                f"{self.reference_free}. Leave one of them out."
            )
        if self.sync_ref_model and (without or self.reference != "initial"):
            raise UserError(
                "`sync_ref_model` needs a reference that is kept. Received: "
                f"reference={self.reference!r}, reference_free="
                f"{self.reference_free}. A precomputed reference cannot be "
                "synced: use reference=initial."
            )
        if self.streaming and self.max_steps is None:
            raise UserError(
                "`streaming` needs `max_steps`: nobody knows how long a "
                "stream is. Received: max_steps=None."
            )
        if self.streaming and self.reference == "precomputed":
            raise UserError(
                "`streaming` goes with a reference that is run. Received: "
                "reference='precomputed', which reads all pairs before."
            )
        if self.mesh is not None:
            parse_mesh(self.mesh)
        elif not self.shard_parameters:
            raise UserError(
                "`shard_parameters` has no effect without a mesh. Give mesh, "
                "or leave it out."
            )
        if self.lora_target_layers and not self.lora_rank:
            raise UserError(
                "`lora_target_layers` has no effect without lora_rank. "
                f"Received: {self.lora_target_layers!r}."
            )

    def resolved(self) -> "DPOConfig":
        """The config with unset settings filled in, as a run uses it.

        Options whose default differs between several losses stay unset, and
        so do options that no loss reads.
        """
        loss = self.make_loss()
        options = [x.get_config() for x in getattr(loss, "losses", [loss])]
        used: dict[str, Any] = {}
        for name in LOSS_OPTIONS:
            values = [own[name] for own in options if name in own]
            if values and all(value == values[0] for value in values):
                used[name] = values[0]
        if self.learning_rate is None:
            used["learning_rate"] = (
                LORA_LEARNING_RATE if self.lora_rank else LEARNING_RATE
            )
        return dataclasses.replace(self, **used)

    def make_loss(self) -> losses.PreferenceLoss:
        """Build the loss that the options describe.

        Raises:
            ValueError: A name is unknown, or an option is set that none of
                the losses reads.
        """
        try:
            return self._make_loss()
        except UserError:
            raise
        except ValueError as error:
            # Losses import nothing of this package, not even its errors.
            raise UserError(str(error)) from error

    def _make_loss(self) -> losses.PreferenceLoss:
        names = [name.strip() for name in self.loss_type.split(",")]
        if len(names) == 1 and self.loss_weights is not None:
            raise UserError(
                "`loss_weights` has no effect on one loss. Received: "
                f"loss_type={self.loss_type!r}, "
                f"loss_weights={self.loss_weights!r}."
            )
        options = {
            name: getattr(self, name)
            for name in LOSS_OPTIONS
            if getattr(self, name) is not None
        }
        if len(names) == 1:
            return losses.get(names[0], **options)
        read: set[str] = set()
        parts = []
        for name in names:
            losses.get(name)  # An unknown name is reported first.
            known = losses.option_names(losses.LOSSES[name])
            own = {k: v for k, v in options.items() if k in known}
            read |= set(own)
            parts.append(losses.get(name, **own))
        unread = sorted(set(options) - read)
        if unread:
            raise UserError(
                f"None of the losses {self.loss_type} reads "
                f"{', '.join(unread)}."
            )
        weights = [1.0] * len(parts)
        if self.loss_weights is not None:
            try:
                weights = [float(x) for x in self.loss_weights.split(",")]
            except ValueError as error:
                raise UserError(
                    "`loss_weights` must be numbers joined with commas. "
                    f"Received: {self.loss_weights!r}."
                ) from error
        return losses.WeightedSum(parts, weights)
