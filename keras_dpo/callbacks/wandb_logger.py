"""`WandbLogger`: logging with plain `wandb`, which also works offline."""

from typing import Any

from keras_dpo.callbacks.step_logger import StepLogger
from keras_dpo.distribution.processes import is_main_process
from keras_dpo.utils.redaction import without_secrets


class WandbLogger(StepLogger):
    """Logs config, metrics and sample generations to Weights & Biases.

    W&B's own Keras callback fails on JAX with a learning-rate schedule.

    Args:
        project: Name of the W&B project.
        name: Name of the run.
        config: Settings to show with the run.
        every: Optimizer steps between records.
        directory: Directory for offline runs.
        run_id: Id of the run to resume, if W&B has it.
    """

    def __init__(
        self,
        project: str = "keras-dpo",
        name: str | None = None,
        config: dict[str, Any] | None = None,
        every: int = 50,
        directory: str | None = None,
        run_id: str | None = None,
    ) -> None:
        super().__init__(every)
        import wandb

        self.run = wandb.init(
            project=project,
            name=name,
            config=without_secrets(config),
            dir=directory,
            id=run_id,
            resume="allow" if run_id else None,
            mode=None if is_main_process() else "disabled",
        )

    def write(self, record: dict[str, Any]) -> None:
        record = dict(record)
        step = record.pop("step")
        prefix = "epoch/" if "end_of_epoch" in record else "train/"
        self.run.log({prefix + k: v for k, v in record.items()}, step=step)

    def log_samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Log a table of generations."""
        import wandb

        columns: list[Any] = list(samples[0])
        rows = [[sample[name] for name in columns] for sample in samples]
        table = wandb.Table(columns=columns, data=rows)
        self.run.log({"samples": table}, step=step)

    def close(self) -> None:
        """Finish the run; all records are then on disk or sent."""
        self.run.finish()
