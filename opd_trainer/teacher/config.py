"""Where a teacher lives. Keys that users confuse are on the base class: a wrong combination gets our message."""

from dataclasses import dataclass, field
from enum import StrEnum, auto

from opd_trainer.model.config import ModelConfig
from opd_trainer.sglang.config import LaunchConfig


class OnFailure(StrEnum):
    """What happens to a sample that the teacher could not score."""

    mask = auto()
    """Its tokens lose the OPD term and keep their base advantage."""
    fallback_rollout = auto()
    """The engine's log-probs stand in for the teacher's, as if the two agreed (as Relax does); biased."""
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
    """Server teachers: base URL, with or without a trailing /generate; several, separated by commas, share the work."""
    timeout_s: float = 30.0
    """Server teachers: limit on one scoring request, seconds."""
    on_failure: OnFailure = OnFailure.mask
    """mask, fallback_rollout or abort."""
    max_failed_fraction: float = 0.2
    """Largest fraction of a step's samples that may fail before the run stops."""


@dataclass(slots=True)
class ResidentTeacher(TeacherConfig):
    """An extra Megatron model beside the student, scored inline in the same forward pass."""


@dataclass(slots=True)
class ServerTeacher(TeacherConfig):
    """What SGLang teachers have in common."""

    concurrency: int = 64
    """Scoring requests under way at once, over all servers, >= 1."""
    attempts: int = 4
    """Tries of a request (on another server where there is one) before it counts as failed, >= 1."""
    check_trained: bool = True
    """Refuse a teacher that knows no more about the prompts than a uniform guess."""


@dataclass(slots=True)
class SglangExternalTeacher(ServerTeacher):
    """An SGLang server that somebody else runs, reached at `url`."""


@dataclass(slots=True)
class SglangManagedTeacher(ServerTeacher):
    """SGLang servers that we launch from the Hugging Face folder `load`."""

    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """How they are launched."""
