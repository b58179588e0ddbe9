"""Where a teacher lives. The keys that users confuse are on the base class, so that a wrong combination gets our message."""

from dataclasses import dataclass, field
from enum import StrEnum, auto

from opd_trainer.model.config import ModelConfig


class OnFailure(StrEnum):
    """What happens to a sample that the teacher could not score."""

    mask = auto()
    """Its tokens lose the OPD term and keep their base advantage."""
    abort = auto()
    """The run stops."""


@dataclass(slots=True)
class TeacherConfig:
    """A teacher; the option (`teacher=resident`, ...) says where it lives."""

    load: str | None = None
    """Megatron teachers: Hugging Face folder or torch_dist checkpoint."""
    ckpt_step: int | None = None
    """Megatron teachers: step to load from a directory of checkpoints; null takes the latest."""
    model: ModelConfig | None = None
    """Megatron teachers: the teacher's own model settings when they differ from the student's."""
    url: str | None = None
    """Server teachers: base URL, with or without a trailing /generate."""
    timeout_s: float = 30.0
    """Server teachers: limit on one scoring request, seconds."""
    on_failure: OnFailure = OnFailure.mask
    """mask or abort."""
    max_failed_fraction: float = 0.2
    """Largest fraction of a step's samples that may fail before the run stops."""


@dataclass(slots=True)
class ResidentTeacher(TeacherConfig):
    """An extra Megatron model beside the student, scored inline in the same forward pass."""


@dataclass(slots=True)
class SglangExternalTeacher(TeacherConfig):
    """An SGLang server that somebody else runs, reached at `url`."""
