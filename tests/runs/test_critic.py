"""Runs with a critic, and runs with several optimizer steps on each rollout."""

import json
from pathlib import Path

import pytest

from opd_trainer.megatron.config import OptimizerConfig, Schedule
from opd_trainer.megatron.optimizer import learning_rate
from tests.runs.runs import column, distil, kill_after, launch, save_model, steps, world

REWARD = ("reward=length", "reward.max_tokens=12", "reward.free_tokens=1")
PPO = ("estimator=ppo", "critic.optimizer.lr=1e-3", *REWARD)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("world"))


def test_a_coefficient_of_zero_leaves_student_and_critic_as_without_distillation(small: Path) -> None:
    assert launch(small, small / "zero", *distil(small), "opd.kl_coef=0", *PPO) == 0
    assert launch(small, small / "off", "opd=off", *PPO) == 0
    without = steps(small / "off")
    assert {"train/value_loss", "train/critic_grad_norm", "train/value_clip_fraction", "train/critic_lr"} <= set(
        without[0]
    )
    assert without[0]["train/value"] == 0.0
    for zero, off in zip(steps(small / "zero"), without, strict=True):
        assert {name: zero[name] for name in off if not name.startswith("opd/")} == off


def test_the_term_reaches_the_critic_only_when_asked(small: Path) -> None:
    raw = ("estimator.whiten=false", "estimator.gamma=0.9", "steps=1")
    for name, more in (("apart", ()), ("inside", ("opd.in_returns=true",)), ("none", ("opd=off",))):
        teacher = () if name == "none" else distil(small)
        assert launch(small, small / name, *teacher, *PPO, *raw, *more) == 0
    (apart,), (inside,), (none,) = (steps(small / name) for name in ("apart", "inside", "none"))
    assert apart["train/return"] == none["train/return"]
    assert apart["train/value_loss"] == none["train/value_loss"]
    assert inside["train/return"] < apart["train/return"]
    assert inside["train/value_loss"] != apart["train/value_loss"]


def test_a_killed_run_resumes_with_its_critic(small: Path, tmp_path: Path) -> None:
    arguments = ("opd=off", *PPO, "steps=5", "checkpoint.every=2", "loss.updates_per_rollout=2")
    assert launch(small, tmp_path / "whole", *arguments) == 0
    kill_after(small, tmp_path / "killed", 3, *arguments)
    assert launch(small, tmp_path / "killed", *arguments, "resume=auto") == 0
    assert steps(tmp_path / "killed") == steps(tmp_path / "whole")


def test_the_schedule_counts_optimizer_steps(small: Path, tmp_path: Path) -> None:
    several = ("loss.updates_per_rollout=4", "loss.epochs_per_rollout=2")
    schedule = ("schedule=linear", "warmup_steps=3")
    owners = [f"{owner}.optimizer.{key}" for owner in ("megatron", "critic") for key in schedule]
    assert launch(small, tmp_path / "run", *distil(small), *PPO, *several, *owners) == 0
    settings = OptimizerConfig(lr=1e-3, schedule=Schedule.linear, warmup_steps=3)
    rates = [learning_rate(settings, step, 24) for step in range(24)]
    expected = [sum(rates[step : step + 8]) / 8 for step in (0, 8, 16)]
    assert list(column(tmp_path / "run", "train/lr")) == pytest.approx(expected)
    assert list(column(tmp_path / "run", "train/critic_lr")) == pytest.approx(expected)
    # The first of the eight updates has the ratio 1, the others do not.
    assert all(kl > 0 for kl in column(tmp_path / "run", "train/approx_kl"))


def test_a_critic_nobody_asked_for_and_one_of_another_tokenizer_are_refused(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(small, tmp_path / "unused", *distil(small), "critic.optimizer.lr=1e-3") == 2
    assert "Set estimator=ppo, or drop critic.*" in capsys.readouterr().err
    assert launch(small, tmp_path / "missing", "opd=off", *PPO, f"critic.load={tmp_path / 'nowhere'}") == 2
    assert "critic.load" in capsys.readouterr().err
    other = save_model(tmp_path / "other", 3)
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    assert launch(small, tmp_path / "foreign", "opd=off", *PPO, f"critic.load={other}") == 2
    assert "whose tokenizer differs from the student's at 2 ids" in capsys.readouterr().err
