"""The student with its optimizer and what lives beside it, and what it optimises."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from opd_trainer.build.roster import teachers_of
from opd_trainer.build.vocabulary import Vocabulary
from opd_trainer.build.workers import Workers
from opd_trainer.checkpoint import Checkpoints
from opd_trainer.config import Config
from opd_trainer.errors import ConfigError, Problem
from opd_trainer.loss.config import Correction
from opd_trainer.megatron.config import Placement
from opd_trainer.megatron.learner import MegatronLearner
from opd_trainer.megatron.source import config_folder
from opd_trainer.megatron.spec import CriticSpec, TeacherBuilder, WorkerSpec
from opd_trainer.megatron.worker import MegatronWorker
from opd_trainer.model.config import ModelConfig
from opd_trainer.model.folder import load_tokenizer
from opd_trainer.model.identity import differing_ids
from opd_trainer.objective import Objective
from opd_trainer.opd.config import OpdType
from opd_trainer.rollout.config import RolloutMode
from opd_trainer.task.config import SftTask, TrainTask
from opd_trainer.teacher.config import DedicatedTeacher
from opd_trainer.teacher.inline import inline_teacher

log = logging.getLogger(__name__)


def build_learner(config: Config, vocabulary: Vocabulary, workers: Workers) -> MegatronLearner:
    """The student with its optimizer and, where they are used, inline teachers, reference and critic.

    Raises:
        UserError: a teacher or the critic does not fit.
    """
    temperature = config.rollout.temperature
    teachers: dict[str, TeacherBuilder] = {}
    if config.opd.type is OpdType.megatron and isinstance(config.task, TrainTask):
        teachers = {
            name: inline_teacher(
                name,
                teacher,
                config.model,
                config.megatron,
                temperature,
                compares_distributions=config.opd.divergence.dense,
            )
            for name, teacher in teachers_of(config).items()
            if not isinstance(teacher, DedicatedTeacher)
        }
    reference = reference_of(config)
    if reference is not None and config.reference.load is not None:
        refuse_other_words("reference", reference, vocabulary)
    spec = WorkerSpec(
        model=config.model,
        vocab_size=len(vocabulary.tokenizer),
        megatron=config.megatron,
        temperature=temperature,
        seed=config.seed,
        total_steps=optimizer_steps(config),
        teachers=teachers,
        reference=reference,
        reference_placement=Placement(config.reference.placement),
        critic=critic_of(config, vocabulary),
    )
    return MegatronLearner(
        workers.training(MakeMegatronWorker(spec)),
        max_tokens=config.megatron.max_tokens_per_device * config.megatron.context_parallel,
        bucket_bytes=config.rollout.bucket_bytes,
    )


def checkpoints_of(config: Config, output_dir: Path, asked_to_stop: Callable[[], bool] = lambda: False) -> Checkpoints:
    """Where and when the state of a run is saved."""
    return Checkpoints(
        output_dir / "checkpoints",
        every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        total_steps=config.steps,
        background=config.checkpoint.async_save,
        asked_to_stop=asked_to_stop,
    )


def optimizer_steps(config: Config) -> int:
    """Optimizer steps of the whole run, which learning-rate schedules spread over."""
    if isinstance(config.task, SftTask):
        return config.steps
    return config.steps * config.loss.updates_per_rollout * config.loss.epochs_per_rollout


def reference_of(config: Config) -> ModelConfig | None:
    """The reference model; None where nothing needs it."""
    if not config.reference.used or not isinstance(config.task, TrainTask):
        return None
    if config.reference.load is None:
        return config.model
    return dataclasses.replace(config.model, load=config.reference.load, ckpt_step=config.reference.ckpt_step)


def refuse_other_words(role: str, model: ModelConfig, vocabulary: Vocabulary) -> None:
    """Refuses a model whose token ids mean other words than the student's.

    Raises:
        CheckpointError: its tokenizer cannot be read.
        ConfigError: its tokenizer is not the student's.
    """
    theirs = load_tokenizer(config_folder(model)).get_vocab()
    differing = differing_ids(vocabulary.tokenizer.get_vocab(), theirs)
    if differing:
        what = f"{model.load!r}, whose tokenizer differs from the student's at {len(differing)} ids"
        why = "it would judge other words than the student wrote"
        fix = f"Use a {role} with the student's tokenizer, or {role}.load=null"
        raise ConfigError([Problem(f"{role}.load", what, why, fix)])


def critic_of(config: Config, vocabulary: Vocabulary) -> CriticSpec | None:
    """The critic; None where nothing needs values.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: its tokenizer is not the student's.
    """
    loss = config.estimator.critic_loss
    if loss is None or not isinstance(config.task, TrainTask):
        return None
    if config.critic.load is None:
        return CriticSpec(model=config.model, optimizer=config.critic.optimizer, loss=loss)
    model = dataclasses.replace(config.model, load=config.critic.load, ckpt_step=None)
    refuse_other_words("critic", model, vocabulary)
    return CriticSpec(model=model, optimizer=config.critic.optimizer, loss=loss)


@dataclass(frozen=True, slots=True)
class MakeMegatronWorker:
    """A picklable constructor of training workers."""

    spec: WorkerSpec

    def __call__(self, rank: int, world_size: int, rendezvous: str) -> MegatronWorker:
        """The worker of `rank`."""
        return MegatronWorker(self.spec, rank, world_size, rendezvous)


def correction_of(config: Config) -> Correction:
    """What is asked for, or what the age of the samples calls for."""
    if config.loss.correction is not None:
        return config.loss.correction
    return Correction.tis if config.rollout.mode is RolloutMode.one_step_off else Correction.none


def build_objective(config: Config) -> Objective:
    """Estimator, OPD term, reference KL and their order."""
    if "group" in config.estimator.needs and config.rollout.samples_per_prompt == 1:
        log.warning(
            "with rollout.samples_per_prompt=1 the advantage of a response relative to its group is 0: the task reward "
            "does not reach the student, which learns from the teacher alone"
        )
    return Objective(
        estimator=config.estimator,
        opd=config.opd,
        reference=config.reference,
        options=dataclasses.replace(config.loss, correction=correction_of(config)),
        temperature=config.rollout.temperature,
        max_response_tokens=config.rollout.max_response_tokens,
        total_steps=config.steps,
        seed=config.seed,
    )
