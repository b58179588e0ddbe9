"""16-bit weights: what stays in fp32, and that small steps are not lost."""

import dataclasses
import pickle

import pytest
import torch

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

SHARDED = [False, True]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return training.write_model(tmp_path_factory.mktemp("student"))


def spec(folder, **changes):
    model = ModelConfig(load=str(folder), dtype=Dtype.bfloat16)
    return training.spec(folder, model=model, weight_decay=0.0, **changes)


def main_parameters(worker):
    assert worker._optimizer is not None
    return [p for group in worker._optimizer.megatron.param_groups for p in group["params"]]


@pytest.mark.parametrize("distributed_optimizer", SHARDED)
def test_weights_are_16_bit_and_everything_that_adds_up_is_fp32(student, distributed_optimizer):
    with started(spec(student, distributed_optimizer=distributed_optimizer)) as worker:
        result = worker.update([training.batch()], WeightedNll())
        assert worker._forward_backward is not None
        parameters = list(worker._forward_backward.model.modules[0].parameters())
        assert {p.dtype for p in parameters} == {torch.bfloat16}
        assert {p.main_grad.dtype for p in parameters} == {torch.float32}  # pyright: ignore[reportAttributeAccessIssue]
        assert {p.dtype for p in main_parameters(worker)} == {torch.float32}
    assert result.log_probs[0].dtype == result.entropy[0].dtype == torch.float32
    # bf16 log-probs would be multiples of 2^-8 here.
    scored = result.log_probs[0][training.batch().mask]
    assert bool((scored * 2**8 != (scored * 2**8).round()).any())


@pytest.mark.parametrize("distributed_optimizer", SHARDED)
def test_steps_too_small_for_16_bit_add_up(student, distributed_optimizer):
    """One step of 1e-5 is less than half of the distance between 16-bit numbers near 0.02; forty are more."""
    with started(spec(student, lr=1e-5, total_steps=100, distributed_optimizer=distributed_optimizer)) as worker:
        before = weights(worker)["model.layers.0.mlp.up_proj.weight"]
        large = before.abs() > 0.02
        worker.update([training.batch()], WeightedNll())
        after_one = weights(worker)["model.layers.0.mlp.up_proj.weight"]
        for _ in range(39):
            worker.update([training.batch()], WeightedNll())
        after_many = weights(worker)["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(after_one[large], before[large])
    assert float((after_many[large] != before[large]).float().mean()) > 0.5


def test_16_bit_stays_near_fp32(student):
    batch = training.batch()
    with started(training.spec(student)) as worker:
        exact = worker.update([batch], WeightedNll())
    with started(spec(student)) as worker:
        rounded = worker.update([batch], WeightedNll())
    assert rounded.loss == pytest.approx(exact.loss, abs=1e-2)
    assert rounded.grad_norm == pytest.approx(exact.grad_norm, rel=2e-2)
    torch.testing.assert_close(rounded.log_probs[0], exact.log_probs[0], atol=2e-2, rtol=0, equal_nan=True)


def sharded_over_two(rank, world_size, rendezvous, folder):
    """Two updates in bf16: tensor-parallel, then data-parallel with a sharded optimizer."""
    outcomes = []
    for number, layout in enumerate(
        ({"tensor_parallel": 2, "sequence_parallel": True}, {"distributed_optimizer": True})
    ):
        worker = MegatronWorker(spec(folder, **layout), rank, world_size, f"{rendezvous}{number}")
        worker.start()
        place = worker.place()
        parts = list(range(place.dp_rank, 6, place.dp_size))
        results = [worker.update([training.batch().take(parts)], WeightedNll()) for _ in range(2)]
        outcomes.append((place, [dataclasses.replace(result, seconds={}) for result in results]))
        worker.close()
    return pickle.dumps(outcomes)


def test_16_bit_in_parallel_layouts(student):
    with started(spec(student)) as worker:
        alone = [worker.update([training.batch()], WeightedNll()) for _ in range(2)]
    for ranks in zip(*map(pickle.loads, run_gloo(sharded_over_two, 2, student)), strict=True):
        results = [found for place, found in ranks if place.reports]
        for number, expected in enumerate(alone):
            assert sum(found[number].loss for found in results) == pytest.approx(expected.loss, abs=2e-2)
            assert results[0][number].grad_norm == pytest.approx(expected.grad_norm, rel=5e-2)
