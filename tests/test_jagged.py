"""Ragged arithmetic against plain loops, masked NaNs included."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from jaxtyping import TypeCheckError

from opd_trainer import jagged

NAN = math.nan
# Lengths 2, 0, 3.
SEQ = torch.tensor([0, 0, 2, 2, 2])
MASK = torch.tensor([True, False, True, False, True])
VALUES = torch.tensor([1.0, NAN, 2.0, NAN, 5.0])


def test_lengths_and_positions() -> None:
    lengths = jagged.lengths_of(SEQ, 3)
    assert lengths.tolist() == [2, 0, 3]
    assert jagged.seq_from_lengths(lengths).tolist() == SEQ.tolist()
    assert jagged.positions(lengths).tolist() == [0, 1, 0, 1, 2]
    assert jagged.token_index(lengths, torch.tensor([2, 1, 0])).tolist() == [2, 3, 4, 0, 1]


def test_sums_and_means_by_sequence() -> None:
    assert jagged.sum_by(VALUES, SEQ, MASK, 3).tolist() == [1.0, 0.0, 7.0]
    assert jagged.count_by(SEQ, MASK, 3).tolist() == [1, 0, 2]
    assert jagged.mean_by(VALUES, SEQ, MASK, 3).tolist() == [1.0, 0.0, 3.5]


def test_order_inside_a_sequence() -> None:
    assert jagged.rank_of(SEQ, MASK, 3).tolist() == [0, 1, 0, 1, 1]
    assert jagged.sum_before(VALUES, SEQ, MASK, 3).tolist() == [0.0, 1.0, 0.0, 2.0, 2.0]
    assert jagged.last_of(SEQ, MASK, 3).tolist() == [True, False, False, False, True]


def test_whitening_golden() -> None:
    # Values 1, 2, 5 -> mean 8/3, biased variance 26/9: (-5, -2, 7) / sqrt(26).
    found = jagged.whiten(VALUES, MASK, epsilon=0.0)
    expected = torch.tensor([-5.0, 0.0, -2.0, 0.0, 7.0]) / math.sqrt(26)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mask", [[False, False], [True, False]])
def test_whitening_of_nothing_and_of_one_value_is_zero(mask: list[bool]) -> None:
    assert jagged.whiten(torch.tensor([3.0, NAN]), torch.tensor(mask)).tolist() == [0.0, 0.0]


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(TypeCheckError):
        jagged.sum_by(VALUES, SEQ[:-1], MASK, 3)


@settings(max_examples=50)
@given(st.lists(st.lists(st.booleans(), max_size=5), min_size=1, max_size=6))
def test_agrees_with_plain_loops(masks: list[list[bool]]) -> None:
    lengths = torch.tensor([len(mask) for mask in masks])
    seq = jagged.seq_from_lengths(lengths)
    mask = torch.tensor([bit for bits in masks for bit in bits], dtype=torch.bool)
    values = torch.where(mask, torch.arange(len(mask)) + 1.0, NAN)
    start, sums, before, ranks = 0, [], [], []
    for bits in masks:
        total, rank = 0.0, 0
        for offset, bit in enumerate(bits):
            before.append(total)
            ranks.append(rank)
            total += float(values[start + offset]) if bit else 0.0
            rank += bit
        sums.append(total)
        start += len(bits)
    assert jagged.sum_by(values, seq, mask, len(masks)).tolist() == sums
    assert jagged.sum_before(values, seq, mask, len(masks)).tolist() == before
    assert jagged.rank_of(seq, mask, len(masks)).tolist() == ranks
