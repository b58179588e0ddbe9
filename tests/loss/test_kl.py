"""Hand-computed KL estimates, x = s - r."""

import torch

from opd_trainer.loss.config import KlEstimator
from opd_trainer.loss.kl import kl_estimate


def test_golden() -> None:
    # x = 1, -1, 0: k1 x; k2 x^2 / 2; k3 exp(-x) - 1 + x = 0.3678794, e - 2 = 0.7182818, 0.
    student, reference = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([-2.0, -2.0, -2.0])
    expected = {
        KlEstimator.k1: [1.0, -1.0, 0.0],
        KlEstimator.k2: [0.5, 0.5, 0.0],
        KlEstimator.k3: [0.3678794, 0.7182818, 0.0],
    }
    for estimator, values in expected.items():
        torch.testing.assert_close(kl_estimate(estimator, student, reference), torch.tensor(values))


def test_k3_is_bounded_and_its_gradient_finite() -> None:
    student = torch.tensor([-300.0, -0.1], requires_grad=True)
    values = kl_estimate(KlEstimator.k3, student, torch.tensor([-0.1, -300.0]))
    assert values.tolist() == [10.0, 10.0]
    values.sum().backward()
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())
