"""Which teachers a configuration has."""

from opd_trainer.config import Config
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.teacher.config import DedicatedTeacher as DedicatedTeacherConfig
from opd_trainer.teacher.config import TeacherConfig

DEFAULT_TEACHER = "default"


def teachers_of(config: Config) -> dict[str, TeacherConfig]:
    """Every teacher by name; none when OPD is off."""
    return {DEFAULT_TEACHER: config.teacher, **config.teachers} if config.opd.on else {}


def title_of(name: str) -> str:
    """What people are told of a teacher by its name: "teacher", or "teacher <name>"."""
    return "teacher" if name == DEFAULT_TEACHER else f"teacher {name}"


def dedicated_layout(teacher: DedicatedTeacherConfig, config: Config) -> MegatronConfig:
    """The parallel layout of a teacher's own workers."""
    return MegatronConfig(
        tensor_parallel=teacher.tensor_parallel,
        pipeline_parallel=teacher.pipeline_parallel,
        context_parallel=teacher.context_parallel,
        expert_parallel=teacher.expert_parallel,
        sequence_parallel=teacher.sequence_parallel,
        max_tokens_per_device=teacher.max_tokens_per_device,
        log_prob_chunk_tokens=config.megatron.log_prob_chunk_tokens,
        timeout_s=config.megatron.timeout_s,
    )
