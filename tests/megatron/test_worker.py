import math
import pickle
from pathlib import Path

import pytest
import torch

from opd_trainer.errors import OpdError, TrainingDiverged
from opd_trainer.loss.nll import NegativeLogLikelihood
from opd_trainer.megatron.worker import MegatronWorker
from opd_trainer.types import Scores
from tests.gloo import run_gloo
from tests.megatron import training
from tests.megatron.training import Infinite, WeightedNll, gradient, started, weights

NO_CLIPPING = {"clip_grad": 0.0}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return training.write_model(tmp_path_factory.mktemp("student"))


def test_update_reports_live_log_probs_and_lowers_the_loss(student):
    batch = training.batch()
    with started(training.spec(student)) as worker:
        before = worker.score([batch], "student")[0]
        results = [worker.update([batch], WeightedNll()) for _ in range(3)]
        after = worker.score([batch], "student")[0]
    first = results[0]
    assert torch.equal(first.log_probs[0].isnan(), ~batch.mask)
    assert torch.equal(first.entropy[0].isnan(), ~batch.mask)
    assert torch.equal(first.log_probs[0][batch.mask], before[batch.mask])
    assert not torch.allclose(after[batch.mask], before[batch.mask])
    assert batch.weight is not None
    assert batch.advantage is not None
    expected = -(batch.weight * batch.advantage * first.log_probs[0])[batch.mask].sum()
    assert first.loss == pytest.approx(float(expected), abs=1e-6)
    assert results[2].loss < results[1].loss < first.loss
    assert set(first.seconds) == {"teacher", "forward_backward", "optimizer"}
    assert first.teacher is None
    assert bool((first.entropy[0][batch.mask] > 0).all())
    assert bool((first.entropy[0][batch.mask] <= math.log(22) + 1e-5).all())


@pytest.mark.parametrize("parts", [[[0], [1], [2], [3], [4], [5]], [[5, 0, 3], [], [1, 2, 4]], [[1], [0, 2, 3, 4, 5]]])
def test_micro_batches_change_neither_loss_nor_gradient(student, parts):
    batch = training.batch()
    with started(training.spec(student, **NO_CLIPPING)) as worker:
        whole = worker.update([batch], WeightedNll())
        expected = gradient(worker)
    with started(training.spec(student, **NO_CLIPPING)) as worker:
        split = worker.update([batch.take(part) for part in parts], WeightedNll())
        found = gradient(worker)
    assert split.loss == pytest.approx(whole.loss, abs=1e-6)
    assert split.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert [len(values) for values in split.log_probs] == [batch.take(part).num_tokens for part in parts]


@pytest.mark.parametrize("lengths", [((3, 2), (0, 0)), ((), ())])
def test_a_step_with_nothing_to_learn_leaves_the_weights(student, lengths):
    with started(training.spec(student, weight_decay=0.0)) as worker:
        before = weights(worker)
        batch = training.batch(*lengths)
        result = worker.update([batch], WeightedNll())
        after = weights(worker)
        assert worker.score([batch], "student")[0].isnan().all()
    assert (result.loss, result.grad_norm) == (0.0, 0.0)
    assert bool(result.log_probs[0].isnan().all())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_masked_entries_reach_neither_loss_nor_gradient(student):
    batch = training.batch()
    assert batch.weight is not None
    assert batch.advantage is not None
    poisoned = batch.replace(
        old=Scores(log_probs=torch.where(batch.mask, -1.0, torch.nan), temperature=1.0, model="old"),
        mask=batch.mask & (batch.positions % 2 == 0),
    )
    weight = torch.where(poisoned.mask, batch.weight, 0.0)
    poisoned = poisoned.replace(weight=weight, advantage=torch.where(poisoned.mask, batch.advantage, torch.nan))
    with started(training.spec(student)) as worker:
        result = worker.update([poisoned], WeightedNll())
        assert math.isfinite(result.loss)
        assert bool(gradient(worker).isfinite().all())
        assert torch.equal(result.log_probs[0].isnan(), ~poisoned.mask)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(student):
    batch = training.batch()
    with started(training.spec(student)) as worker:
        before = weights(worker)
        with pytest.raises(
            TrainingDiverged, match=r"step 0, micro-batch 1: the loss is not finite.*was not taken\. Look"
        ):
            worker.update([batch.take([1]), batch], Infinite())
        after = weights(worker)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert worker._forward_backward is not None
        parameter = worker._forward_backward.model.modules[0].get_parameter("decoder.final_layernorm.weight")
        with torch.no_grad():
            parameter[0] = torch.nan
        with pytest.raises(
            TrainingDiverged, match=r"32 of 32 live log-probs are not finite.*lower megatron\.optimizer\.lr"
        ):
            worker.update([batch], WeightedNll())


