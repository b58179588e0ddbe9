"""The composition root: from the configuration to the objects that a run consists of."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opd_trainer.cluster.config import RayCluster
from opd_trainer.cluster.inprocess import InProcessGroup
from opd_trainer.config import Config
from opd_trainer.data.prompts import PromptSet, check_disjoint, load_prompts, load_training_sets
from opd_trainer.data.stream import PromptStream
from opd_trainer.errors import ConfigError, Problem
from opd_trainer.megatron.config import MegatronConfig, Placement
from opd_trainer.megatron.families.registry import architecture_from_config, to_hf_config
from opd_trainer.megatron.learner import MegatronLearner
from opd_trainer.megatron.micro_batch import Scoring
from opd_trainer.megatron.module import DTYPES
from opd_trainer.megatron.scorer import MegatronScorer
from opd_trainer.megatron.scoring_worker import ScoringSpec
from opd_trainer.megatron.source import config_folder
from opd_trainer.megatron.spec import CriticSpec, TeacherBuilder, WorkerSpec
from opd_trainer.megatron.worker import MegatronWorker
from opd_trainer.model.config import ModelConfig
from opd_trainer.model.folder import eos_token_ids, load_tokenizer
from opd_trainer.model.identity import differing_ids
from opd_trainer.objective import Objective
from opd_trainer.opd.config import OpdType
from opd_trainer.protocols import RolloutEngine, WorkerGroup
from opd_trainer.rollout.config import EmbeddedRollout
from opd_trainer.rollout.embedded.engine import EmbeddedEngine
from opd_trainer.rollout.embedded.worker import EmbeddedSpec
from opd_trainer.rollout.group import EngineGroup
from opd_trainer.task.config import TrainTask
from opd_trainer.teacher.config import DedicatedTeacher as DedicatedTeacherConfig
from opd_trainer.teacher.config import TeacherConfig
from opd_trainer.teacher.dedicated import DedicatedTeacher
from opd_trainer.teacher.inline import checked_teacher, inline_teacher, teacher_settings
from opd_trainer.types import Sampling

MakeWorker = Callable[[int, int, str], Any]
DEFAULT_TEACHER = "default"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the controller needs to know of a model to talk to it.

    Attributes:
        folder: holds its tokenizer.
        tokenizer: a `transformers` tokenizer.
        eos_token_ids: tokens that end a response.
        config: its `transformers` configuration.
    """

    folder: Path
    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    config: Any


def vocabulary_of(model: ModelConfig) -> Vocabulary:
    """Reads config and tokenizer of a model that is loaded, or is to be trained from scratch.

    Raises:
        CheckpointError: there are none.
    """
    from transformers import AutoConfig

    folder = config_folder(model)
    tokenizer = load_tokenizer(folder)
    if model.load is None:
        described = to_hf_config(architecture_from_config(model.architecture, len(tokenizer)))
        config = AutoConfig.for_model(**described)
    else:
        config = AutoConfig.from_pretrained(folder)
    return Vocabulary(folder, tokenizer, eos_token_ids(folder, tokenizer), config)


def teachers_of(config: Config) -> dict[str, TeacherConfig]:
    """Every teacher by name; none when OPD is off."""
    return {DEFAULT_TEACHER: config.teacher, **config.teachers} if config.opd.on else {}


