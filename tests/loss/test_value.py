"""Hand-computed critic losses."""

import math

import torch

from opd_trainer.loss.value import ValueLoss, explained_variance


def test_golden() -> None:
    # Token 0: v 1.5, old 1, R 2: near 1.2; max(0.25, 0.64) / 2 = 0.32, gradient cut.
    # Token 1: v 1.1, old 1, R 2: inside the band, 0.81 / 2 = 0.405, gradient v - R = -0.9. Token 2 is masked.
    values = torch.tensor([1.5, 1.1, math.nan], requires_grad=True)
    mask = torch.tensor([True, True, False])
    loss = ValueLoss(clip=0.2)(values, torch.tensor([1.0, 1.0, math.nan]), torch.tensor([2.0, 2.0, math.nan]), mask)
    torch.testing.assert_close(loss.detach(), torch.tensor([0.32, 0.405, 0.0]))
    loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.0, -0.9, 0.0]))


def test_clipped_are_the_tokens_whose_loss_is_the_clipped_one() -> None:
    # As above: token 0 has 0.64 > 0.25; token 1 has not moved far enough. Token 3 moved far, but away from its target.
    values, old = torch.tensor([1.5, 1.1, math.nan, 0.5]), torch.tensor([1.0, 1.0, math.nan, 1.0])
    mask = torch.tensor([True, True, False, True])
    found = ValueLoss(clip=0.2).clipped(values, old, torch.full((4,), 2.0), mask)
    assert found.tolist() == [True, False, False, False]


def test_explained_variance_golden() -> None:
    # Returns 0, 2, 4 (variance 8/3), residuals 0, 1, -1 (variance 2/3): 1 - 1/4.
    mask = torch.tensor([True, True, True, False])
    returns = torch.tensor([0.0, 2.0, 4.0, math.nan])
    values = torch.tensor([0.0, 1.0, 5.0, math.nan])
    assert abs(explained_variance(values, returns, mask) - 0.75) < 1e-12
    assert math.isnan(explained_variance(values, torch.ones(4), mask))
    assert math.isnan(explained_variance(values, returns, torch.zeros(4, dtype=torch.bool)))
