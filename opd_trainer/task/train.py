"""`task=train`: on-policy distillation."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from opd_trainer.build.data import load_data, references_of
from opd_trainer.build.learner import build_learner, build_objective, checkpoints_of
from opd_trainer.build.rollout import build_engine, build_teacher_engine, evaluation_sampling, sampling_of
from opd_trainer.build.roster import DEFAULT_TEACHER
from opd_trainer.build.teachers import build_dedicated_teachers, build_server_teachers
from opd_trainer.build.vocabulary import vocabulary_of
from opd_trainer.build.workers import Workers
from opd_trainer.cluster.config import RayCluster, SlurmCluster
from opd_trainer.config import Config
from opd_trainer.controller import Controller
from opd_trainer.errors import NodeLost, WorkerDied
from opd_trainer.eval.evaluator import Evaluator
from opd_trainer.evaluation import ReferenceProbe, ReverseKlProbe, RunEvaluation
from opd_trainer.experience import OnPolicyExperience
from opd_trainer.interruption import interruptible
from opd_trainer.memory.start import announce
from opd_trainer.opd.config import OpdType
from opd_trainer.prefetch import OneStepOffExperience, SettledEngine
from opd_trainer.reward.pool import RewardPool
from opd_trainer.rollout.config import RolloutMode, SglangRollout
from opd_trainer.rollout.sglang.parity import ParityCheck
from opd_trainer.teacher.dedicated import DedicatedTeacher
from opd_trainer.tracking.summary import Evaluated
from opd_trainer.tracking.tracker import Tracker
from opd_trainer.types import WeightStream


async def train(config: Config, output_dir: Path, tracker: Tracker) -> None:
    """Distils until the last step, from the newest checkpoint in `output_dir` if there is one.

    Raises:
        Interrupted: the run was asked to stop, and saved.
        WorkerDied: more often than the cluster's `max_restarts`.
    """
    cluster = config.cluster
    restarts = cluster.max_restarts if isinstance(cluster, RayCluster) else 0
    with interruptible(cluster.grace_s if isinstance(cluster, SlurmCluster) else None) as asked_to_stop:
        for attempt in range(1, restarts + 1):
            try:
                await _train(config, output_dir, tracker, asked_to_stop)
            except NodeLost:
                raise
            except WorkerDied as error:
                print(f"{error}\nrestart {attempt} of {restarts}, from the newest checkpoint", flush=True)
            else:
                return
        await _train(config, output_dir, tracker, asked_to_stop)


async def _train(config: Config, output_dir: Path, tracker: Tracker, asked_to_stop: Callable[[], bool]) -> None:
    """One attempt."""
    vocabulary = vocabulary_of(config.model)
    announce(config, vocabulary)
    prompts = load_data(config, vocabulary)
    prompts.write_skipped(output_dir)
    stream = prompts.stream(config.rollout.prompts_per_step, "rollout.prompts_per_step")
    workers = Workers(config)
    learner = build_learner(config, vocabulary, workers)
    engine = build_engine(config, vocabulary, workers, output_dir)
    dedicated = build_dedicated_teachers(config, workers)
    servers = build_server_teachers(config, prompts, output_dir)
    teachers = [*dedicated.values(), *servers.values()]
    reward = RewardPool(config.reward, config.rollout.samples_per_prompt)
    sampling = sampling_of(config, vocabulary)
    probed = [prompt for held_out in prompts.held_out for prompt in held_out.prompts][: config.eval.reverse_kl_prompts]
    references = references_of(config, vocabulary, prompts.held_out)
    inline = config.opd.type is OpdType.megatron and not dedicated
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(reward.close)
        for part in (*teachers, learner, engine):
            stack.push_async_callback(part.close)
            await part.start()
        for server in servers.values():
            await server.preflight()
        experience = OnPolicyExperience(
            stream=stream,
            engine=engine,
            judges=[reward, *teachers],
            sampling=sampling,
            prompts_per_step=config.rollout.prompts_per_step,
            samples_per_prompt=config.rollout.samples_per_prompt,
            seed=config.seed,
            filter=config.rollout.filter,
            has_teacher=config.opd.on,
        )
        if config.rollout.mode is RolloutMode.one_step_off:
            experience = OneStepOffExperience(experience, config.steps, lambda: tracker.time("rollout"))
            stack.push_async_callback(experience.close)
            engine = SettledEngine(engine, experience)
        evaluation = RunEvaluation(
            evaluator=Evaluator(
                config.eval, prompts.held_out, reward, evaluation_sampling(config, vocabulary), config.seed
            ),
            probe=ReverseKlProbe(probed, sampling, config.seed, learner, teachers)
            if config.opd.on and probed
            else None,
            reference=ReferenceProbe(references, learner, inline) if references else None,
            engine=engine,
            tracker=tracker,
            every=config.eval.every,
            directory=output_dir,
        )
        controller = Controller(
            experience=experience,
            objective=build_objective(config),
            learner=learner,
            engine=engine,
            evaluate=evaluation,
            tracker=tracker,
            checkpoint=checkpoints_of(config, output_dir, asked_to_stop),
        )
        default = dedicated.get(DEFAULT_TEACHER)
        parity = None
        if isinstance(config.rollout, SglangRollout) and config.rollout.max_parity_gap is not None:
            training = [prompt for dataset in prompts.training for prompt in dataset.prompts]
            parity = ParityCheck(training, sampling, config.seed, learner, config.rollout.max_parity_gap)
        await workers.guarded(_fit(config, output_dir, controller, evaluation, default, parity))


async def _fit(
    config: Config,
    output_dir: Path,
    controller: Controller,
    evaluation: RunEvaluation,
    teacher: DedicatedTeacher | None,
    parity: ParityCheck | None,
) -> None:
    """From the newest checkpoint to the last step; `teacher` is the default one where it has workers of its own."""
    learner = controller.learner
    finished = await controller.checkpoint.restore(controller)
    controller.tracker.truncate_after(finished - 1)
    await controller.engine.load(learner.weights(version=finished))
    if parity is not None:
        await parity(controller.engine)
    if finished == 0:
        await evaluation.student(0, Evaluated.before)
        if config.opd.type is OpdType.megatron and config.eval.teacher:
            weights = learner.weights(0, f"teacher:{DEFAULT_TEACHER}") if teacher is None else teacher.weights()
            await evaluate_teacher(config, weights, evaluation)
    await controller.fit()
    await learner.export(output_dir / "model")


async def evaluate_teacher(config: Config, weights: WeightStream, evaluation: RunEvaluation) -> None:
    """Grades the default teacher once, with an engine that lives as long as that takes."""
    async with contextlib.AsyncExitStack() as stack:
        engine = build_teacher_engine(config)
        stack.push_async_callback(engine.close)
        await engine.start()
        await engine.load(weights)
        await evaluation.teacher(engine)
