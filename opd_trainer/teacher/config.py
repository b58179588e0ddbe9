"""Where a teacher lives. Keys that users confuse are on the base class: a wrong combination gets our message."""

from dataclasses import dataclass, field
from enum import StrEnum, auto

from opd_trainer.model.config import ModelConfig
from opd_trainer.sglang.config import LaunchConfig


def key_of(name: str) -> str:
    """Where the settings of a teacher are, for messages; `name` is as samples call it (`Prompt.teacher`)."""
    return "teacher" if name == "default" else f"teachers.{name}"


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
class OffloadTeacher(TeacherConfig):
    """A Megatron model of its own beside the student, whose weights are in host memory between uses."""


@dataclass(slots=True)
class SwapTeacher(TeacherConfig):
    """The student's own module, with weights exchanged while the teacher scores: shapes must be identical."""


@dataclass(slots=True)
class DedicatedTeacher(TeacherConfig):
    """Megatron workers of its own, in a layout of its own, that score while responses still arrive; on cluster=ray."""

    num_workers: int = 1
    """Its workers; tensor x pipeline x context parallel sizes must divide it."""
    tensor_parallel: int = 1
    """Its ranks that share each layer's matrices."""
    pipeline_parallel: int = 1
    """Its ranks that share the layers."""
    context_parallel: int = 1
    """Its ranks that share each sequence."""
    expert_parallel: int = 1
    """Its ranks of a pipeline stage that share the experts."""
    sequence_parallel: bool = False
    """Shard its norms and residual stream over tensor-parallel ranks; a mixture of experts needs it there."""
    max_tokens_per_device: int = 8192
    """Budget of its packed micro-batches, tokens; used with `pack`."""
    pack: bool = False
    """Pack the responses that wait into shared micro-batches: faster where they are short, but a log-prob then depends,
    by rounding, on what happened to arrive together. Otherwise each response is computed alone."""


@dataclass(slots=True)
class ServerTeacher(TeacherConfig):
    """What SGLang teachers have in common."""

    concurrency: int = 64
    """Scoring requests under way at once, over all servers, >= 1."""
    attempts: int = 4
    """Tries of a request (on another server where there is one) before it counts as failed, >= 1."""
    check_trained: bool = True
    """Refuse a teacher to which all tokens of the prompts are about equally likely, as to random weights."""


@dataclass(slots=True)
class SglangExternalTeacher(ServerTeacher):
    """An SGLang server that somebody else runs, reached at `url`."""


@dataclass(slots=True)
class SglangManagedTeacher(ServerTeacher):
    """SGLang servers that we launch from the Hugging Face folder `load`."""

    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """How they are launched."""