class Workers:
    """Makes worker groups on the cluster that the configuration asks for; groups on Ray share one session."""

    def __init__(self, config: Config) -> None:
        self._cluster, self._timeout_s = config.cluster, config.megatron.timeout_s
        self._session: Any = None

    def training(self, make_worker: MakeWorker) -> WorkerGroup:
        """Megatron workers."""
        if isinstance(self._cluster, RayCluster):
            return self._ray(self._cluster, make_worker, "training", self._cluster.num_workers)
        return InProcessGroup(make_worker)

    def rollout(self, spec: EmbeddedSpec) -> RolloutEngine:
        """Embedded engines: in this process, or as workers that share the prompts."""
        if isinstance(self._cluster, RayCluster):
            return EngineGroup(self._ray(self._cluster, spec.make_worker, "rollout", self._cluster.num_rollout_workers))
        return EmbeddedEngine(spec)

    def dedicated(self, spec: ScoringSpec, name: str, size: int) -> WorkerGroup:
        """Workers of a teacher; only Ray has them."""
        assert isinstance(self._cluster, RayCluster), "checked with the configuration"
        return self._ray(self._cluster, spec.make_worker, name, size)

    def _ray(self, cluster: RayCluster, make_worker: MakeWorker, name: str, size: int) -> WorkerGroup:
        from opd_trainer.cluster.ray import RayGroup, RaySession

        if self._session is None:
            self._session = RaySession(cluster.address, cluster.num_cpus)
        gpus = cluster.gpus_per_worker
        return RayGroup(
            self._session,
            make_worker,
            name=name,
            size=size,
            cpus_per_worker=cluster.cpus_per_worker,
            gpus_per_worker=float(torch.cuda.is_available()) if gpus is None else gpus,
            timeout_s=self._timeout_s,
        )


