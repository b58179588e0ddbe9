"""`task=sft`: supervised fine-tuning through the same loop, workers and checkpoints as distillation."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from opd_trainer.build.data import load_data, referee, references_of
from opd_trainer.build.learner import build_learner, checkpoints_of
from opd_trainer.build.rollout import build_engine, evaluation_sampling
from opd_trainer.build.vocabulary import vocabulary_of
from opd_trainer.build.workers import Workers
from opd_trainer.checkpoint import Checkpoints
from opd_trainer.config import Config
from opd_trainer.controller import Controller
from opd_trainer.eval.evaluator import Evaluator
from opd_trainer.evaluation import ReferenceProbe, RunEvaluation
from opd_trainer.memory.start import announce
from opd_trainer.metrics import Metrics
from opd_trainer.protocols import Learner
from opd_trainer.reward.pool import RewardPool
from opd_trainer.supervised import NoRollout, SupervisedExperience, SupervisedObjective
from opd_trainer.task.config import SftTask
from opd_trainer.tracking.summary import Evaluated
from opd_trainer.tracking.tracker import Tracker


@dataclass(slots=True)
class EvaluateAndStop:
    """Evaluates where that is due, takes the snapshot and ends the run where the task says so."""

    task: SftTask
    evaluation: RunEvaluation
    learner: Learner
    checkpoint: Checkpoints
    snapshot: Path

    async def __call__(self, step: int, *, last: bool) -> Metrics:
        """See the class."""
        if not self.evaluation.is_due(step, last=last):
            return Metrics()
        await self.evaluation.engine.load(self.learner.weights(version=step))
        metrics = await self.evaluation.student(step, Evaluated.after)
        accuracy = min(self.evaluation.evaluator.accuracy(metrics.values()).values(), default=0.0)
        wanted = self.task.snapshot_accuracy
        if wanted is not None and accuracy >= wanted and not self.snapshot.exists():
            await self.learner.export(self.snapshot)
        if self.task.stop_accuracy is not None and accuracy >= self.task.stop_accuracy:
            self.checkpoint.stop_after(step - 1)
        return metrics


async def sft(config: Config, output_dir: Path, tracker: Tracker) -> None:
    """Trains on `data` until the last step or `task.stop_accuracy`; writes the model to `output_dir`/model."""
    assert isinstance(config.task, SftTask)
    vocabulary = vocabulary_of(config.model)
    announce(config, vocabulary)
    prompts = load_data(config, vocabulary)
    prompts.write_skipped(output_dir)
    stream = prompts.stream(config.task.batch_size, "task.batch_size")
    workers = Workers(config)
    learner = build_learner(config, vocabulary, workers)
    engine = build_engine(config, vocabulary, workers, output_dir)
    reward = RewardPool(config.reward, config.rollout.samples_per_prompt)
    references = references_of(config, vocabulary, prompts.held_out)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(reward.close)
        for part in (learner, engine):
            stack.push_async_callback(part.close)
            await part.start()
        checkpoint = checkpoints_of(config, output_dir)
        sampling = evaluation_sampling(config, vocabulary)
        evaluation = RunEvaluation(
            evaluator=Evaluator(config.eval, prompts.held_out, reward, sampling, config.seed),
            probe=None,
            reference=ReferenceProbe(references, learner, has_teacher=False) if references else None,
            engine=engine,
            tracker=tracker,
            every=config.eval.every,
            directory=output_dir,
        )
        controller = Controller(
            experience=SupervisedExperience(
                stream=stream,
                reference=referee(vocabulary, config.task.response_key, "task.response_key"),
                batch_size=config.task.batch_size,
            ),
            objective=SupervisedObjective(),
            learner=learner,
            engine=NoRollout(),
            evaluate=EvaluateAndStop(config.task, evaluation, learner, checkpoint, output_dir / "snapshot"),
            tracker=tracker,
            checkpoint=checkpoint,
        )
        tracker.truncate_after(await checkpoint.restore(controller) - 1)
        await controller.fit()
        await learner.export(output_dir / "model")
