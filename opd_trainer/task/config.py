"""What `launch.py` does."""

from dataclasses import dataclass


@dataclass(slots=True)
class TaskConfig:
    """What every task knows; a task's own settings are fields of its subclass."""


@dataclass(slots=True)
class TrainTask(TaskConfig):
    """On-policy distillation (the default)."""


@dataclass(slots=True)
class SftTask(TaskConfig):
    """Supervised fine-tuning on prompt/response rows, through the same Megatron path."""

    response_key: str = "response"
    """Column of `data` with the response to learn."""
    batch_size: int = 128
    """Sequences per optimizer step."""
    eval_every: int = 50
    """Steps between held-out evaluations."""
    stop_accuracy: float | None = None
    """Stop once the held-out accuracy reaches this."""
    snapshot_accuracy: float | None = None
    """Also export the first model whose held-out accuracy reaches this, into `snapshot`."""


@dataclass(slots=True)
class EvaluateTask(TaskConfig):
    """Evaluates `model.load` on `eval.datasets`."""
