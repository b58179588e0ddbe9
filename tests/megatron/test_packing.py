import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_trainer.megatron.packing import cost, merge, plan
from tests.megatron import training

lengths_strategy = st.lists(st.integers(1, 300), min_size=0, max_size=80)


@settings(max_examples=200)
@given(lengths=lengths_strategy, dp_size=st.integers(1, 5), max_tokens=st.integers(1, 512))
def test_every_sequence_is_planned_exactly_once_within_the_budget(lengths, dp_size, max_tokens):
    planned = plan(lengths, dp_size, max_tokens)
    assert len(planned.ranks) == dp_size
    assert len({len(rank) for rank in planned.ranks}) == 1
    assert planned.num_micro_batches >= 1
    assert sorted(i for rank in planned.ranks for micro in rank for i in micro) == list(range(len(lengths)))
    for rank in planned.ranks:
        for micro in rank:
            assert sum(lengths[i] for i in micro) <= max_tokens or len(micro) == 1
    assert 0 < planned.efficiency <= 1
    assert plan(lengths, dp_size, max_tokens) == planned


@settings(max_examples=100)
@given(lengths=lengths_strategy, dp_size=st.integers(1, 4), max_tokens=st.integers(1, 512))
def test_merge_restores_the_token_order(lengths, dp_size, max_tokens):
    planned = plan(lengths, dp_size, max_tokens)
    tokens = torch.arange(sum(lengths), dtype=torch.float32)
    per_sequence = torch.split(tokens, lengths) if lengths else ()
    results = [
        [torch.cat([per_sequence[i] for i in micro]) if micro else torch.empty(0) for micro in rank]
        for rank in planned.ranks
    ]
    assert torch.equal(merge(planned, results), tokens)


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(32, 128), min_size=64, max_size=128), dp_size=st.integers(2, 4))
def test_ranks_are_balanced_by_cost(lengths, dp_size):
    planned = plan(lengths, dp_size, 512)
    costs = [sum(cost(lengths[i]) for micro in rank for i in micro) for rank in planned.ranks]
    # Greedy levelling is off by at most one sequence per rank.
    assert max(costs) <= 1.25 * min(costs)


def test_the_number_of_micro_batches_is_that_of_first_fit_decreasing():
    assert plan([6, 4, 3, 3, 2, 2], 1, 10).num_micro_batches == 2
    assert plan([6, 4, 3, 3, 2, 2], 2, 10).num_micro_batches == 1


def test_a_longer_sequence_is_alone():
    planned = plan([50, 5, 5], 1, 10)
    assert (0,) in planned.ranks[0]
    assert planned.num_micro_batches == 2


def test_fewer_sequences_than_ranks_leave_empty_micro_batches():
    planned = plan([3], 2, 10)
    assert sorted(planned.ranks) == [((),), ((0,),)]
    assert planned.efficiency == 0.5


@pytest.mark.parametrize("dp_size", [1, 2])
def test_micro_batch_tokens_agree_with_take(dp_size):
    batch = training.batch((1, 1, 2, 1), (2, 0, 2, 1))
    batch = batch.replace(tokens=torch.arange(batch.num_tokens))
    planned = plan(batch.lengths.tolist(), dp_size, 5)
    results = [[batch.take(list(part)).tokens for part in rank] for rank in planned.ranks]
    assert torch.equal(merge(planned, results), batch.tokens)
