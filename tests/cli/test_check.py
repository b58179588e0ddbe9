"""Every unknown key, option and value is found at once, with a hint."""

from pathlib import Path
from typing import Any

import pytest

from opd_trainer.loss.aggregation import Aggregation
from opd_trainer.opd.config import OpdType
from opd_trainer.teacher.config import ResidentTeacher


@pytest.mark.parametrize(
    ("argument", "key", "hint"),
    [
        ("opd.kl_ceof=1", "opd.kl_ceof", "Did you mean opd.kl_coef"),
        ("+opd.kl_ceof=1", "opd.kl_ceof", "Did you mean opd.kl_coef"),
        ("++estimator.normalise_std=1", "estimator.normalise_std", "Did you mean estimator.normalize_std"),
        ("lr=1e-3", "lr", "Did you mean critic.optimizer.lr or megatron.optimizer.lr"),
        ("teecher.load=x", "teecher.load", "Did you mean teacher.load"),
        ("xyzzy=1", "xyzzy", "conf/README.md lists every key"),
        ("cluster.num_workers=2", "cluster.num_workers", "It belongs to cluster=ray"),
        ("estimator.loss.tau_pos=2", "estimator.loss.tau_pos", "there is no such key"),
        ("estimator.source=me", "estimator.source", "there is no such key"),
        ("seed.deeper=1", "seed.deeper", "there is no such key"),
        ("estimator=grop", "estimator", "Did you mean estimator=grpo"),
        ("opd=nothing_like_it", "opd", "Options: megatron, off, sglang"),
        ("+model@teacher.model=nope", "model", "Options: base"),
        ("opd.kl_coef=abc", "opd.kl_coef", "it takes a number"),
        ("steps=1.5", "steps", "it takes a whole number"),
        ("opd.only_reward=perhaps", "opd.only_reward", "it takes true or false"),
        ("opd.type=xkl", "opd.type", "it takes one of off, megatron, sglang or null"),
        ("steps=null", "steps", "it takes a whole number"),
        ("rollout.stop_token_ids=3", "rollout.stop_token_ids", "it takes a list"),
        ("teacher.load=a=b", "teacher.load=a=b", "put quotes around"),
        ("~steps", "steps", "a key cannot be removed"),
        ("teachers.math.load=x", "teachers.math.load", "+teacher@teachers.math=resident"),
        ("name=???", "name", "it has no value"),
        ("hydra.jib.name=x", "hydra.jib", "Hydra cannot compose it"),
        ("seed=1,2", "seed", "Add -m"),
        ("teacher.model={huggingface: x}", "teacher.model", "Set teacher.model.KEY=VALUE"),
        ("teacher.load=demo:techer", "teacher.load", "Set teacher.load=demo:teacher or demo:student"),
        ("data.path=demo:teacher", "data.path", "Set data.path=demo:train or demo:heldout"),
    ],
)
def test_one_mistake(check: Any, argument: str, key: str, hint: str) -> None:
    assert not check(argument)
    assert len(check.problems) == 1, check.message
    assert check.keys == [key]
    assert hint in check.message


def test_all_mistakes_at_once(check: Any) -> None:
    assert not check("opd.kl_ceof=1", "+estimator.foo=2", "opd.type=xx", "estimator=grop", "a=b=c", "steps=many")
    assert set(check.keys) == {"opd.kl_ceof", "estimator.foo", "opd.type", "estimator", "a=b=c", "steps"}


def test_a_group_given_twice(check: Any) -> None:
    assert not check("opd=off", "opd=megatron")
    assert check.keys == ["opd"]


def test_the_last_value_of_a_key_holds(check: Any) -> None:
    assert check("seed=1", "seed=2"), check.message
    assert check.config.seed == 2


def test_unknown_key_in_an_experiment_of_the_user(check: Any, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nopd:\n  kl_ceof: 1\n")
    assert not check("-cd", str(tmp_path), "experiment=mine")
    assert check.keys == ["opd.kl_ceof"]


def test_the_same_checks_in_a_sweep(check: Any) -> None:
    assert not check("-m", "opd.kl_coef=0.5,abc", "stepz=1,2")
    assert sorted(check.keys) == ["opd.kl_coef", "stepz"]


def test_options_and_values_arrive(check: Any) -> None:
    assert check("estimator=dr_grpo", "opd_kl_coef=0.5", "rollout.stop_token_ids=[1,2]", "name='a b'"), check.message
    config = check.config
    assert config.estimator.aggregation is Aggregation.constant
    assert config.opd.kl_coef == 0.5
    assert config.opd.type is OpdType.megatron
    assert config.rollout.stop_token_ids == [1, 2]
    assert config.name == "a b"


def test_entries_of_dictionaries_need_no_ceremony(check: Any, model_folder: str) -> None:
    arguments = ["eval.datasets.math.path=x.jsonl", f"teacher.model.huggingface={model_folder}"]
    assert check(*arguments, "+teacher@teachers.math=resident", f"teachers.math.load={model_folder}"), check.message
    config = check.config
    assert set(config.eval.datasets) == {"heldout", "math"}
    assert config.teacher.model.huggingface == model_folder
    assert isinstance(config.teachers["math"], ResidentTeacher)
    assert config.teachers["math"].load == model_folder


def test_new_entries_of_plain_dictionaries(check: Any) -> None:
    assert check("data.chat_template_kwargs.enable_thinking=false"), check.message
    assert check.config.data.chat_template_kwargs == {"enable_thinking": False}
    assert check.overrides == ["++data.chat_template_kwargs.enable_thinking=false"]


def test_an_unknown_key_beside_an_entry_of_a_plain_dictionary(check: Any) -> None:
    assert not check("data.chat_template_kwargs.enable_thinking=false", "opd.kl_ceof=1")
    assert check.keys == ["opd.kl_ceof"]


def test_a_sweep_has_every_job(check: Any) -> None:
    assert check("-m", "opd_kl_coef=0.1,0.2", "estimator=grpo,none"), check.message
    assert [(config.opd.kl_coef, type(config.estimator).__name__) for config in check.configs] == [
        (0.1, "Grpo"),
        (0.1, "NoEstimator"),
        (0.2, "Grpo"),
        (0.2, "NoEstimator"),
    ]
