"""Metrics of the objective, by hand, and what follows from them."""

import dataclasses
import json
import math

import pytest
import torch

from opd_trainer.estimator.grpo import Grpo
from opd_trainer.estimator.none import NoEstimator
from opd_trainer.estimator.ppo import Ppo
from opd_trainer.estimator.reinforce_plus_plus import ReinforcePlusPlus
from opd_trainer.loss.config import KlApply, LossConfig, ReferenceConfig
from opd_trainer.opd.config import (
    OpdConfig,
    OpdType,
    ScheduleConfig,
    ScheduleKind,
    StudentLogProb,
)
from opd_trainer.updates import CriticResult
from tests.laws.options import NAN, batch_of, live_log_probs, objective, scores
from tests.objectives import DENSE, OFF, RAGGED, updated


def test_metrics_golden() -> None:
    # Inline teacher; s = -1, -2, b = -1.5, -2, t = -2, -1.5, o = -1, -1.5; base advantage 0; kl_coef 1: A = -1, 0.5.
    # q = 1, exp(-0.5) = 0.6065307 (not clipped, since A > 0). pg = (1 - 0.5 * 0.6065307) / 2.
    # approx_kl = k3(s - o) = (0 + e^0.5 - 1 - 0.5) / 2.
    batch = batch_of(
        [[1, 1]],
        prompt_tokens=1,
        teacher=None,
        old=scores(torch.tensor([NAN, -1.0, -1.5])),
        rollout=scores(torch.tensor([NAN, -1.5, -2.0])),
    )
    chosen = objective(NoEstimator(), opd=OpdConfig(type=OpdType.megatron))
    batch = chosen.assign(batch)
    result = updated(batch, torch.tensor([NAN, -1.0, -2.0]), torch.tensor([NAN, -2.0, -1.5]))
    values = chosen.metrics(batch, result).values()
    expected = {
        "train/loss": 0.5,
        "train/grad_norm": 2.0,
        "train/lr": 1e-3,
        "train/pg_loss": (1 - 0.5 * 0.6065307) / 2,
        "train/clip_fraction": 0.0,
        "train/advantage": -0.25,
        "train/approx_kl": (1.6487213 - 1.5) / 2,
        "train/rollout_log_prob_diff": 0.25,
        "rollout/entropy": 0.25,
        "opd/reverse_kl": 0.25,
        "opd/kl_coef": 1.0,
        "opd/advantage_share": 1.0,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert "train/kl_loss" not in values


def test_metrics_of_a_divergence_golden() -> None:
    # Divergences 0.5 and 1.5, kl_coef 2, weights 1/2: the loss has 2 * (0.5 + 1.5) / 2; the metric is their mean.
    # The term is not in the advantage, so that it has no share there.
    batch = batch_of([[1, 1]], prompt_tokens=1, teacher=None, old=None)
    chosen = objective(NoEstimator(), opd=OpdConfig(type=OpdType.megatron, kl_coef=2.0, divergence=DENSE))
    batch = chosen.assign(batch)
    result = updated(batch, torch.tensor([NAN, -1.0, -2.0]), torch.tensor([NAN, -2.0, -1.5]))
    result = dataclasses.replace(result, divergence=torch.tensor([NAN, 0.5, 1.5]))
    values = chosen.metrics(batch, result).values()
    assert (values["opd/divergence"], values["train/opd_loss"]) == (1.0, 2.0)
    assert (values["opd/reverse_kl"], values["train/pg_loss"]) == (0.25, 0.0)
    assert "opd/advantage_share" not in values


def test_the_share_of_a_term_that_is_added_before_the_update() -> None:
    # Reward 1 on both tokens of one response; the term is 1 on the first and -0.5 on the second: 1.5 / (1.5 + 2).
    batch = batch_of(
        [[1, 1]],
        prompt_tokens=1,
        reward=torch.tensor([1.0]),
        old=scores(torch.tensor([NAN, -1.0, -1.5])),
        teacher=scores(torch.tensor([NAN, -2.0, -1.0])),
    )
    frozen = OpdConfig(type=OpdType.megatron, student_log_prob=StudentLogProb.old)
    chosen = objective(ReinforcePlusPlus(whiten=False), opd=frozen)
    batch = chosen.assign(batch)
    assert batch.advantage is not None
    assert batch.advantage.tolist() == [0.0, 0.0, 1.5]
    result = updated(batch, torch.tensor([NAN, -1.0, -2.0]), None)
    assert chosen.metrics(batch, result).values()["opd/advantage_share"] == pytest.approx(1.5 / 3.5)


def test_critic_metrics_golden() -> None:
    # One response of two tokens, reward 1, gamma = lambda = 1: both returns are 1; values 0.5 and 0.25 before the step.
    # Live 0.9 has moved by 0.4 > 0.2 towards 1: near = 0.7, (0.7 - 1)^2 > (0.9 - 1)^2, clipped. 0.3 has not.
    values = torch.tensor([NAN, 0.5, 0.25])
    chosen = objective(Ppo(), opd=OFF)
    batch = chosen.assign(batch_of([[1, 1]], prompt_tokens=1, values=values, reward=torch.tensor([1.0])))
    live = torch.tensor([NAN, 0.9, 0.3])
    step = CriticResult(values=live, loss=0.3, grad_norm=2.5, learning_rate=1e-5)
    result = dataclasses.replace(updated(batch, live_log_probs(batch)), critic=step)
    found = chosen.metrics(batch, result).values()
    expected = {
        "train/value_loss": 0.3,
        "train/critic_grad_norm": 2.5,
        "train/critic_lr": 1e-5,
        "train/value_clip_fraction": 0.5,
        "train/value": 0.375,
        "train/return": 1.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert math.isnan(found["train/explained_variance"])

    # Token rewards (a penalty of the reference) make the returns differ: 1 - Var(R - V) / Var(R).
    penalty = ReferenceConfig(kl_coef=0.5, apply=KlApply.reward)
    batch = objective(Ppo(), opd=OFF, reference=penalty).assign(batch)
    assert batch.returns is not None
    residual, returns = (batch.returns - values)[1:], batch.returns[1:]
    explained = 1 - float(residual.var(correction=0) / returns.var(correction=0))
    assert chosen.metrics(batch, result).values()["train/explained_variance"] == pytest.approx(explained, rel=1e-5)


def test_a_teacher_like_the_student_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Of two updates on the first rollout; by then the student has moved on purpose."""
    chosen = objective(Grpo(), options=LossConfig(updates_per_rollout=2))
    for _ in range(2):
        for part in chosen.minibatches(chosen.assign(batch_of(RAGGED))):
            chosen.metrics(part, updated(part, part.rollout.log_probs, part.rollout.log_probs))
    assert caplog.text.count("CANNOT BE TOLD FROM THE STUDENT") == 1


def test_metrics_without_opd_have_none_of_it() -> None:
    chosen = objective(Grpo(), opd=OFF, reference=ReferenceConfig(kl_coef=0.1))
    batch = chosen.assign(batch_of(RAGGED))
    values = chosen.metrics(batch, updated(batch, live_log_probs(batch))).values()
    assert values["train/kl_loss"] > 0
    assert not any(name.startswith("opd/") for name in values)


def test_the_controller_follows_the_measured_kl_and_resumes() -> None:
    opd = OpdConfig(type=OpdType.megatron, schedule=ScheduleConfig(kind=ScheduleKind.target_kl, target=0.01))
    batch = batch_of(RAGGED)
    whole, resumed = objective(Grpo(), opd=opd), objective(Grpo(), opd=opd)

    def step(chosen, seed: int) -> float:
        assigned = chosen.assign(batch)
        chosen.metrics(assigned, updated(assigned, live_log_probs(batch, seed)))
        return chosen.loss().kl_coef

    for seed in range(3):
        step(whole, seed)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert step(resumed, 3) == step(whole, 3) != 1.0