def test_sft_is_a_loss_like_any_other(student):
    batch = training.batch()
    batch = batch.replace(weight=batch.mask / batch.mask.sum(), advantage=None)
    with started(training.spec(student, lr=1e-2)) as worker:
        losses = [worker.update([batch], NegativeLogLikelihood()).loss for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_export_comes_in_buckets_that_together_are_the_model(student, tmp_path):
    with started(training.spec(student)) as worker:
        whole = weights(worker)
        worker.start_export(20_000, "student")
        buckets = []
        while (bucket := worker.next_bucket()) is not None:
            buckets.append(bucket)
        worker.export(tmp_path / "exported")
    assert len(buckets) > 2
    assert all(sum(t.nbytes for _, t in bucket) <= 20_000 or len(bucket) == 1 for bucket in buckets)
    assert [name for bucket in buckets for name, _ in bucket] == list(whole)
    with started(training.spec(tmp_path / "exported")) as worker:
        reloaded = weights(worker)
    assert all(torch.equal(whole[name], reloaded[name]) for name in whole)


def test_unknown_models_and_closed_workers_are_refused(student):
    worker = MegatronWorker(training.spec(student), 0, 1, training.local_rendezvous())
    with pytest.raises(OpdError, match="not started"):
        worker.update([training.batch()], WeightedNll())
    with started(training.spec(student)) as worker:
        for model in ("reference", "teacher:math", "critic"):
            with pytest.raises(OpdError, match=f"no model '{model}', only student"):
                worker.score([training.batch()], model)
    worker.close()
    with pytest.raises(OpdError, match="not started"):
        worker.update([training.batch()], WeightedNll())


def test_the_reference_is_loaded_only_when_asked_for(student):
    batch = training.batch()
    other = training.ModelConfig(load=str(student))
    with started(training.spec(student, reference=other)) as worker:
        before = worker.score([batch], "student")[0]
        worker.update([batch], WeightedNll())
        assert torch.equal(worker.score([batch], "reference")[0][batch.mask], before[batch.mask])
        assert not torch.equal(worker.score([batch], "student")[0][batch.mask], before[batch.mask])


def train(rank: int, world_size: int, rendezvous: str, folder: Path, runs: list[dict]) -> bytes:
    """Updates of one of `world_size` data-parallel ranks with several settings: results, gradients and weights of each.

    Pickled here, because a queue would pass tensors by reference to a process that is gone.
    """
    batch = training.batch()
    shards = [[[0, 3], [1]], [[2], [5, 4]]] if world_size == 2 else [[[0, 3], [1], [2], [5, 4]]]
    outcomes = []
    for number, changes in enumerate(runs):
        worker = MegatronWorker(training.spec(folder, **changes), rank, world_size, f"{rendezvous}{number}")
        worker.start()
        try:
            place = worker.place()
            assert (place.dp_rank, place.dp_size, place.reports) == (rank, world_size, True)
            micro_batches = [batch.take(part) for part in shards[rank]]
            results = [worker.update(micro_batches, WeightedNll()) for _ in range(changes["total_steps"])]
            outcomes.append((results, gradient(worker), weights(worker)))
        finally:
            worker.close()
    return pickle.dumps(outcomes)


def test_two_data_parallel_ranks_equal_one_and_sharded_adam_equals_plain_adam(student, tmp_path):
    single = {**NO_CLIPPING, "total_steps": 1}
    plain, sharded = ({"total_steps": 3, "lr": 1e-3, "distributed_optimizer": flag} for flag in (False, True))
    ((alone, expected, _),) = pickle.loads(train(0, 1, (tmp_path / "alone").as_uri(), student, [single]))
    first, second = (pickle.loads(result) for result in run_gloo(train, 2, student, [single, plain, sharded]))

    assert first[0][0][0].loss + second[0][0][0].loss == pytest.approx(alone[0].loss, abs=1e-6)
    assert first[0][0][0].grad_norm == second[0][0][0].grad_norm == pytest.approx(alone[0].grad_norm, rel=1e-6)
    torch.testing.assert_close(first[0][1], expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(first[0][1], second[0][1])

    for (ours, _, _), (theirs, _, _) in ((first[1], first[2]), (second[1], second[2])):
        for a, b in zip(ours, theirs, strict=True):
            assert a.loss == pytest.approx(b.loss, abs=1e-5)
            assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
    for name, tensor in first[1][2].items():
        torch.testing.assert_close(first[2][2][name], tensor, atol=1e-5, rtol=1e-4)


def test_worker_specs_travel(student):
    spec = training.spec(student)
    assert pickle.loads(pickle.dumps(spec)) == spec
