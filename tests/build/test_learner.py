"""Models and schedules out of a configuration."""

from pathlib import Path
from typing import Any

import pytest

from opd_trainer.build.learner import build_objective, optimizer_steps, reference_of, refuse_other_words
from opd_trainer.build.vocabulary import vocabulary_of
from opd_trainer.cli.check import check
from opd_trainer.cli.composition import Composer
from opd_trainer.config import Config
from opd_trainer.demo import arithmetic
from opd_trainer.errors import ConfigError
from tests.runs.runs import save_model


def config(compose: Composer, *overrides: str) -> Config:
    found = check(compose, ["~experiment", "opd=off", *overrides])
    assert found.config is not None, found.problems
    return found.config


def test_a_reference_of_its_own_has_a_step_of_its_own(compose: Composer) -> None:
    student = ("model.load=student", "model.ckpt_step=7")
    assert reference_of(config(compose, *student)) is None
    same = reference_of(config(compose, *student, "reference.kl_coef=0.1"))
    assert same is not None
    assert (same.load, same.ckpt_step) == ("student", 7)
    other = ("reference.kl_coef=0.1", "reference.load=other")
    for overrides, step in ((other, None), ((*other, "reference.ckpt_step=3"), 3)):
        own = reference_of(config(compose, *student, *overrides))
        assert own is not None
        assert (own.load, own.ckpt_step) == ("other", step)


def test_only_rollouts_are_learned_from_several_times(compose: Composer) -> None:
    several = ("steps=10", "loss.updates_per_rollout=4", "loss.epochs_per_rollout=2")
    assert optimizer_steps(config(compose, *several)) == 80
    assert optimizer_steps(config(compose, *several, "task=sft")) == 10


def test_a_reference_with_other_words_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = vocabulary_of(settings(save_model(tmp_path / "ours", 1)))
    refuse_other_words("reference", settings(tmp_path / "ours"), ours)
    monkeypatch.setattr(arithmetic, "VOCABULARY", arithmetic.VOCABULARY[::-1])
    theirs = settings(save_model(tmp_path / "theirs", 2))
    with pytest.raises(ConfigError, match=r"reference\.load: .*differs from the student's.*reference\.load=null"):
        refuse_other_words("reference", theirs, ours)


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (("rollout.samples_per_prompt=1",), True),
        (("rollout.samples_per_prompt=1", "estimator=ppo"), False),
        ((), False),
    ],
)
def test_a_group_of_one_is_told(
    compose: Composer, caplog: pytest.LogCaptureFixture, overrides: tuple[str, ...], warned: bool
) -> None:
    build_objective(config(compose, *overrides))
    assert ("learns from the teacher alone" in caplog.text) is warned


def settings(folder: Path) -> Any:
    from opd_trainer.model.config import ModelConfig

    return ModelConfig(load=str(folder))
