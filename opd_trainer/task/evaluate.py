"""`task=evaluate`: grades the answers of `model.load` to the held-out datasets."""

import contextlib
from pathlib import Path

from opd_trainer.build.data import load_held_out, references_of
from opd_trainer.build.learner import build_learner
from opd_trainer.build.rollout import build_engine, evaluation_sampling
from opd_trainer.build.vocabulary import vocabulary_of
from opd_trainer.build.workers import Workers
from opd_trainer.config import Config
from opd_trainer.eval.evaluator import Evaluator
from opd_trainer.evaluation import ReferenceProbe, RunEvaluation
from opd_trainer.reward.pool import RewardPool
from opd_trainer.tracking.summary import Evaluated
from opd_trainer.tracking.tracker import Tracker


async def evaluate(config: Config, output_dir: Path, tracker: Tracker) -> None:
    """One evaluation; nothing is trained."""
    vocabulary = vocabulary_of(config.model)
    held_out = load_held_out(config, vocabulary)
    workers = Workers(config)
    learner = build_learner(config, vocabulary, workers)
    engine = build_engine(config, vocabulary, workers, output_dir)
    reward = RewardPool(config.reward, config.rollout.samples_per_prompt)
    references = references_of(config, vocabulary, held_out)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(reward.close)
        for part in (learner, engine):
            stack.push_async_callback(part.close)
            await part.start()
        await engine.load(learner.weights(version=0))
        sampling = evaluation_sampling(config, vocabulary)
        evaluation = RunEvaluation(
            evaluator=Evaluator(config.eval, held_out, reward, sampling, config.seed),
            probe=None,
            reference=ReferenceProbe(references, learner, has_teacher=False) if references else None,
            engine=engine,
            tracker=tracker,
            every=0,
            directory=output_dir,
        )
        tracker.truncate_after(-1)
        await evaluation.student(0, Evaluated.after)
