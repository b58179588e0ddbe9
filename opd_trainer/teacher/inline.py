"""Megatron teachers inside of the student's workers: resident, offload and swap."""

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from opd_trainer.errors import TeacherError
from opd_trainer.megatron.config import MegatronConfig, Placement
from opd_trainer.megatron.evidence import read
from opd_trainer.megatron.frozen import FrozenModel, ResidentModel, load_frozen
from opd_trainer.megatron.live_weights import LiveWeights
from opd_trainer.megatron.micro_batch import Scoring, prepare
from opd_trainer.megatron.source import architecture_of, config_folder
from opd_trainer.model.config import ModelConfig
from opd_trainer.model.folder import inspect
from opd_trainer.model.identity import ModelProfile, profile
from opd_trainer.protocols import TeacherScores
from opd_trainer.teacher.config import OffloadTeacher, SwapTeacher, TeacherConfig, key_of
from opd_trainer.teacher.shapes import check_columns, check_interchangeable, check_same_shape, check_vocabulary
from opd_trainer.types import ModelIdentity, Signal, TokenBatch
from opd_trainer.updates import Wants


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronTeacherBuilder:
    """A checked recipe for a teacher; picklable.

    Attributes:
        name: of the teacher.
        placement: where its weights live.
        settings: the teacher's model.
        identity: who it is.
        scoring: how log-probs are computed, the same as the student's.
    """

    name: str
    placement: Placement
    settings: ModelConfig
    identity: ModelIdentity
    scoring: Scoring

    def build(self, live: LiveWeights) -> "MegatronTeacher":
        """Loads the teacher on a worker; the student's settings are not touched.

        Raises:
            UserError: it cannot be loaded.
        """
        owner = f"teacher:{self.name}"
        frozen = load_frozen(self.placement, owner, live, self.settings, self.scoring)
        return MegatronTeacher(frozen, self.identity)


@dataclass(frozen=True, slots=True)
class MegatronTeacher:
    """An `InlineTeacher` in the student's worker."""

    frozen: FrozenModel
    identity: ModelIdentity

    @property
    def signals(self) -> frozenset[Signal]:
        """A whole distribution is computed while the student trains: from weights that are on the device then."""
        stays = isinstance(self.frozen, ResidentModel)
        return frozenset(Signal) if stays else frozenset({Signal.sampled, Signal.topk})

    def ready(self) -> AbstractContextManager[None]:
        """See `InlineTeacher`."""
        return self.frozen.ready()

    def score_inline(self, micro_batch: TokenBatch, wants: Wants) -> TeacherScores:
        """See `InlineTeacher`; without gradient.

        Raises:
            TeacherError: it was asked for a signal that it does not give.
            OpdError: outside of `ready`, where its weights are away.
        """
        lacking = sorted(wants.signals - self.signals)
        if lacking:
            raise TeacherError(f"this Megatron teacher gives {', '.join(sorted(self.signals))}, not {lacking[0]}")
        self.frozen.require_ready()
        model = self.frozen.model
        return read(model, prepare(micro_batch, model.runtime), self.frozen.scoring, wants)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """See `InlineTeacher`."""
        return self.frozen.export()


def teacher_settings(teacher: TeacherConfig, student: ModelConfig) -> ModelConfig:
    """The model settings of a Megatron teacher: its own, or the student's with the teacher's checkpoint.

    Raises:
        CheckpointError: nothing can be loaded from `teacher.load`.
    """
    if teacher.model is not None:
        return dataclasses.replace(teacher.model, load=teacher.load, ckpt_step=teacher.ckpt_step)
    assert teacher.load is not None, "checked with the configuration"
    has_config = (inspect(teacher.load, teacher.ckpt_step).path / "config.json").is_file()
    return dataclasses.replace(
        student,
        load=teacher.load,
        ckpt_step=teacher.ckpt_step,
        huggingface=None if has_config else str(config_folder(student)),
    )


def placement_of(teacher: TeacherConfig) -> Placement:
    """Where the weights of a teacher in the student's workers live."""
    match teacher:
        case OffloadTeacher():
            return Placement.offload
        case SwapTeacher():
            return Placement.swap
        case _:
            return Placement.resident


@dataclass(frozen=True, slots=True)
class CheckedTeacher:
    """A Megatron teacher that can be loaded and compared with the student.

    Attributes:
        settings: its model.
        identity: who it is.
    """

    settings: ModelConfig
    identity: ModelIdentity


def checked_teacher(name: str, teacher: TeacherConfig, student: ModelConfig) -> CheckedTeacher:
    """Looks at the configs of a Megatron teacher and of the student, before any weight is read.

    Args:
        name: of the teacher.
        teacher: its settings.
        student: the student's model settings.

    Raises:
        CheckpointError: a checkpoint is missing or unreadable.
        ShapeMismatch: without a model of its own it must have the student's shape, and has not; in the student's module
            it must compute what the student computes, and does not.
        ConfigError: the vocabularies differ.
    """
    key = key_of(name)
    settings = teacher_settings(teacher, student)
    theirs = _profile(settings)
    architecture = architecture_of(settings, None)
    ours = architecture_of(student, theirs.identity.vocab_size)
    if teacher.model is None:
        check_same_shape(key, ours, architecture)
    if isinstance(teacher, SwapTeacher):
        check_interchangeable(key, ours, architecture)
    check_vocabulary(key, _profile(student), theirs, architecture)
    return CheckedTeacher(settings, theirs.identity)


def inline_teacher(
    name: str,
    teacher: TeacherConfig,
    student: ModelConfig,
    megatron: MegatronConfig,
    temperature: float,
    *,
    compares_distributions: bool = False,
) -> MegatronTeacherBuilder:
    """A teacher in the student's workers, checked before any of them starts; see `checked_teacher`.

    Args:
        name: of the teacher.
        teacher: its settings.
        student: the student's model settings.
        megatron: settings of the student's workers.
        temperature: of all log-probs.
        compares_distributions: whether whole distributions are compared, column by column.

    Raises:
        UserError: it does not fit.
    """
    checked = checked_teacher(name, teacher, student)
    if compares_distributions:
        size = checked.identity.vocab_size
        ours, theirs = (architecture_of(settings, size).vocab_size for settings in (student, checked.settings))
        check_columns(key_of(name), ours, theirs, megatron.tensor_parallel)
    return MegatronTeacherBuilder(
        name=name,
        placement=placement_of(teacher),
        settings=checked.settings,
        identity=checked.identity,
        scoring=Scoring(temperature, megatron.log_prob_chunk_tokens),
    )


def _profile(settings: ModelConfig) -> ModelProfile:
    folder = config_folder(settings)
    weights = folder if settings.load is None else inspect(settings.load, settings.ckpt_step).path
    return profile(folder, weights)
