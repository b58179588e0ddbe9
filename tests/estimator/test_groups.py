"""Hand-computed group statistics."""

import torch

from opd_trainer.estimator.groups import leave_one_out, relative_to_group


def test_relative_to_group_golden() -> None:
    # Group 0: rewards 1, 0, 0, 1: mean 0.5, unbiased variance 4 * 0.25 / 3, std 0.5773503; 0.5 / 0.5773513 = 0.8660239.
    # Group 7: rewards 2, 5: mean 3.5, std sqrt(4.5) = 2.1213203; 1.5 / 2.1213213 = 0.7071064.
    reward = torch.tensor([1.0, 2.0, 0.0, 0.0, 5.0, 1.0])
    group = torch.tensor([0, 7, 0, 0, 7, 0])
    found = relative_to_group(reward, group, normalize_std=True)
    expected = torch.tensor([0.8660239, -0.7071064, -0.8660239, -0.8660239, 0.7071064, 0.8660239])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert relative_to_group(reward, group, normalize_std=False).tolist() == [0.5, -1.5, -0.5, -0.5, 1.5, 0.5]


def test_equal_rewards_give_exactly_zero() -> None:
    # In float32 the mean of three times 0.1 is not 0.1, and the difference over 1e-6 would be an advantage of 0.007.
    for size in (2, 3, 7):
        reward = torch.full((size,), 0.1)
        found = relative_to_group(reward, torch.zeros(size, dtype=torch.int64), normalize_std=True)
        assert found.tolist() == [0.0] * size


def test_a_single_sample_has_advantage_zero() -> None:
    reward, group = torch.tensor([3.0]), torch.tensor([0])
    assert relative_to_group(reward, group, normalize_std=True).tolist() == [0.0]
    assert leave_one_out(reward, group).tolist() == [0.0]


def test_leave_one_out_golden() -> None:
    # Rewards 1, 2, 6: others' means 4, 3.5, 1.5.
    found = leave_one_out(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([4, 4, 4]))
    assert found.tolist() == [-3.0, -1.5, 4.5]
