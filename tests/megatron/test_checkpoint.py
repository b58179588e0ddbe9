import pickle
import random
from pathlib import Path

import pytest
import torch

from opd_trainer.errors import CheckpointError
from opd_trainer.megatron.worker import MegatronWorker
from opd_trainer.model.config import Dtype, ModelConfig
from tests.gloo import run_gloo
from tests.megatron import training
from tests.megatron.training import WeightedNll, started, weights

pytestmark = [
    # The sharded optimizer of Megatron-core 0.16 on torch 2.13.
    pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

SCHEDULE = {"schedule": "cosine", "warmup_steps": 2, "lr": 1e-2}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return training.write_model(tmp_path_factory.mktemp("student"))


def steps(worker, numbers):
    batches = [training.batch(seed=number) for number in numbers]
    return [worker.update([batch], WeightedNll()) for batch in batches]


def same(ours, theirs):
    return all(
        (a.loss, a.grad_norm, a.learning_rate) == (b.loss, b.grad_norm, b.learning_rate)
        and torch.equal(a.log_probs[0].nan_to_num(7), b.log_probs[0].nan_to_num(7))
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_resume_is_bit_exact(student, tmp_path, distributed_optimizer, dtype):
    model = ModelConfig(load=str(student), dtype=dtype)
    spec = training.spec(student, model=model, distributed_optimizer=distributed_optimizer, **SCHEDULE)
    with started(spec) as worker:
        steps(worker, range(3))
        worker.save(tmp_path)
        drawn = torch.rand(3), random.random()
        uninterrupted = steps(worker, range(3, 6))
        expected = weights(worker)
    with started(spec) as worker:
        worker.restore(tmp_path)
        assert torch.equal(torch.rand(3), drawn[0])
        assert random.random() == drawn[1]
        assert same(steps(worker, range(3, 6)), uninterrupted)
        found = weights(worker)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_checkpoint_is_a_model(student, tmp_path):
    folder = tmp_path / "iter_0000002"
    folder.mkdir()
    with started(training.spec(student)) as worker:
        steps(worker, range(2))
        worker.save(folder)
        expected = weights(worker)
    for settings in (ModelConfig(load=str(folder)), ModelConfig(load=str(tmp_path), ckpt_step=2)):
        with started(training.spec(student, model=settings)) as worker:
            found = weights(worker)
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_no_checkpoint_of_this_model_is_refused(student, tmp_path):
    other = training.write_model(tmp_path / "other", hidden_size=48)
    (tmp_path / "saved").mkdir()
    with started(training.spec(other)) as worker:
        worker.save(tmp_path / "saved")
    with started(training.spec(student)) as worker:
        with pytest.raises(CheckpointError, match="cannot be loaded as a Megatron checkpoint of this model"):
            worker.restore(student)
        with pytest.raises(CheckpointError, match="of this model: Global shape mismatch"):
            worker.restore(tmp_path / "saved")


def save_and_resume(rank: int, world_size: int, rendezvous: str, student: Path, folder: Path) -> bytes:
    spec = training.spec(student, distributed_optimizer=True, **SCHEDULE)
    outcomes = []
    for run in range(2):
        worker = MegatronWorker(spec, rank, world_size, f"{rendezvous}{run}")
        worker.start()
        if run:
            worker.restore(folder)
        else:
            steps(worker, [rank, rank + 2])
            worker.save(folder)
        outcomes.append((steps(worker, [rank + 4, rank + 6]), weights(worker)))
        worker.close()
    return pickle.dumps(outcomes)


def test_resume_is_bit_exact_with_adam_sharded_over_two_processes_and_fits_one(student, tmp_path):
    results = [pickle.loads(result) for result in run_gloo(save_and_resume, 2, student, tmp_path)]
    for first, second in results:
        assert same(first[0], second[0])
        assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    micro_batches = [[training.batch(seed=number), training.batch(seed=number + 1)] for number in (4, 6)]
    with started(training.spec(student, **SCHEDULE, distributed_optimizer=True)) as worker:
        worker.restore(tmp_path)
        for micro_batch in micro_batches:
            worker.update(micro_batch, WeightedNll())
        for name, tensor in weights(worker).items():
            torch.testing.assert_close(tensor, results[0][0][1][name], atol=1e-5, rtol=1e-4)
