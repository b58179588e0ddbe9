"""What of a configuration decides how much memory a run needs."""

import dataclasses
from dataclasses import dataclass

from opd_trainer.build.learner import critic_of, reference_of
from opd_trainer.build.rollout import sampling_of
from opd_trainer.build.roster import dedicated_layout, teachers_of, title_of
from opd_trainer.build.vocabulary import Vocabulary
from opd_trainer.cluster.config import RayCluster
from opd_trainer.config import Config
from opd_trainer.divergence.config import DivergenceKind
from opd_trainer.megatron.config import MegatronConfig, Placement
from opd_trainer.megatron.families.base import Architecture
from opd_trainer.megatron.module import DTYPES
from opd_trainer.megatron.source import architecture_of
from opd_trainer.model.config import Dtype, ModelConfig
from opd_trainer.opd.config import OpdType
from opd_trainer.rollout.config import EmbeddedRollout
from opd_trainer.rollout.embedded.shape import DecoderShape
from opd_trainer.rollout.embedded.slots import bytes_per_slot
from opd_trainer.task.config import EvaluateTask, SftTask
from opd_trainer.teacher.config import DedicatedTeacher, key_of
from opd_trainer.teacher.inline import placement_of, teacher_settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A model of the job.

    Attributes:
        architecture: its shape.
        dtype: of its weights.
    """

    architecture: Architecture
    dtype: Dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen(Part):
    """A model that scores in the student's workers.

    Attributes:
        name: for people.
        key: the configuration key that it hangs on.
        placement: where its weights live.
    """

    name: str
    key: str
    placement: Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart(Part):
    """A teacher with workers of its own.

    Attributes:
        name: for people.
        layout: its parallel layout.
        workers: how many.
    """

    name: str
    layout: MegatronConfig
    workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An embedded rollout engine.

    Attributes:
        workers: processes that have one each; 0 means the student's own.
        slot_bytes: one slot of one row of the KV cache.
        rollout: its sizes.
        rows: responses that are wanted at once.
    """

    workers: int
    slot_bytes: int
    rollout: EmbeddedRollout
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that a plan is computed from.

    Attributes:
        student: the model that is trained, or only evaluated.
        trains: whether it has gradients and an optimizer.
        critic: PPO's value model.
        frozen: models beside the student.
        apart: teachers with workers of their own.
        judged: the teacher that an engine of its own answers the held-out prompts with, once.
        engine: None where servers generate.
        layout: the student's parallel layout.
        workers: the student's workers.
        longest: prompt and response, tokens.
        step_tokens: of all sequences of an optimizer step.
        held_tokens: of their responses, those for which resident teachers keep hidden states until the student has
            computed the divergence of both distributions.
        bucket_bytes: largest bucket of a weight sync.
        shares_process: whether engine and student are in one process.
        saves_behind: whether checkpoints are written from a copy while the run goes on.
    """

    student: Part
    trains: bool
    critic: Part | None
    frozen: tuple[Frozen, ...]
    apart: tuple[Apart, ...]
    judged: Part | None
    engine: Engine | None
    layout: MegatronConfig
    workers: int
    longest: int
    step_tokens: int
    held_tokens: int
    bucket_bytes: int
    shares_process: bool
    saves_behind: bool


def job_of(config: Config, vocabulary: Vocabulary) -> Job:
    """Reads the models' config.json; loads no weights.

    Raises:
        UserError: a model cannot be read.
    """
    rows = len(vocabulary.tokenizer)
    rollout, task = config.rollout, config.task
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    tokens = rollout.prompts_per_step * rollout.samples_per_prompt * longest // config.loss.updates_per_rollout
    frozen, apart, judged, held = (), (), None, 0
    trains, distils = not isinstance(task, EvaluateTask), not isinstance(task, EvaluateTask | SftTask)
    if isinstance(task, SftTask):
        tokens = task.batch_size * longest
    if distils:
        frozen, apart = _frozen(config, rows), _apart(config)
        if config.opd.type is OpdType.megatron and config.eval.teacher:
            judged = _part(teacher_settings(config.teacher, config.model), rows)
        if config.opd.divergence.kind is not DivergenceKind.sampled:
            held = tokens * rollout.max_response_tokens // longest
    critic = critic_of(config, vocabulary) if distils else None
    on_ray = isinstance(config.cluster, RayCluster)
    return Job(
        student=_part(config.model, rows),
        trains=trains,
        critic=None if critic is None else _with_value_head(_part(critic.model, rows)),
        frozen=frozen,
        apart=apart,
        judged=judged,
        engine=_engine(config, vocabulary),
        layout=config.megatron,
        workers=config.cluster.num_workers if isinstance(config.cluster, RayCluster) else 1,
        longest=longest,
        step_tokens=tokens,
        held_tokens=held,
        bucket_bytes=rollout.bucket_bytes,
        shares_process=not on_ray,
        saves_behind=config.checkpoint.async_save,
    )


def _part(settings: ModelConfig, vocab_size: int) -> Part:
    return Part(architecture=architecture_of(settings, vocab_size), dtype=settings.dtype)


def _with_value_head(part: Part) -> Part:
    return dataclasses.replace(part, architecture=part.architecture.with_value_head())


def _frozen(config: Config, vocab_size: int) -> tuple[Frozen, ...]:
    found = []
    if config.opd.type is OpdType.megatron:
        for name, teacher in teachers_of(config).items():
            if isinstance(teacher, DedicatedTeacher):
                continue
            part = _part(teacher_settings(teacher, config.model), vocab_size)
            found.append(
                Frozen(
                    architecture=part.architecture,
                    dtype=part.dtype,
                    name=title_of(name),
                    key=key_of(name),
                    placement=placement_of(teacher),
                )
            )
    reference = reference_of(config)
    if reference is not None:
        part = _part(reference, vocab_size)
        placement = Placement(config.reference.placement)
        found.append(
            Frozen(
                architecture=part.architecture,
                dtype=part.dtype,
                name="reference",
                key="reference.placement",
                placement=placement,
            )
        )
    return tuple(found)


def _apart(config: Config) -> tuple[Apart, ...]:
    found = []
    for name, teacher in teachers_of(config).items():
        if not isinstance(teacher, DedicatedTeacher) or config.opd.type is not OpdType.megatron:
            continue
        settings = teacher_settings(teacher, config.model)
        layout = dedicated_layout(teacher, config)
        found.append(
            Apart(
                architecture=architecture_of(settings, None),
                dtype=settings.dtype,
                name=title_of(name),
                # Responses that are not packed are computed one by one.
                layout=layout if teacher.pack else dataclasses.replace(layout, max_tokens_per_device=1),
                workers=teacher.num_workers,
            )
        )
    return tuple(found)


def _engine(config: Config, vocabulary: Vocabulary) -> Engine | None:
    rollout = config.rollout
    if not isinstance(rollout, EmbeddedRollout):
        return None
    shape = DecoderShape.from_config(vocabulary.config)
    candidates = sampling_of(config, vocabulary).log_prob_top_k
    workers = config.cluster.num_rollout_workers if isinstance(config.cluster, RayCluster) else 0
    wanted = rollout.prompts_per_step * rollout.samples_per_prompt
    return Engine(
        workers=workers,
        slot_bytes=bytes_per_slot(shape, DTYPES[config.model.dtype], candidates),
        rollout=rollout,
        rows=-(-wanted // max(1, workers)),
    )
