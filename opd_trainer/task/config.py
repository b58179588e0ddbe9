"""What `launch.py` does."""

from dataclasses import dataclass
from enum import StrEnum, auto

from opd_trainer.model.config import Dtype


@dataclass(slots=True)
class TaskConfig:
    """What every task knows; a task's own settings are fields of its subclass."""


@dataclass(slots=True)
class TrainTask(TaskConfig):
    """On-policy distillation (the default)."""

    check_memory: bool = True
    """Refuse to start where the memory plan does not fit; false only tells it."""


@dataclass(slots=True)
class PreflightTask(TrainTask):
    """Checks all that task=train needs, without starting it, and tells what will be in memory, phase by phase."""

    device_memory_gib: float | None = None
    """Memory of each GPU of the machine to plan for, GiB; null takes this machine, or with a `host_memory_gib` one
    without GPUs."""
    host_memory_gib: float | None = None
    """Host memory of the machine to plan for, GiB; with a `device_memory_gib` null sets no limit."""


@dataclass(slots=True)
class SftTask(TaskConfig):
    """Supervised fine-tuning on prompt/response rows, through the same Megatron path."""

    response_key: str = "response"
    """Column of `data` with the response to learn."""
    batch_size: int = 128
    """Sequences per optimizer step."""
    stop_accuracy: float | None = None
    """Stop at the first evaluation (`eval.every`) whose held-out accuracy reaches this."""
    snapshot_accuracy: float | None = None
    """Also export the first model whose held-out accuracy reaches this, into `snapshot`."""


@dataclass(slots=True)
class EvaluateTask(TaskConfig):
    """Evaluates `model.load` on `eval.datasets`."""


@dataclass(slots=True)
class ServeTeacherTask(TaskConfig):
    """Serves `teacher.load` on SGLang servers of our own until it is stopped; `teacher` is sglang_managed."""


@dataclass(slots=True)
class ServeTask(TaskConfig):
    """Serves a trained student on SGLang servers of our own until it is stopped; `rollout` is sglang."""


class ConvertFormat(StrEnum):
    """What a conversion writes."""

    torch_dist = auto()
    """Megatron-core's sharded checkpoint, under Megatron-LM's names, with config.json and tokenizer."""
    huggingface = auto()
    """A folder that transformers and SGLang load."""


@dataclass(slots=True)
class ConvertTask(TaskConfig):
    """Rewrites a model in another format, and compares every tensor of the result with the source."""

    source: str | None = None
    """What to convert: anything that `model.load` takes; `model.ckpt_step` and `model.huggingface` apply to it."""
    target: str | None = None
    """Folder to write; must not exist."""
    format: ConvertFormat = ConvertFormat.torch_dist
    """torch_dist or huggingface."""
    dtype: Dtype | None = None
    """dtype of the weights to write; null takes the one that keeps every bit of the source."""


@dataclass(slots=True)
class DoctorTask(TaskConfig):
    """Tells what is installed, what the machine has, and what of this project works here; needs no model."""


@dataclass(slots=True)
class SummarizeTask(TaskConfig):
    """Table and curves of a sweep, from the files of its trials; those that are not finished yet are left out."""

    sweep_dir: str | None = None
    """Directory of the sweep, which `python launch.py -m ...` names when it starts."""
