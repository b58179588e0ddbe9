"""Teachers in every place, for the tests of them: how they are set up and asked."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_trainer.cluster.inprocess import InProcessGroup
from opd_trainer.megatron.micro_batch import Scoring
from opd_trainer.megatron.scorer import MegatronScorer
from opd_trainer.megatron.scoring_worker import ScoringSpec
from opd_trainer.megatron.spec import WorkerSpec
from opd_trainer.megatron.worker import MegatronWorker
from opd_trainer.model.config import ModelConfig
from opd_trainer.teacher import config as placements
from opd_trainer.teacher.config import TeacherConfig
from opd_trainer.teacher.dedicated import DedicatedTeacher
from opd_trainer.teacher.inline import MegatronTeacher, checked_teacher, inline_teacher
from opd_trainer.types import Finish, Prompt, Sample, TokenBatch
from tests.megatron import training
from tests.megatron.training import started

INLINE: dict[str, type[TeacherConfig]] = {
    "resident": placements.ResidentTeacher,
    "offload": placements.OffloadTeacher,
    "swap": placements.SwapTeacher,
}
ALL = (*INLINE, "dedicated", "dedicated, packed")
NOISE = 1e-5
"""Nats by which placements may differ; what they do differ by is printed."""
TEMPERATURE = 0.7


def config(placement: str, load: Path, *, own_model: bool = False, step: int | None = None) -> TeacherConfig:
    model = ModelConfig() if own_model else None
    return INLINE[placement](load=str(load), model=model, ckpt_step=step)


def spec_with(student: Path, name: str = "default", teacher: TeacherConfig | None = None, **changes: Any) -> WorkerSpec:
    plain = training.spec(student, temperature=TEMPERATURE, **changes)
    assert teacher is not None
    built = inline_teacher(name, teacher, plain.model, plain.megatron, TEMPERATURE)
    return dataclasses.replace(plain, teachers={name: built})


def batch_of(temperature: float = TEMPERATURE) -> TokenBatch:
    batch = training.batch()
    return batch.replace(rollout=dataclasses.replace(batch.rollout, temperature=temperature))


def parts(batch: TokenBatch) -> list[TokenBatch]:
    return [batch.take([0, 3]), batch.take([1]), batch.take([2, 5, 4])]


def samples_of(batch: TokenBatch, teacher: str = "default") -> list[Sample]:
    """The sequences of a batch as samples."""
    samples = []
    for number in range(batch.num_sequences):
        mine = batch.seq == number
        tokens, mask = batch.tokens[mine], batch.mask[mine]
        response = tokens[mask]
        samples.append(
            Sample(
                prompt=Prompt(id=str(number), tokens=tokens[~mask], text="", teacher=teacher),
                index=0,
                response=response,
                log_probs=torch.zeros(len(response)),
                finish=Finish.stop,
                version=0,
                text="",
            )
        )
    return samples


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 300))


async def with_dedicated(
    student: Path,
    teacher: TeacherConfig,
    ask: Callable[[DedicatedTeacher], Coroutine[Any, Any, Any]],
    max_tokens: int = 1,
) -> Any:
    """Asks a dedicated teacher whose only worker is in this process."""
    checked = checked_teacher("default", teacher, ModelConfig(load=str(student)))
    megatron = training.spec(student).megatron
    scoring = Scoring(TEMPERATURE, megatron.log_prob_chunk_tokens)
    spec = ScoringSpec(model=checked.settings, megatron=megatron, scoring=scoring, seed=0)
    scorer = MegatronScorer(InProcessGroup(spec.make_worker), max_tokens=max_tokens, bucket_bytes=1 << 20)
    dedicated = DedicatedTeacher(scorer, checked.identity, temperature=TEMPERATURE, name="default")
    try:
        await dedicated.start()
        return await ask(dedicated)
    finally:
        await dedicated.close()
        await dedicated.close()


async def asked(dedicated: DedicatedTeacher, batch: TokenBatch, *, at_once: bool) -> Tensor:
    """Log-probs of the response tokens of a batch, in its order; the samples land at once or one after the other."""

    async def land(number: int, sample: Sample) -> Sample:
        for _ in range(0 if at_once else 5 * number):
            await asyncio.sleep(0)
        return await dedicated.score(sample)

    judged = await asyncio.gather(*(land(number, sample) for number, sample in enumerate(samples_of(batch))))
    assert all(sample.teacher_temperature == TEMPERATURE for sample in judged)
    return torch.cat([sample.teacher_log_probs for sample in judged if sample.teacher_log_probs is not None])


def scores(placement: str, student: Path, load: Path, *, own_model: bool = False, step: int | None = None) -> Tensor:
    """What a teacher thinks of the response tokens of the batch."""
    batch = batch_of()
    if placement in INLINE:
        teacher = config(placement, load, own_model=own_model, step=step)
        with started(spec_with(student, teacher=teacher)) as worker:
            return worker.score([batch], "teacher")[0][batch.mask]
    model = ModelConfig() if own_model else None
    teacher = placements.DedicatedTeacher(load=str(load), model=model, ckpt_step=step)
    packed = placement == "dedicated, packed"
    return run(with_dedicated(student, teacher, lambda d: asked(d, batch, at_once=packed), 30 if packed else 1))


def everything(worker: MegatronWorker) -> dict[str, Tensor]:
    """Copies of the student's parameters, main parameters, moments and gradients."""
    assert worker._student is not None
    assert worker._optimizer is not None
    found = {f"weight {k}": v for m in worker._student.model.modules for k, v in m.named_parameters()}
    found |= {f"gradient {k}": v.main_grad for m in worker._student.model.modules for k, v in m.named_parameters()}
    for inner in worker._optimizer.megatron.chained_optimizers:
        for number, group in enumerate(inner.optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                found[f"main {number} {index}"] = parameter
                state = inner.optimizer.state[parameter]
                found |= {f"{k} {number} {index}": v for k, v in state.items() if isinstance(v, Tensor)}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


@contextlib.contextmanager
def worker_with(placement: str, folders: dict[str, Path]) -> Iterator[tuple[MegatronWorker, MegatronTeacher]]:
    with started(spec_with(folders["student"], teacher=config(placement, folders["teacher"]))) as worker:
        teacher = worker._teachers["default"]
        assert isinstance(teacher, MegatronTeacher)
        yield worker, teacher


def close(placement: str, ours: Tensor, theirs: Tensor) -> None:
    gap = (ours - theirs).abs()
    print(f"\nfloor of {placement}: max {float(gap.max()):.1e}, mean {float(gap.mean()):.1e} nats")
    assert float(gap.max()) <= NOISE
