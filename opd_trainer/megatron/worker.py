"""One training worker: the student with its optimizer, and the reference, critic and inline teachers beside it.

A plain class: nothing in here knows what runs it. Every method but `save_done` is collective: call it on all ranks.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from opd_trainer.errors import OpdError
from opd_trainer.megatron import checkpoint
from opd_trainer.megatron.critic import Critic
from opd_trainer.megatron.flop import peak_flop_per_s
from opd_trainer.megatron.frozen import FrozenModel, load_frozen
from opd_trainer.megatron.huggingface import describe, export_hf_weights, save_hf_folder
from opd_trainer.megatron.inline import score_inline
from opd_trainer.megatron.live_weights import STUDENT, LiveWeights
from opd_trainer.megatron.micro_batch import Scoring, on_device, prepare, score
from opd_trainer.megatron.optimizer import Optimizer, wrap
from opd_trainer.megatron.outbox import Outbox
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.megatron.saving import Saving, writing
from opd_trainer.megatron.source import LoadedModel, load_model
from opd_trainer.megatron.spec import Place, RankUpdate, WorkerSpec, place_of
from opd_trainer.megatron.update import ForwardBackward, Stopwatch
from opd_trainer.protocols import InlineTeacher, TokenLoss
from opd_trainer.types import TokenBatch
from opd_trainer.updates import Wants

T = TypeVar("T")


class MegatronWorker:
    """See the module.

    Args:
        spec: what to build.
        rank: of this worker.
        world_size: number of workers.
        rendezvous: where they meet (a torch.distributed init method).
    """

    def __init__(self, spec: WorkerSpec, rank: int, world_size: int, rendezvous: str) -> None:
        self._spec = spec
        self._runtime = MegatronRuntime(rank, world_size, rendezvous, spec.megatron, spec.seed)
        self._scoring = Scoring(spec.temperature, spec.megatron.log_prob_chunk_tokens)
        self._student: LoadedModel | None = None
        self._live: LiveWeights | None = None
        self._optimizer: Optimizer | None = None
        self._forward_backward: ForwardBackward | None = None
        self._teachers: dict[str, InlineTeacher] = {}
        self._reference: FrozenModel | None = None
        self._critic: Critic | None = None
        self._outbox = Outbox()
        self._saving: list[Saving] = []

    def start(self) -> None:
        """Joins the other workers, builds and loads the models.

        Raises:
            UserError: a model cannot be loaded or does not fit.
        """
        spec = self._spec
        self._runtime.start()
        self._student = load_model(self._runtime, spec.model, spec.megatron, vocab_size=spec.vocab_size, trainable=True)
        self._live = live = LiveWeights(self._student.model)
        self._teachers = {name: builder.build(live) for name, builder in spec.teachers.items()}
        if spec.reference is not None:
            self._reference = load_frozen(spec.reference_placement, "reference", live, spec.reference, self._scoring)
        chunks = wrap(self._student.model.modules, spec.megatron)
        self._optimizer = Optimizer(chunks, spec.megatron, spec.total_steps)
        self._forward_backward = ForwardBackward(self._student.model, chunks, self._scoring, self._teachers)
        if spec.critic is not None:
            self._critic = Critic.load(self._runtime, spec)

    def close(self) -> None:
        """Frees the models and tears down the process groups and patches. Safe to call twice, or before `start`."""
        for saving in self._saving:
            saving.wait()
        self._saving = []
        self._student = self._optimizer = self._forward_backward = None
        self._live = self._reference = self._critic = None
        self._outbox = Outbox()
        self._teachers = {}
        self._runtime.close()

    def place(self) -> Place:
        """Where this worker is."""
        return place_of(self._runtime)

    def update(self, micro_batches: Sequence[TokenBatch], loss: TokenLoss) -> RankUpdate:
        """One optimizer step on the sum of weight * loss over the micro-batches of all data-parallel ranks.

        A critic, where there is one, then takes a step of its own.

        Args:
            micro_batches: of this data-parallel rank; the same number on each rank.
            loss: of each token.

        Raises:
            TrainingDiverged: a loss or gradient is not finite.
        """
        optimizer, forward_backward = _started(self._optimizer), _started(self._forward_backward)
        self._require_student("an update")
        if self._runtime.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._runtime.device)
        watch = Stopwatch(self._runtime.device)
        optimizer.zero_grad()
        outcome = forward_backward(micro_batches, loss, optimizer.num_steps)
        both_s = watch.lap()
        self._require_student("an optimizer step")
        stepped = optimizer.step()
        seconds = {
            "teacher": outcome.teacher_s,
            "forward_backward": both_s - outcome.teacher_s,
            "optimizer": watch.lap(),
        }
        critic = None
        if self._critic is not None:
            critic = self._critic.update(micro_batches)
            seconds["critic"] = watch.lap()
        return RankUpdate(
            log_probs=outcome.log_probs,
            entropy=outcome.entropy,
            teacher=outcome.teacher if self._teachers else None,
            divergence=outcome.divergence if loss.wants.divergence is not None else None,
            overlap=outcome.overlap if loss.wants.top_k else None,
            loss=outcome.loss,
            grad_norm=stepped.grad_norm,
            learning_rate=stepped.learning_rate,
            seconds=seconds,
            peak_memory_bytes=self._peak_memory_bytes(),
            flop=outcome.flop,
            peak_flop_per_s=peak_flop_per_s(self._runtime.device, forward_backward.model.dtype),
            critic=critic,
        )

    def score(self, micro_batches: Sequence[TokenBatch], model: str) -> list[Tensor]:
        """Forward-only log-probs (the critic's values) f32[T] of each micro-batch, NaN where the mask is False.

        Args:
            micro_batches: of this data-parallel rank.
            model: "student", "reference", "critic", "teacher" (each sequence's own) or "teacher:<name>".

        Raises:
            OpdError: there is no such model.
        """
        self._require_student("scoring")
        prepared = (prepare(batch, self._runtime) for batch in micro_batches)
        if model == "student":
            student = _started(self._student).model
            return [score(student, micro_batch, self._scoring).cpu() for micro_batch in prepared]
        if model == "reference" and self._reference is not None:
            with self._reference.ready():
                return [self._reference.score(micro_batch).cpu() for micro_batch in prepared]
        if model == "critic" and self._critic is not None:
            return [self._critic.values(micro_batch).cpu() for micro_batch in prepared]
        kind, _, name = model.partition(":")
        if kind == "teacher" and (name in self._teachers or not name):
            return self._score_by_teachers(name, [on_device(batch, self._runtime.device) for batch in micro_batches])
        raise self._unknown(model)

    def _score_by_teachers(self, name: str, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """By the teacher `name`, or by each sequence's own."""
        teachers = {name: self._teachers[name]} if name else self._teachers
        asked = [
            batch.replace(teacher=None, teacher_name=(name,) * batch.num_sequences if name else batch.teacher_name)
            for batch in batches
        ]
        judged = score_inline(teachers, asked, Wants(), all_asked=self._runtime.ep_size > 1)
        return [one.batch.teacher.log_probs.cpu() for one in judged if one.batch.teacher is not None]

    def _require_student(self, purpose: str) -> None:
        _started(self._live).require(STUDENT, purpose)

    def _unknown(self, model: str) -> OpdError:
        beside = {"reference": self._reference, "critic": self._critic}
        there = ["student", *(name for name, value in beside.items() if value is not None)]
        there += [f"teacher:{key}" for key in self._teachers]
        return OpdError(f"the training workers have no model {model!r}, only {', '.join(there)}")

    def save(self, directory: Path, background: bool = False) -> None:
        """Writes weights, optimizer, schedule and RNG into `directory`, which exists and holds no checkpoint.

        Args:
            directory: to write to.
            background: return as soon as the state is copied; the checkpoint is not complete before `finish_save`.

        Raises:
            CheckpointError: a rank cannot write.
            OpdError: an earlier save is not finished.
        """
        student = _started(self._student)
        self._require_student("saving")
        if self._saving:
            raise OpdError("a save is under way: finish it before the next one")
        optimizer = _started(self._optimizer)
        self._saving.append(checkpoint.begin_save(directory, student.model, optimizer, background=background))
        if self._critic is not None:
            self._saving.append(self._critic.begin_save(directory, background=background))
        if not background:
            self.finish_save()
        if self._runtime.rank == 0:
            with writing(directory):
                describe(student.model, directory, student.folder)
                if self._critic is not None:
                    self._critic.describe(directory)

    def save_done(self) -> bool:
        """Whether `finish_save` would not have to wait for this rank; not collective."""
        return all(saving.done for saving in self._saving)

    def finish_save(self) -> None:
        """Waits for a save in the background, and completes the checkpoint.

        Raises:
            CheckpointError: a rank could not write.
        """
        under_way, self._saving = self._saving, []
        for saving in under_way:
            saving.finish()

    def restore(self, directory: Path) -> None:
        """The inverse of `save`.

        Raises:
            CheckpointError: `directory` holds no training state of this model.
        """
        self._require_student("restoring")
        checkpoint.restore(directory, _started(self._student).model, _started(self._optimizer))
        if self._critic is not None:
            self._critic.restore(directory)

    def start_export(self, bucket_bytes: int, model: str) -> None:
        """Begins to hand out weights, at most `bucket_bytes` (but one tensor at least) at a time.

        Args:
            bucket_bytes: largest bucket.
            model: "student" or "teacher:<name>".

        Raises:
            OpdError: there is no such model.
        """
        name = model.removeprefix("teacher:")
        if model == "student":
            tensors = export_hf_weights(_started(self._student).model)
        elif name in self._teachers:
            tensors = self._teachers[name].export()
        else:
            raise self._unknown(model)
        self._outbox.fill(tensors, bucket_bytes)

    def next_bucket(self) -> list[tuple[str, Tensor]] | None:
        """The next (Hugging Face name, full tensor on the CPU) pairs; None at the end.

        Tensors may share memory with the live weights: copy them before the next update. Only rank 0 has tensors; the
        lists of the others are empty.
        """
        self._require_student("handing out weights")
        return self._outbox.next(keep=self._runtime.rank == 0)

    def export(self, directory: Path) -> None:
        """Writes the student as a Hugging Face folder that transformers loads."""
        student = _started(self._student)
        self._require_student("exporting")
        save_hf_folder(student.model, directory, student.folder)

    def _peak_memory_bytes(self) -> int:
        device = self._runtime.device
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _started(value: T | None) -> T:
    if value is None:
        raise OpdError("the training worker is not started, or is closed")
    return value
