import asyncio
import functools

import pytest
import torch

from opd_trainer.cluster.inprocess import InProcessGroup
from opd_trainer.cluster.placement import Demand
from opd_trainer.cluster.ray import RayGroup
from opd_trainer.cluster.session import RaySession
from opd_trainer.errors import OpdError, TrainingDiverged
from opd_trainer.megatron.learner import MegatronLearner
from opd_trainer.megatron.worker import MegatronWorker
from opd_trainer.protocols import Learner
from opd_trainer.teacher.config import ResidentTeacher
from opd_trainer.teacher.inline import inline_teacher
from tests.megatron import training
from tests.megatron.training import WeightedNll, started


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return training.write_model(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def spec(student):
    plain = training.spec(student)
    teacher = inline_teacher("default", ResidentTeacher(load=str(student)), plain.model, plain.megatron, 1.0)
    return training.spec(student, teachers={"default": teacher})


async def collect(learner, version):
    stream = learner.weights(version)
    assert stream.version == version
    return {name: tensor.clone() async for bucket in stream.buckets for name, tensor in bucket}


async def life(learner: Learner, batch, tmp_path):
    """A short life of a learner: results of two updates, scores, weights; restores itself in between."""
    with pytest.raises(OpdError, match="not started"):
        await learner.update(batch, WeightedNll())
    await learner.start()
    async with learner.awake():
        first = await learner.update(batch, WeightedNll())
    tmp_path.mkdir()
    await learner.save(tmp_path)
    second = await learner.update(batch, WeightedNll())
    await learner.restore(tmp_path)
    again = await learner.update(batch, WeightedNll())
    assert (again.loss, again.grad_norm) == (second.loss, second.grad_norm)
    scores = {name: await learner.score(batch, name) for name in ("student", "old", "teacher", "teacher:default")}
    weights = await collect(learner, 3)
    await learner.export(tmp_path / "exported")
    await learner.close()
    await learner.close()
    return first, scores, weights


def check(batch, first, scores, student):
    mask = batch.mask
    assert torch.equal(first.log_probs.isnan(), ~mask)
    assert torch.equal(first.entropy.isnan(), ~mask)
    with started(training.spec(student)) as worker:
        expected = worker.score([batch], "student")[0]
    torch.testing.assert_close(first.log_probs[mask], expected[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first.teacher[mask], expected[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores["teacher"][mask], expected[mask], atol=1e-5, rtol=1e-5)
    assert torch.equal(scores["teacher"].nan_to_num(7), scores["teacher:default"].nan_to_num(7))
    assert torch.equal(scores["student"].nan_to_num(7), scores["old"].nan_to_num(7))
    loss = -(batch.weight * batch.advantage * expected)[mask].sum()
    assert first.loss == pytest.approx(float(loss), abs=1e-5)
    assert set(first.seconds) == {"teacher", "forward_backward", "optimizer"}
    assert first.learning_rate == 1e-2


@pytest.mark.ray
def test_in_process_and_two_ray_workers_learn_the_same(student, spec, tmp_path):
    batch = training.batch()
    make_worker = functools.partial(MegatronWorker, spec)
    alone = MegatronLearner(InProcessGroup(make_worker), max_tokens=16, bucket_bytes=20_000)
    first, scores, weights = asyncio.run(life(alone, batch, tmp_path / "alone"))
    check(batch, first, scores, student)
    assert first.num_micro_batches == 4
    assert first.packing_efficiency == 1.0

    group = RayGroup(
        RaySession(None, 2),
        make_worker,
        Demand("trainer", size=2, cpus=1.0, gpus=0.0),
        timeout_s=300.0,
    )
    both = MegatronLearner(group, max_tokens=16, bucket_bytes=20_000)
    parallel, parallel_scores, parallel_weights = asyncio.run(life(both, batch, tmp_path / "both"))
    check(batch, parallel, parallel_scores, student)
    assert parallel.num_micro_batches == 2
    assert parallel.packing_efficiency > 0.9
    assert parallel.loss == pytest.approx(first.loss, abs=1e-6)
    assert parallel.grad_norm == pytest.approx(first.grad_norm, rel=1e-5)
    assert parallel.flop_per_worker == first.flop_per_worker / 2 > 0
    assert list(parallel_weights) == list(weights)


def test_divergence_reaches_the_controller(spec):
    async def run():
        learner = MegatronLearner(
            InProcessGroup(functools.partial(MegatronWorker, spec)), max_tokens=64, bucket_bytes=1 << 20
        )
        await learner.start()
        try:
            await learner.update(training.batch(), training.Infinite())
        finally:
            await learner.close()

    with pytest.raises(TrainingDiverged, match="micro-batch 0"):
        asyncio.run(run())
