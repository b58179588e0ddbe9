"""Teachers that score samples as they land: Megatron workers of their own, and SGLang servers."""

from pathlib import Path

from opd_trainer.build.data import Prompts
from opd_trainer.build.roster import DEFAULT_TEACHER, dedicated_layout, teachers_of
from opd_trainer.build.workers import Workers
from opd_trainer.config import Config
from opd_trainer.megatron.micro_batch import Scoring
from opd_trainer.megatron.scorer import MegatronScorer
from opd_trainer.megatron.scoring_worker import ScoringSpec
from opd_trainer.megatron.source import config_folder
from opd_trainer.model.identity import profile
from opd_trainer.opd.config import OpdType
from opd_trainer.sglang.fleet import Fleet
from opd_trainer.teacher.config import DedicatedTeacher as DedicatedTeacherConfig
from opd_trainer.teacher.config import ServerTeacher, SglangManagedTeacher
from opd_trainer.teacher.dedicated import DedicatedTeacher
from opd_trainer.teacher.inline import checked_teacher
from opd_trainer.teacher.preflight import Student
from opd_trainer.teacher.sglang import SglangTeacher

NUM_PROBES = 4
"""Prompts of the training data that a server teacher scores before the first step."""


def build_dedicated_teachers(config: Config, workers: Workers) -> dict[str, DedicatedTeacher]:
    """The teachers that have workers of their own, by name.

    Raises:
        UserError: a teacher does not fit.
    """
    return {
        name: _dedicated_teacher(name, teacher, config, workers)
        for name, teacher in teachers_of(config).items()
        if isinstance(teacher, DedicatedTeacherConfig)
    }


def _dedicated_teacher(
    name: str, teacher: DedicatedTeacherConfig, config: Config, workers: Workers
) -> DedicatedTeacher:
    checked = checked_teacher(name, teacher, config.model)
    megatron = dedicated_layout(teacher, config)
    temperature = config.rollout.temperature
    scoring = Scoring(temperature, megatron.log_prob_chunk_tokens)
    spec = ScoringSpec(model=checked.settings, megatron=megatron, scoring=scoring, seed=config.seed)
    scorer = MegatronScorer(
        workers.dedicated(spec, name, teacher),
        # Alone in its micro-batch a sequence has log-probs that do not depend on which others arrived with it.
        max_tokens=teacher.max_tokens_per_device * teacher.context_parallel if teacher.pack else 1,
        bucket_bytes=config.rollout.bucket_bytes,
    )
    return DedicatedTeacher(scorer, checked.identity, temperature=temperature, name=name)


def build_server_teachers(config: Config, prompts: Prompts, output_dir: Path) -> dict[str, SglangTeacher]:
    """The teachers behind SGLang servers, by name.

    Raises:
        CheckpointError: the student's tokenizer cannot be read.
    """
    if config.opd.type is not OpdType.sglang:
        return {}
    folder = config_folder(config.model)
    student = Student(
        profile=profile(folder, folder),
        probes=[prompt.tokens.tolist() for prompt in prompts.training[0].prompts if len(prompt.tokens) > 1][
            :NUM_PROBES
        ],
        max_tokens=config.rollout.max_prompt_tokens + config.rollout.max_response_tokens,
        temperature=config.rollout.temperature,
    )
    teachers = {}
    for name, teacher in teachers_of(config).items():
        assert isinstance(teacher, ServerTeacher), "checked with the configuration"
        fleet = _fleet(name, teacher, output_dir)
        teachers[name] = SglangTeacher(teacher, fleet, student, name=name, top_k=config.opd.log_prob_top_k)
    return teachers


def _fleet(name: str, teacher: ServerTeacher, output_dir: Path) -> Fleet:
    if isinstance(teacher, SglangManagedTeacher):
        assert teacher.load is not None, "checked with the configuration"
        label = "teacher" if name == DEFAULT_TEACHER else f"teacher-{name}"
        return Fleet.launch(label, teacher.load, teacher.launch, output_dir / "servers")
    assert teacher.url is not None, "checked with the configuration"
    return Fleet([url.strip() for url in teacher.url.split(",")])
