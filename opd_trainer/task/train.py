"""`task=train`: on-policy distillation."""

import contextlib
from pathlib import Path

from opd_trainer import build
from opd_trainer.checkpoint import Checkpoints
from opd_trainer.config import Config
from opd_trainer.controller import Controller
from opd_trainer.eval.evaluator import Evaluator
from opd_trainer.evaluation import ReverseKlProbe, RunEvaluation
from opd_trainer.experience import OnPolicyExperience
from opd_trainer.opd.config import OpdType
from opd_trainer.reward.pool import RewardPool
from opd_trainer.tracking.summary import Evaluated
from opd_trainer.tracking.tracker import Tracker
from opd_trainer.types import WeightStream


async def train(config: Config, output_dir: Path, tracker: Tracker) -> None:
    """Distils until the last step, from the newest checkpoint in `output_dir` if there is one."""
    vocabulary = build.vocabulary_of(config.model)
    prompts = build.load_data(config, vocabulary)
    workers = build.Workers(config)
    learner = build.build_learner(config, vocabulary, workers)
    engine = build.build_engine(config, vocabulary, workers)
    dedicated = build.build_dedicated_teachers(config, workers)
    reward = RewardPool(config.reward, config.rollout.samples_per_prompt)
    sampling = build.sampling_of(config, vocabulary)
    probed = [prompt for held_out in prompts.held_out for prompt in held_out.prompts][: config.eval.reverse_kl_prompts]
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(reward.close)
        for part in (learner, engine, *dedicated.values()):
            stack.push_async_callback(part.close)
            await part.start()
        evaluation = RunEvaluation(
            evaluator=Evaluator(
                config.eval, prompts.held_out, reward, build.evaluation_sampling(config, vocabulary), config.seed
            ),
            probe=ReverseKlProbe(probed, sampling, config.seed, learner, list(dedicated.values()))
            if config.opd.type is OpdType.megatron and probed
            else None,
            engine=engine,
            tracker=tracker,
            every=config.eval.every,
            directory=output_dir,
        )
        controller = Controller(
            experience=OnPolicyExperience(
                stream=prompts.stream(),
                engine=engine,
                judges=[reward, *dedicated.values()],
                sampling=sampling,
                prompts_per_step=config.rollout.prompts_per_step,
                samples_per_prompt=config.rollout.samples_per_prompt,
                seed=config.seed,
            ),
            objective=build.build_objective(config),
            learner=learner,
            engine=engine,
            evaluate=evaluation,
            tracker=tracker,
            checkpoint=Checkpoints(
                output_dir / "checkpoints", config.checkpoint.every, config.checkpoint.keep, config.steps
            ),
        )
        finished = await controller.checkpoint.restore(controller)
        tracker.truncate_after(finished - 1)
        await engine.load(learner.weights(version=finished))
        if finished == 0:
            await evaluation.student(0, Evaluated.before)
            if config.opd.type is OpdType.megatron and config.eval.teacher:
                default = dedicated.get(build.DEFAULT_TEACHER)
                weights = (
                    learner.weights(0, f"teacher:{build.DEFAULT_TEACHER}") if default is None else default.weights()
                )
                await evaluate_teacher(config, weights, evaluation)
        await controller.fit()
        await learner.export(output_dir / "model")


async def evaluate_teacher(config: Config, weights: WeightStream, evaluation: RunEvaluation) -> None:
    """Grades the default teacher once, with an engine that lives as long as that takes."""
    async with contextlib.AsyncExitStack() as stack:
        engine = build.build_teacher_engine(config)
        stack.push_async_callback(engine.close)
        await engine.start()
        await engine.load(weights)
        await evaluation.teacher(engine)
