"""Hand-computed loss weights: two sequences with 3 and 1 unmasked tokens, one with none."""

import pytest
import torch

from opd_trainer.loss.aggregation import Aggregation, loss_weights

SEQ = torch.tensor([0, 0, 0, 0, 1, 2])
MASK = torch.tensor([True, False, True, True, True, False])
SIXTH = 1 / 6


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        (Aggregation.token_mean, [0.25, 0.0, 0.25, 0.25, 0.25, 0.0]),
        # Mean of two sequences that have tokens: 1/2 * 1/3 and 1/2 * 1.
        (Aggregation.sequence_mean, [SIXTH, 0.0, SIXTH, SIXTH, 0.5, 0.0]),
        # 3 sequences * 2 tokens.
        (Aggregation.constant, [SIXTH, 0.0, SIXTH, SIXTH, SIXTH, 0.0]),
    ],
)
def test_golden(aggregation: Aggregation, expected: list[float]) -> None:
    torch.testing.assert_close(loss_weights(aggregation, SEQ, MASK, 3, 2), torch.tensor(expected))


@pytest.mark.parametrize("aggregation", Aggregation)
def test_nothing_unmasked_weighs_nothing(aggregation: Aggregation) -> None:
    assert not bool(loss_weights(aggregation, SEQ, torch.zeros_like(MASK), 3, 2).any())
