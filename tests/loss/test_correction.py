"""Hand-computed corrections of ratios 0.25, 1, 3."""

import pytest
import torch

from opd_trainer.loss.config import Correction, LossConfig
from opd_trainer.loss.correction import correction_weight


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (LossConfig(), [1.0, 1.0, 1.0]),
        (LossConfig(correction=Correction.tis), [0.25, 1.0, 2.0]),
        (LossConfig(correction=Correction.tis, correction_low=0.5), [0.5, 1.0, 2.0]),
        (LossConfig(correction=Correction.icepop, correction_low=0.5, correction_high=5.0), [0.0, 1.0, 3.0]),
        (LossConfig(correction=Correction.icepop), [0.25, 1.0, 0.0]),
    ],
)
def test_golden(options: LossConfig, expected: list[float]) -> None:
    old = torch.tensor([0.25, 1.0, 3.0]).log().requires_grad_()
    weight = correction_weight(options, old, torch.zeros(3))
    torch.testing.assert_close(weight, torch.tensor(expected))
    assert not weight.requires_grad
