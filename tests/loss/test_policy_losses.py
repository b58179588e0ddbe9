"""Hand-computed values and gradients of every policy loss, on at most 8 tokens."""

import math

import pytest
import torch
from torch import Tensor

from opd_trainer.loss.cispo import CispoLoss
from opd_trainer.loss.clip import ClipLoss
from opd_trainer.loss.gspo import GspoLoss
from opd_trainer.loss.nll import NegativeLogLikelihood
from opd_trainer.loss.policy import PolicyLoss
from opd_trainer.loss.sapo import SapoLoss
from opd_trainer.updates import Live
from tests.laws.options import POLICY_LOSSES, batch_of


def evaluate(loss: PolicyLoss, ratios: list[float], advantage: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Values, gradients with respect to s, and clipped flags of one sequence; s = -1 everywhere."""
    log_probs = torch.full((len(ratios),), -1.0, requires_grad=True)
    old = log_probs.detach() - torch.tensor(ratios).log()
    batch = batch_of([[1] * len(ratios)], prompt_tokens=0)
    values = loss(log_probs, old, torch.tensor(advantage), batch)
    values.sum().backward()
    assert log_probs.grad is not None
    return values.detach(), log_probs.grad, loss.clipped(log_probs.detach(), old, torch.tensor(advantage), batch)


def test_clip_golden() -> None:
    # Band [0.8, 1.28]. q = 1.5, A = 2: min(3, 2.56) -> -2.56, gradient cut. q = 0.5, A = 2: -1, gradient -q A = -1.
    # q = 0.5, A = -2: max(1, 1.6) = 1.6, cut. q = 1.5, A = -2: max(3, 2.56) = 3, gradient 3.
    values, gradient, clipped = evaluate(ClipLoss(eps_low=0.2, eps_high=0.28), [1.5, 0.5, 0.5, 1.5], [2, 2, -2, -2.0])
    torch.testing.assert_close(values, torch.tensor([-2.56, -1.0, 1.6, 3.0]))
    torch.testing.assert_close(gradient, torch.tensor([0.0, -1.0, 0.0, 3.0]))
    assert clipped.tolist() == [True, False, True, False]


def test_dual_clip_golden() -> None:
    # q = 5, A = -2: the loss 10 is bounded by 3 * 2 = 6 and its gradient cut; q = 2: 4 stays; A = 2 is not touched.
    values, gradient, clipped = evaluate(ClipLoss(dual_clip=3.0), [5.0, 2.0, 1.0], [-2.0, -2.0, 2.0])
    torch.testing.assert_close(values, torch.tensor([6.0, 4.0, -2.0]))
    torch.testing.assert_close(gradient, torch.tensor([0.0, 4.0, -2.0]))
    assert clipped.tolist() == [True, False, False]


def test_gspo_golden() -> None:
    # Ratios 2 and 0.5 have mean log 0: every token's q is 1, its gradient -A of its own token.
    values, gradient, clipped = evaluate(GspoLoss(), [2.0, 0.5], [3.0, -1.0])
    torch.testing.assert_close(values, torch.tensor([-3.0, 1.0]))
    torch.testing.assert_close(gradient, torch.tensor([-3.0, 1.0]))
    assert clipped.tolist() == [False, False]
    # Ratios 4 and 1: q = exp(mean log) = 2 on both, above 1 + 4e-4: -1.0004 * 3, cut; with A = -1 the loss is 2.
    values, gradient, clipped = evaluate(GspoLoss(), [4.0, 1.0], [3.0, -1.0])
    torch.testing.assert_close(values, torch.tensor([-3.0012, 2.0]))
    torch.testing.assert_close(gradient, torch.tensor([0.0, 2.0]))
    assert clipped.tolist() == [True, False]


def test_gspo_ratio_is_that_of_each_token_s_own_sequence() -> None:
    # Sequence 0: ratios 4, 1 -> 2; its masked token does not count. Sequence 1: ratio 0.25.
    batch = batch_of([[1, 0, 1], [1]], prompt_tokens=0)
    log_probs = torch.zeros(4)
    old = -torch.tensor([4.0, 1.0, 1.0, 0.25]).log()
    values = GspoLoss()(log_probs, old, -torch.ones(4), batch)
    torch.testing.assert_close(values[batch.mask], torch.tensor([2.0, 2.0, 1 - 3e-4]))


def test_sapo_golden() -> None:
    # A = 2, tau 1, q = 1: f = 4 * 0.5 = 2, loss -4; df/dq = 4 sigmoid' = 1, gradient -q A f' = -2.
    # A = 2, q = 2: f = 4 sigmoid(1) = 2.9242343, loss -5.8484686; f' = 4 * 0.1966119 = 0.7864477, gradient -2 * 2 * f'.
    # A = -1, tau 1.05, q = 1: f = (4 / 1.05) * 0.5 = 1.9047619, loss 1.9047619, gradient 1.
    values, gradient, clipped = evaluate(SapoLoss(), [1.0, 2.0, 1.0], [2.0, 2.0, -1.0])
    torch.testing.assert_close(values, torch.tensor([-4.0, -5.8484686, 1.9047619]))
    torch.testing.assert_close(gradient, torch.tensor([-2.0, -3.1457908, 1.0]))
    assert not bool(clipped.any())


def test_cispo_golden() -> None:
    # s = -1: loss w A with w = clip(q, 0, 5). q = 8, A = 2: w = 5, loss 10, gradient -w A = -10 (not cut).
    # q = 0.5, A = -2: loss -1, gradient 1.
    values, gradient, clipped = evaluate(CispoLoss(), [8.0, 0.5], [2.0, -2.0])
    torch.testing.assert_close(values, torch.tensor([10.0, -1.0]))
    torch.testing.assert_close(gradient, torch.tensor([-10.0, 1.0]))
    assert clipped.tolist() == [True, False]


@pytest.mark.parametrize("loss", POLICY_LOSSES.values(), ids=POLICY_LOSSES)
def test_huge_ratios_stay_finite_where_the_band_cuts(loss: PolicyLoss) -> None:
    values, gradient, _ = evaluate(loss, [math.exp(40), math.exp(-40)], [1.0, -1.0])
    assert bool(torch.isfinite(values).all())
    assert bool(torch.isfinite(gradient).all())


def test_negative_log_likelihood_golden() -> None:
    batch = batch_of([[1, 0, 1]], prompt_tokens=0)
    log_probs = torch.tensor([-0.5, math.nan, -2.0], requires_grad=True)
    values = NegativeLogLikelihood()(Live(log_probs=log_probs, entropy=log_probs.detach()), batch)
    assert values.tolist() == [0.5, 0.0, 2.0]
    values.sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [-1.0, 0.0, -1.0]
