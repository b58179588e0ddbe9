import math

import pytest

from opd_trainer.megatron.config import OptimizerConfig, Schedule
from opd_trainer.megatron.optimizer import learning_rate


def rates(total_steps, **changes):
    settings = OptimizerConfig(lr=1.0, **changes)
    return [learning_rate(settings, step, total_steps) for step in range(total_steps + 2)]


def test_constant_after_warm_up():
    assert rates(4, warmup_steps=2) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert rates(2) == [1.0, 1.0, 1.0, 1.0]


def test_linear_reaches_the_minimum_at_the_end_of_the_run():
    assert rates(4, schedule=Schedule.linear, min_lr=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_decay_steps_override_the_runs_length():
    assert rates(6, schedule=Schedule.linear, decay_steps=2) == [1.0, 0.5, 0, 0, 0, 0, 0, 0]


def test_cosine_after_warm_up():
    found = rates(6, schedule=Schedule.cosine, warmup_steps=2)
    assert found[:3] == [0.5, 1.0, 1.0]
    assert found[3:7] == pytest.approx([(1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3, 4)])
