"""Two processes with half of the sequences each sum to the loss and gradient of one process, whitening included."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, distributed

from opd_trainer.objective import Objective
from opd_trainer.types import TokenBatch
from tests.gloo import run_gloo
from tests.laws.options import ESTIMATORS, SURROUNDINGS, batch_of, live_log_probs, loss_and_gradient, objective

RAGGED = [[1, 1, 1], [1, 0, 1, 1, 1], [1], [1, 1, 0, 1], [], [1, 1, 1, 1, 1, 1]]
SHARES = [[0, 3, 4], [1, 2, 5]]

Case = tuple[Objective, TokenBatch, Tensor]


def cases() -> Iterator[Case]:
    """Every estimator in all surroundings, the whole batch assigned by one process."""
    for estimator in ESTIMATORS.values():
        for around in SURROUNDINGS.values():
            chosen = objective(estimator, **around.replace())
            batch = chosen.assign(batch_of(RAGGED))
            yield chosen, batch, live_log_probs(batch)


def summed_over_ranks(rank: int, world_size: int, rendezvous: str) -> list[tuple[float, list[float]]]:
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        sums = []
        for chosen, batch, log_probs in cases():
            share = torch.tensor(SHARES[rank])
            mine, own_log_probs = batch.take(share), batch.replace(values=log_probs).take(share).values
            own_index = batch.replace(values=torch.arange(batch.num_tokens).float()).take(share).values
            assert own_log_probs is not None
            assert own_index is not None
            loss, own_gradient, _ = loss_and_gradient(chosen, mine, own_log_probs, torch.zeros_like(own_log_probs))
            gradient = torch.zeros_like(log_probs).index_add(0, own_index.long(), own_gradient)
            distributed.all_reduce(loss)
            distributed.all_reduce(gradient)
            # Plain numbers: a tensor in a queue dies with the process that sent it.
            sums.append((float(loss), gradient.tolist()))
        return sums
    finally:
        distributed.destroy_process_group()


def test_two_processes_equal_one() -> None:
    by_rank = run_gloo(summed_over_ranks, 2)
    for (chosen, batch, log_probs), *found in zip(cases(), *by_rank, strict=True):
        loss, gradient, _ = loss_and_gradient(chosen, batch, log_probs, torch.zeros_like(log_probs))
        for rank_loss, rank_gradient in found:
            assert rank_loss == pytest.approx(float(loss), abs=1e-6)
            torch.testing.assert_close(torch.tensor(rank_gradient), gradient)
