"""The resident teacher: an extra Megatron model beside the student, scored inside the training forward pass."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from opd_trainer.errors import TeacherError
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.frozen import FrozenModel
from opd_trainer.megatron.huggingface import export_hf_weights
from opd_trainer.megatron.micro_batch import Scoring, prepare
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.megatron.source import architecture_of, config_folder
from opd_trainer.model.config import ModelConfig
from opd_trainer.model.folder import inspect
from opd_trainer.model.identity import ModelProfile, profile
from opd_trainer.teacher.config import TeacherConfig
from opd_trainer.teacher.shapes import check_same_shape, check_vocabulary
from opd_trainer.types import ModelIdentity, Signal, TokenBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentTeacherBuilder:
    """A checked recipe for a resident teacher; picklable.

    Attributes:
        settings: the teacher's model.
        identity: who it is.
        megatron: the student's parallel layout, which it shares.
        scoring: how log-probs are computed, the same as the student's.
    """

    settings: ModelConfig
    identity: ModelIdentity
    megatron: MegatronConfig
    scoring: Scoring

    def build(self, runtime: MegatronRuntime) -> "ResidentTeacher":
        """Loads the teacher on a worker; the student's settings are not touched.

        Raises:
            UserError: it cannot be loaded.
        """
        return ResidentTeacher(FrozenModel.load(runtime, self.settings, self.megatron, self.scoring), self.identity)


@dataclass(frozen=True, slots=True)
class ResidentTeacher:
    """An `InlineTeacher` whose weights stay beside the student's."""

    frozen: FrozenModel
    identity: ModelIdentity

    @property
    def signals(self) -> frozenset[Signal]:
        """Log-probs of the sampled tokens."""
        return frozenset({Signal.sampled})

    def score_inline(self, micro_batch: TokenBatch, want: Signal) -> Tensor:
        """Log-probs f32[T] of the tokens with mask True, NaN elsewhere; no gradient.

        Raises:
            TeacherError: it was asked for a signal that it does not give.
        """
        if want not in self.signals:
            raise TeacherError(f"a resident teacher gives {', '.join(self.signals)}, not {want}")
        return self.frozen.score(prepare(micro_batch, self.frozen.model.runtime))

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """See `InlineTeacher`."""
        return export_hf_weights(self.frozen.model)


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


def resident_teacher(
    name: str, teacher: TeacherConfig, student: ModelConfig, megatron: MegatronConfig, temperature: float
) -> ResidentTeacherBuilder:
    """Checks that a resident teacher can be loaded and compared with the student, before any worker starts.

    Args:
        name: of the teacher.
        teacher: its settings.
        student: the student's model settings.
        megatron: the student's parallel layout.
        temperature: of all log-probs.

    Raises:
        CheckpointError: a checkpoint is missing or unreadable.
        ShapeMismatch: without a model of its own it must have the student's shape, and has not.
        ConfigError: the vocabularies differ.
    """
    key = "teacher" if name == "default" else f"teachers.{name}"
    settings = teacher_settings(teacher, student)
    theirs = _profile(settings)
    architecture = architecture_of(settings, None)
    if teacher.model is None:
        check_same_shape(key, architecture_of(student, theirs.identity.vocab_size), architecture)
    check_vocabulary(key, _profile(student), theirs, architecture)
    scoring = Scoring(temperature, megatron.log_prob_chunk_tokens)
    return ResidentTeacherBuilder(settings=settings, identity=theirs.identity, megatron=megatron, scoring=scoring)


def _profile(settings: ModelConfig) -> ModelProfile:
    folder = config_folder(settings)
    weights = folder if settings.load is None else inspect(settings.load, settings.ckpt_step).path
    return profile(folder, weights)