def build_learner(config: Config, vocabulary: Vocabulary, workers: Workers) -> MegatronLearner:
    """The student with its optimizer, inline teachers and, where they are used, reference and critic.

    Raises:
        UserError: a teacher or the critic does not fit.
    """
    temperature = config.rollout.temperature
    teachers: dict[str, TeacherBuilder] = {}
    if config.opd.type is OpdType.megatron:
        teachers = {
            name: inline_teacher(name, teacher, config.model, config.megatron, temperature)
            for name, teacher in teachers_of(config).items()
            if not isinstance(teacher, DedicatedTeacherConfig)
        }
    reference = None
    if config.reference.used:
        reference = dataclasses.replace(config.model, load=config.reference.load or config.model.load)
    spec = WorkerSpec(
        model=config.model,
        vocab_size=len(vocabulary.tokenizer),
        megatron=config.megatron,
        temperature=temperature,
        seed=config.seed,
        total_steps=config.steps * config.loss.updates_per_rollout * config.loss.epochs_per_rollout,
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
    megatron = MegatronConfig(
        tensor_parallel=teacher.tensor_parallel,
        pipeline_parallel=teacher.pipeline_parallel,
        context_parallel=teacher.context_parallel,
        expert_parallel=teacher.expert_parallel,
        sequence_parallel=teacher.sequence_parallel,
        max_tokens_per_device=teacher.max_tokens_per_device,
        log_prob_chunk_tokens=config.megatron.log_prob_chunk_tokens,
        timeout_s=config.megatron.timeout_s,
    )
    temperature = config.rollout.temperature
    scoring = Scoring(temperature, megatron.log_prob_chunk_tokens)
    spec = ScoringSpec(model=checked.settings, megatron=megatron, scoring=scoring, seed=config.seed)
    scorer = MegatronScorer(
        workers.dedicated(spec, f"teacher {name}", teacher.num_workers),
        # Alone in its micro-batch a sequence has log-probs that do not depend on which others arrived with it.
        max_tokens=teacher.max_tokens_per_device if teacher.pack else 1,
        bucket_bytes=config.rollout.bucket_bytes,
    )
    return DedicatedTeacher(scorer, checked.identity, temperature=temperature, name=name)


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
    theirs = load_tokenizer(config_folder(model)).get_vocab()
    differing = differing_ids(vocabulary.tokenizer.get_vocab(), theirs)
    if differing:
        what = f"{config.critic.load!r}, whose tokenizer differs from the student's at {len(differing)} ids"
        why = "it would judge other words than the student wrote"
        fix = "Use a critic with the student's tokenizer, or critic.load=null"
        raise ConfigError([Problem("critic.load", what, why, fix)])
    return CriticSpec(model=model, optimizer=config.critic.optimizer, loss=loss)


@dataclass(frozen=True, slots=True)
class MakeMegatronWorker:
    """A picklable constructor of training workers."""

    spec: WorkerSpec

    def __call__(self, rank: int, world_size: int, rendezvous: str) -> MegatronWorker:
        """The worker of `rank`."""
        return MegatronWorker(self.spec, rank, world_size, rendezvous)


def embedded_spec(config: Config, vocabulary: Vocabulary) -> EmbeddedSpec:
    """An embedded engine for the model of `vocabulary`."""
    assert isinstance(config.rollout, EmbeddedRollout)
    return EmbeddedSpec(
        config=vocabulary.config,
        tokenizer=vocabulary.tokenizer,
        eos_token_ids=vocabulary.eos_token_ids,
        rollout=config.rollout,
        dtype=DTYPES[config.model.dtype],
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def build_engine(config: Config, vocabulary: Vocabulary, workers: Workers) -> RolloutEngine:
    """The engine that samples from the student."""
    return workers.rollout(embedded_spec(config, vocabulary))


def build_teacher_engine(config: Config) -> RolloutEngine:
    """An engine of its own for the default Megatron teacher, in this process."""
    return EmbeddedEngine(embedded_spec(config, vocabulary_of(teacher_settings(config.teacher, config.model))))


def build_objective(config: Config) -> Objective:
    """Estimator, OPD term, reference KL and their order."""
    return Objective(
        estimator=config.estimator,
        opd=config.opd,
        reference=config.reference,
        options=config.loss,
        temperature=config.rollout.temperature,
        max_response_tokens=config.rollout.max_response_tokens,
        total_steps=config.steps,
        seed=config.seed,
    )


def sampling_of(config: Config, vocabulary: Vocabulary) -> Sampling:
    """How training responses are drawn."""
    rollout = config.rollout
    return Sampling(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_response_tokens=rollout.max_response_tokens,
        stop_token_ids=stop_token_ids(config, vocabulary),
    )


def evaluation_sampling(config: Config, vocabulary: Vocabulary) -> Sampling:
    """How held-out responses are drawn."""
    return Sampling(
        temperature=config.eval.temperature,
        top_p=1.0,
        top_k=0,
        max_response_tokens=config.eval.max_response_tokens or config.rollout.max_response_tokens,
        stop_token_ids=stop_token_ids(config, vocabulary),
    )


def stop_token_ids(config: Config, vocabulary: Vocabulary) -> tuple[int, ...]:
    """The model's end-of-sequence tokens and those of the configuration."""
    return tuple(sorted({*vocabulary.eos_token_ids, *config.rollout.stop_token_ids}))


@dataclass(frozen=True, slots=True)
class Prompts:
    """Training and held-out prompts, disjoint."""

    training: list[PromptSet]
    held_out: list[PromptSet]

    def stream(self) -> PromptStream:
        """The training prompts, step by step."""
        return PromptStream(self.training)


def load_data(config: Config, vocabulary: Vocabulary) -> Prompts:
    """Reads every dataset.

    Raises:
        DataError: a row is malformed, a file is missing, or held-out prompts are trained on.
    """
    limit = config.rollout.max_prompt_tokens
    training = load_training_sets(config.data, vocabulary.tokenizer, max_prompt_tokens=limit)
    held_out = load_held_out(config, vocabulary)
    check_disjoint(training, held_out)
    return Prompts(training, held_out)


def load_held_out(config: Config, vocabulary: Vocabulary) -> list[PromptSet]:
    """The held-out datasets.

    Raises:
        DataError: a row is malformed or a file is missing.
    """
    limit = config.rollout.max_prompt_tokens
    return [
        load_prompts(data, vocabulary.tokenizer, name=name, max_prompt_tokens=limit)
        for name, data in config.eval.datasets.items()
    ]
