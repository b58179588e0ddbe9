"""Hand-computed advantages of every estimator, on at most 8 tokens."""

from typing import Any

import pytest
import torch

from opd_trainer.estimator.cispo import Cispo
from opd_trainer.estimator.grpo import Grpo
from opd_trainer.estimator.gspo import Gspo
from opd_trainer.estimator.none import NoEstimator
from opd_trainer.estimator.ppo import Ppo
from opd_trainer.estimator.reinforce_plus_plus import ReinforcePlusPlus, ReinforcePlusPlusBaseline
from opd_trainer.estimator.rloo import Rloo
from opd_trainer.estimator.sapo import Sapo
from opd_trainer.types import TokenBatch
from tests.laws.options import NAN, batch_of

# Two siblings without prompt tokens: tokens 0-3 (token 1 is a tool's) and 4-5.
MASK = [[1, 0, 1, 1], [1, 1]]


def batch(reward: list[float], **changes: Any) -> TokenBatch:
    return batch_of(MASK, prompt_tokens=0, reward=torch.tensor(reward), **changes)


def no_rewards() -> torch.Tensor:
    return torch.zeros(6)


@pytest.mark.parametrize("estimator", [Grpo(), Gspo(), Sapo(), Cispo()])
def test_group_relative_golden(estimator: Grpo) -> None:
    # Rewards 1 and 0: mean 0.5, std sqrt(0.5) = 0.7071068; 0.5 / 0.7071078 = 0.7071058.
    found = estimator(batch([1.0, 0.0]), no_rewards())
    a = 0.7071058
    torch.testing.assert_close(found.advantage, torch.tensor([a, 0.0, a, a, -a, -a]))
    assert found.returns is None


def test_dr_grpo_golden() -> None:
    found = Grpo(normalize_std=False)(batch([1.0, 0.0]), no_rewards())
    assert found.advantage.tolist() == [0.5, 0.0, 0.5, 0.5, -0.5, -0.5]


def test_token_rewards_count_in_the_return_of_a_sequence() -> None:
    # Penalties -0.25 on tokens 0 and 2 (and a masked NaN): returns 0.5 and 0, deviations 0.25.
    penalties = torch.tensor([-0.25, NAN, -0.25, 0.0, 0.0, 0.0])
    found = Grpo(normalize_std=False)(batch([1.0, 0.0]), penalties)
    assert found.advantage.tolist() == [0.25, 0.0, 0.25, 0.25, -0.25, -0.25]


def test_rloo_golden() -> None:
    # With two siblings the baseline is the other one's reward.
    found = Rloo()(batch([1.0, 0.25]), no_rewards())
    assert found.advantage.tolist() == [0.75, 0.0, 0.75, 0.75, -0.75, -0.75]


def test_reinforce_plus_plus_golden() -> None:
    # gamma 0.5, reward 8 on the last token, penalty -2 on token 0. Sequence 0, steps are tokens 0, 2, 3:
    # token 3: 8; token 2: 0 + 0.5 * 8 = 4; token 0: -2 + 0.5 * 4 = 0. Sequence 1, reward 2: token 5: 2; token 4: 1.
    penalties = torch.tensor([-2.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    found = ReinforcePlusPlus(gamma=0.5)(batch([8.0, 2.0]), penalties)
    assert found.advantage.tolist() == [0.0, 0.0, 4.0, 8.0, 1.0, 2.0]
    assert found.returns is not None
    assert found.returns.tolist() == found.advantage.tolist()


def test_reinforce_plus_plus_baseline_golden() -> None:
    # (R - mean) = +-3; the penalty of a token stays its own.
    penalties = torch.tensor([-2.0, NAN, 0.0, 0.0, 0.0, -1.0])
    found = ReinforcePlusPlusBaseline()(batch([8.0, 2.0]), penalties)
    assert found.advantage.tolist() == [1.0, 0.0, 3.0, 3.0, -3.0, -4.0]


def test_ppo_golden() -> None:
    # gamma 0.5, lambda 0.5, values 1, 2, 4 on tokens 0, 2, 3; reward 8 on token 3.
    # delta: token 3: 8 + 0 - 4 = 4; token 2: 0 + 0.5 * 4 - 2 = 0; token 0: 0 + 0.5 * 2 - 1 = 0.
    # A (decay 0.25): 4; 0 + 0.25 * 4 = 1; 0 + 0.25 * 1 = 0.25. Returns A + V: 8, 3, 1.25.
    # Sequence 1, values 1, 1, reward 0: delta token 5: -1; token 4: 0.5 - 1 = -0.5. A: -1; -0.75. Returns 0, 0.25.
    values = torch.tensor([1.0, NAN, 2.0, 4.0, 1.0, 1.0])
    found = Ppo(gamma=0.5, lam=0.5)(batch([8.0, 0.0], values=values), no_rewards())
    assert found.advantage.tolist() == [0.25, 0.0, 1.0, 4.0, -0.75, -1.0]
    assert found.returns is not None
    assert found.returns.tolist() == [1.25, 0.0, 3.0, 8.0, 0.25, 0.0]


def test_ppo_returns_hold_no_rounding_of_the_values() -> None:
    values = torch.tensor([0.1, NAN, 0.7, 1e4, 0.3, -3.3])
    found = Ppo()(batch([0.3, 0.0], values=values), no_rewards())
    assert found.returns is not None
    assert found.returns.tolist() == pytest.approx([0.3, 0.0, 0.3, 0.3, 0.0, 0.0], rel=1e-7)
    assert found.returns[4:].tolist() == [0.0, 0.0]


def test_none_is_zero_whatever_the_rewards() -> None:
    found = NoEstimator()(batch([8.0, NAN]), torch.full((6,), 3.0))
    assert found.advantage.tolist() == [0.0] * 6
