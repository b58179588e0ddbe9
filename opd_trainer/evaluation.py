"""Held-out evaluation of a run: accuracy, and reverse KL to the teacher on fixed prompts, before and after."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from opd_trainer.collation import collate
from opd_trainer.eval.evaluator import Evaluator
from opd_trainer.experience import Judge, judged
from opd_trainer.files import write_atomically
from opd_trainer.metrics import Metrics
from opd_trainer.protocols import Learner, RolloutEngine
from opd_trainer.references import Reference, reference_batch
from opd_trainer.requests import in_order, requests_for
from opd_trainer.tracking.summary import Evaluated
from opd_trainer.tracking.tracker import Tracker
from opd_trainer.types import Prompt, Sampling

PROBE = "eval/reverse_kl"


@dataclass(slots=True)
class ReverseKlProbe:
    """Reverse KL of the student to its teachers on responses to fixed held-out prompts.

    Responses are drawn from the current student with fixed seeds, so that two evaluations of the same weights agree
    exactly. The estimate is the mean of log p_student(y_t) - log p_teacher(y_t) over the response tokens that a teacher
    scored. The student's side is always the training workers'; the teacher's is theirs too where it is inline.
    """

    prompts: Sequence[Prompt]
    sampling: Sampling
    seed: int
    learner: Learner
    judges: Sequence[Judge]

    async def measure(self, engine: RolloutEngine) -> float:
        """Nats per token.

        Raises:
            TeacherError: more held-out samples than allowed could not be scored.
        """
        requests = requests_for(self.prompts, 1, self.seed, "reverse_kl")
        drawn = [sample async for sample in engine.generate(requests, self.sampling)]
        samples = await judged(self.judges, in_order(drawn, requests))
        # What became of held-out samples is not a matter of the training step that comes next.
        for judge in self.judges:
            judge.metrics()
        batch = collate(samples, self.sampling.temperature)
        student = await self.learner.score(batch, "student")
        if batch.teacher is None:
            batch = batch.scored("teacher", await self.learner.score(batch, "teacher"))
        assert batch.teacher is not None
        teacher = batch.teacher.log_probs
        known = batch.mask & torch.isfinite(teacher)
        return float(torch.where(known, student - teacher, 0.0).double().sum() / known.sum())


@dataclass(slots=True)
class ReferenceProbe:
    """Negative log-likelihood of reference responses to held-out prompts.

    Attributes:
        references: by dataset.
        learner: has the models.
        has_teacher: whether an inline teacher is among them.
    """

    references: Mapping[str, Sequence[Reference]]
    learner: Learner
    has_teacher: bool

    async def measure(self, model: str) -> dict[str, float]:
        """Nats per token of "student" or "teacher", mean over all tokens of the responses of each dataset."""
        found = {}
        for name, references in self.references.items():
            batch = reference_batch(references)
            log_probs = await self.learner.score(batch, model)
            found[name] = -float(log_probs[batch.mask].double().mean())
        return found


@dataclass(slots=True)
class RunEvaluation:
    """When and how a run is evaluated; implements what the loop asks for.

    Attributes:
        evaluator: grades answers to held-out prompts.
        probe: measures the reverse KL; None without a teacher.
        reference: measures the likelihood of reference responses; None where there are none.
        engine: has the student's weights.
        tracker: keeps the results for the summary.
        every: steps between evaluations; 0 evaluates only after the last step.
        directory: `eval_<step>.jsonl` with every answer and `eval_<step>.json` with every figure go here.
    """

    evaluator: Evaluator
    probe: ReverseKlProbe | None
    reference: ReferenceProbe | None
    engine: RolloutEngine
    tracker: Tracker
    every: int
    directory: Path

    def is_due(self, step: int, *, last: bool) -> bool:
        """Whether the weights after `step` steps are to be evaluated."""
        return last or (self.every > 0 and step % self.every == 0)

    async def __call__(self, step: int, *, last: bool) -> Metrics:
        """Evaluates the weights after `step` steps when that is due."""
        if not self.is_due(step, last=last):
            return Metrics()
        return await self.student(step, Evaluated.after if last else None)

    async def student(self, step: int, who: Evaluated | None) -> Metrics:
        """Evaluates the student; `who` says as what the summary keeps it."""
        with self.tracker.time("evaluate"):
            metrics = await self._graded(self.engine, f"{step:07d}")
            if self.probe is not None:
                metrics.put(PROBE, await self.probe.measure(self.engine))
            likelihood = {} if self.reference is None else await self.reference.measure("student")
            for name, value in likelihood.items():
                metrics.put(f"eval/{name}/reference_nll", value)
        values = metrics.values()
        if who is not None:
            errors = self.evaluator.standard_errors(values)
            self.tracker.evaluated(who, self.evaluator.accuracy(values), values.get(PROBE), likelihood, errors)
        return metrics

    async def teacher(self, engine: RolloutEngine) -> None:
        """Evaluates the teacher, with an engine of its own that has its weights."""
        with self.tracker.time("evaluate"):
            metrics = await self._graded(engine, "teacher")
            likelihood = {}
            if self.reference is not None and self.reference.has_teacher:
                likelihood = await self.reference.measure("teacher")
        values = metrics.values()
        accuracy, errors = self.evaluator.accuracy(values), self.evaluator.standard_errors(values)
        self.tracker.evaluated(Evaluated.teacher, accuracy, reference_nll=likelihood, standard_error=errors)

    async def _graded(self, engine: RolloutEngine, label: str) -> Metrics:
        report = await self.evaluator.run(engine)
        path = self.directory / f"eval_{label}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(
                json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n" for record in report.records
            )
        figures = {name: value for name, value in report.metrics.values().items() if math.isfinite(value)}
        write_atomically(path.with_suffix(".json"), json.dumps(figures, indent=2) + "\n")
        return report.metrics
