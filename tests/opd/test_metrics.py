"""Hand-computed metrics of the OPD term."""

import pytest
import torch

from opd_trainer.opd.metrics import advantage_share, deciles, likeness, opd_metrics, percentile
from tests.laws.options import NAN, batch_of


def test_golden() -> None:
    # Two responses after a prompt of one token: 3 tokens (stopped) and 2 (truncated). The teacher misses the fourth.
    batch = batch_of([[1, 1, 1], [1, 1]], prompt_tokens=1, truncated=torch.tensor([False, True]))
    student = torch.tensor([NAN, -1.0, -1.0, -1.0, NAN, -2.0, -2.0])
    teacher = torch.tensor([NAN, -2.0, -1.0, -4.0, NAN, NAN, -3.0])
    values = opd_metrics(student, teacher, batch.mask, batch).values()
    # Reverse KL 1, 0, 3, -, 1. Positions 0/3, 1/3, 2/3 and 0/2, 1/2 lie in deciles 0, 3, 6, 0, 5.
    # k3 = exp(-x) - 1 + x: 0.3678794, 0, 2.0497871, 0.3678794.
    assert values == pytest.approx(
        {
            "opd/reverse_kl": 1.25,
            "opd/reverse_kl_p95": 3.0,
            "opd/k3": 0.6963865,
            "opd/student_log_prob": -1.25,
            "opd/teacher_log_prob": -2.5,
            "opd/kl_by_position/0": 1.0,
            "opd/kl_by_position/3": 0.0,
            "opd/kl_by_position/5": 1.0,
            "opd/kl_by_position/6": 3.0,
            "opd/eos_gap": 3.0,
        }
    )


def test_without_a_teacher_nothing_is_known() -> None:
    batch = batch_of([[1, 1]], prompt_tokens=0)
    unknown = torch.full((2,), NAN)
    assert opd_metrics(torch.zeros(2), unknown, batch.mask, batch).values() == {}


def test_percentile_is_the_nearest_rank() -> None:
    values = torch.arange(1.0, 101.0)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    assert percentile(values, 0.95) == 95.0
    assert percentile(values, 0.0) == 1.0
    assert percentile(torch.tensor([7.0]), 0.95) == 7.0
    assert percentile(torch.arange(1.0, 21.0), 0.95) == 19.0


def test_deciles_of_ten_tokens() -> None:
    mask = torch.ones(10, dtype=torch.bool)
    assert deciles(torch.zeros(10, dtype=torch.int64), mask, 1).tolist() == list(range(10))


def test_advantage_share_golden() -> None:
    # |term| = 1 + 2, |base| = 3 + 2; the last token is not valid.
    base, final = torch.tensor([3.0, -2.0, 9.0]), torch.tensor([2.0, 0.0, 9.0])
    assert advantage_share(base, final, torch.tensor([True, True, False])) == pytest.approx(3 / 8)
    assert advantage_share(base, base, torch.zeros(3, dtype=torch.bool)) == 0.0


def test_likeness_is_measured_against_the_floor_of_engine_and_trainer() -> None:
    student = torch.tensor([-1.0, -2.0, -0.5, torch.nan])
    mask = torch.tensor([True, True, True, False])
    near, far = student + 1e-3, student + 0.3
    assert likeness(student, student.clone(), student, mask) is not None
    assert likeness(student, near, student, mask) is None
    warning = likeness(student, near, student - 1e-3, mask)
    assert warning is not None
    assert "0.001 nats a token" in warning
    assert likeness(student, far, student - 1e-3, mask) is None
    assert likeness(student, torch.full_like(student, torch.nan), student, mask) is None
    assert likeness(student, far, torch.full_like(student, torch.nan), mask) is None
