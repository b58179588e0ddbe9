"""Every message that a user can meet, through the command line; what the demo sets does not count as named."""

from pathlib import Path
from typing import Any

import pytest

SERVER = ("opd=sglang", "teacher=sglang_external", "teacher.url=http://host:1")


@pytest.fixture
def own(model_folder: str) -> list[str]:
    """A run without the demo, complete but for OPD."""
    return ["experiment=null", f"model.load={model_folder}", "data.path=prompts.jsonl"]


@pytest.mark.parametrize("arguments", [(), ("opd=off",), ("estimator=none",), ("opd.kl_coef=0",), ("estimator=rloo",)])
def test_the_demo_and_its_controls_need_nothing_else(check: Any, arguments: tuple[str, ...]) -> None:
    assert check(*arguments), check.message


def test_type_not_chosen(check: Any, own: list[str]) -> None:
    assert not check(*own)
    assert check.keys == ["opd.type"]
    assert "not chosen while OPD is on" in check.message
    for fix in ("opd=megatron", "teacher.load=DIR", "opd=sglang", "teacher.url=URL", "opd=off"):
        assert fix in check.message


def test_use_opd_does_not_choose_a_type(check: Any) -> None:
    assert not check("use_opd=true")
    assert check.keys == ["opd.type"]
    assert not check("--use-opd")


@pytest.mark.parametrize("choice", ["opd_type=megatron", "opd=megatron", "opd.type=megatron"])
def test_use_opd_with_a_type(check: Any, choice: str) -> None:
    assert check("use_opd=true", choice), check.message


def test_use_opd_with_a_type_in_an_experiment_of_the_user(check: Any, tmp_path: Path, model_folder: str) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /opd: megatron\n"
        f"model: {{load: {model_folder}}}\nteacher: {{load: {model_folder}}}\ndata: {{path: x.jsonl}}\n"
    )
    assert check("-cd", str(tmp_path), "experiment=mine", "use_opd=true"), check.message
    # ... where its keys count as named.
    assert not check("-cd", str(tmp_path), "experiment=mine", "opd=off")
    assert check.keys == ["teacher.load"]


def test_megatron_without_weights(check: Any, own: list[str]) -> None:
    assert not check(*own, "opd=megatron")
    assert check.keys == ["teacher.load"]
    assert "null with opd=megatron" in check.message
    assert "Set teacher.load=DIR" in check.message


def test_an_extra_teacher_without_weights(check: Any) -> None:
    assert not check("+teacher@teachers.math=resident")
    assert check.keys == ["teachers.math.load"]


@pytest.mark.parametrize("spelling", ["teacher.load", "opd_teacher_load"])
def test_sglang_with_weights(check: Any, spelling: str) -> None:
    assert not check(*SERVER, f"{spelling}=checkpoints/teacher")
    assert check.keys == ["teacher.load"]
    assert "'checkpoints/teacher' with opd=sglang" in check.message
    assert "Drop teacher.load" in check.message


def test_sglang_with_a_megatron_teacher_and_no_url(check: Any) -> None:
    assert not check("opd=sglang")
    assert set(check.keys) == {"teacher.url", "teacher"}
    assert "teacher=sglang_external" in check.message


def test_a_right_server_configuration(check: Any) -> None:
    assert check(*SERVER)


def test_a_managed_server_needs_weights_and_no_url(check: Any) -> None:
    managed = ("experiment=null", "opd=sglang", "teacher=sglang_managed")
    assert not check(*managed, "teacher.url=http://host:1")
    assert {"teacher.load", "teacher.url"} <= set(check.keys)


def test_server_with_megatron_type(check: Any) -> None:
    assert not check("opd=megatron", "teacher=sglang_external", "teacher.url=http://host:1")
    assert set(check.keys) == {"teacher", "teacher.url"}


def test_server_at_another_temperature(check: Any) -> None:
    assert not check(*SERVER, "rollout.temperature=0.7")
    assert check.keys == ["rollout.temperature"]
    assert "temperature 1" in check.message


@pytest.mark.parametrize("argument", ["teacher.load=x", "teacher.url=http://host:1"])
def test_a_teacher_while_opd_is_off(check: Any, argument: str) -> None:
    assert not check("opd=off", argument)
    assert check.keys == [argument.partition("=")[0]]
    assert "never be asked" in check.message


def test_missing_checkpoint_path(check: Any) -> None:
    assert not check("teacher.load=no/such/place")
    assert check.keys == ["teacher.load"]
    assert "no such folder" in check.message


def test_path_without_a_checkpoint(check: Any, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "notes.txt").write_text("nothing")
    assert not check(f"teacher.load={folder}", f"model.load={folder}")
    assert set(check.keys) == {"teacher.load", "model.load"}
    assert "holds no checkpoint" in check.message


SCRATCH = ("demo=null", "data.path=x", "model.load=null", "model.huggingface=x", "teacher.load=x")


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (("opd=off", "rollout.samples_per_prompt=1"), "rollout.samples_per_prompt"),
        (("opd=off", "reward=none"), "reward"),
        (("rollout.samples_per_prompt=1", "opd.kl_coef=0"), "rollout.samples_per_prompt"),
        (("opd=off", "estimator=none"), "estimator"),
        (("opd=off", "opd.only_reward=true"), "opd.only_reward"),
        (("estimator=none", "opd.kl_coef=0"), "opd.kl_coef"),
        (("opd.kl_coef=-1",), "opd.kl_coef"),
        (("rollout.temperature=0",), "rollout.temperature"),
        (("rollout.top_p=0",), "rollout.top_p"),
        (("rollout.prompts_per_step=0",), "rollout.prompts_per_step"),
        (("estimator=none", "rollout.filter.zero_std=drop"), "rollout.filter.zero_std"),
        (("opd.only_reward=true", "rollout.filter.zero_std=replace"), "rollout.filter.zero_std"),
        (("rollout.samples_per_prompt=1", "rollout.filter.zero_std=replace"), "rollout.filter.zero_std"),
        (("reward=none", "rollout.filter.zero_std=drop"), "rollout.filter.zero_std"),
        (("reward.scale=0", "rollout.filter.zero_std=drop"), "rollout.filter.zero_std"),
        (("rollout.filter.max_rounds=0",), "rollout.filter.max_rounds"),
        (("rollout.filter.zero_std=replace", "rollout.filter.max_rounds=1"), "rollout.filter.max_rounds"),
        (("checkpoint.keep=0",), "checkpoint.keep"),
        (("reference.kl_coef=0.1", "reference.estimator=k1"), "reference.estimator"),
        (("reference.kl_coef=0.1", "reference.apply=reward", "reference.estimator=k3"), "reference.estimator"),
        (("opd.apply=before_normalization",), "opd.apply"),
        (("opd.clip=0",), "opd.clip"),
        (("opd.clip=nan",), "opd.clip"),
        (("eval.datasets.heldout.weight=nan",), "eval.datasets.heldout.weight"),
        (("loss.correction=tis", "loss.correction_low=1.5"), "loss.correction_low"),
        (("loss.correction=icepop", "loss.correction_high=0.5"), "loss.correction_high"),
        (("reward.scale=0.4",), "eval.correct_above"),
        (("reward.scale=2", "reward.offset=1"), "eval.correct_above"),
        (("reward.scale=-1",), "reward.scale"),
        (("eval.samples_per_prompt=2",), "eval.samples_per_prompt"),
        (("eval.top_k=5",), "eval.top_k"),
        (("opd.schedule.final=0.1",), "opd.schedule.final"),
        (("opd.schedule.kind=constant", "opd.schedule.final=0.1"), "opd.schedule.final"),
        (("opd.schedule.kind=target_kl", "opd.schedule.steps=10"), "opd.schedule.steps"),
        (("opd.schedule.kind=linear", "opd.schedule.horizon=5"), "opd.schedule.horizon"),
        (("opd.weights.kind=importance", "opd.weights.fraction=0.5"), "opd.weights.fraction"),
        (("opd.weights.gamma=2",), "opd.weights.gamma"),
        (("opd.divergence.top_k=8",), "opd.divergence.top_k"),
        (("loss.correction_low=0.5",), "loss.correction_low"),
        (("reference.apply=reward",), "reference.apply"),
        (("reference.placement=swap",), "reference.placement"),
        (("rollout.filter.zero_std=drop", "rollout.filter.max_rounds=2"), "rollout.filter.max_rounds"),
        (("reward=composite", "+reward@reward.parts.a=exact", "rollout.filter.part=a"), "rollout.filter.part"),
        (("estimator=ppo", "critic.optimizer.decay_steps=9"), "critic.optimizer.decay_steps"),
        (("+teacher@teachers.default=resident", "teachers.default.load=demo:teacher"), "teachers.default"),
        (("+data@eval.datasets.both=mixture",), "eval.datasets.both"),
        (("task=sft", "task.batch_size=0"), "task.batch_size"),
        (("task=sft", "task.snapshot_accuracy=0.5", "reward=none"), "task.snapshot_accuracy"),
        (("reward.mark=''",), "reward.mark"),
        (("cluster=ray", "cluster.gpus_per_worker=inf"), "cluster.gpus_per_worker"),
        (("eval.correct_part=right",), "eval.correct_part"),
        (("rollout.filter.part=right",), "rollout.filter.part"),
        (("data.label_key=null",), "data.label_key"),
        (("eval.datasets.heldout.label_key=null",), "eval.datasets.heldout.label_key"),
        (("estimator.loss.eps_low=2",), "estimator.loss.eps_low"),
        (("loss.updates_per_rollout=0",), "loss.updates_per_rollout"),
        (("megatron.tensor_parallel=2",), "cluster"),
        (("cluster=ray", "megatron.tensor_parallel=3"), "megatron"),
        (("megatron.expert_parallel=2",), "cluster"),
        (("cluster=ray", "megatron.sequence_parallel=true"), "megatron.sequence_parallel"),
        (("cluster=ray", "megatron.pipeline_parallel=2", "megatron.pipeline_layers=[4]"), "megatron.pipeline_layers"),
        (
            ("cluster=ray", *SCRATCH, "megatron.pipeline_parallel=2", "megatron.pipeline_layers=[1,2]"),
            "megatron.pipeline_layers",
        ),
        (("cluster=ray", *SCRATCH, "megatron.expert_parallel=2"), "megatron.expert_parallel"),
        ((*SCRATCH, "model.architecture.experts.count=4"), "model.architecture.experts.count"),
        (
            ("cluster=ray", *SCRATCH, "model.architecture.family=qwen3_moe", "megatron.tensor_parallel=2"),
            "megatron.sequence_parallel",
        ),
        (("data.path=null",), "data.path"),
        (("eval.datasets.heldout.path=null",), "eval.datasets.heldout.path"),
        (("model.load=null",), "model.load"),
        (("reward=custom",), "reward.path"),
        (("reward=remote",), "reward.url"),
        (("reward=composite",), "reward.parts"),
        (("reward=composite", "+reward@reward.parts.mine=custom"), "reward.parts.mine.path"),
        (("data=mixture", "data.path=null"), "data.datasets"),
        (("data=mixture", "+data@data.datasets.one=file"), "data.datasets.one.path"),
        (
            ("demo=null", "data.path=x", "model.load=null", "model.huggingface=x", "opd=off"),
            "eval.datasets.heldout.path",
        ),
    ],
)
def test_refused(check: Any, arguments: tuple[str, ...], key: str) -> None:
    assert not check(*arguments)
    assert key in check.keys, check.message


@pytest.mark.parametrize(
    ("arguments", "key", "fix"),
    [
        (("teacher=dedicated",), "teacher", "cluster=ray"),
        (
            ("+teacher@teachers.maths=dedicated", "teachers.maths.load=demo:teacher"),
            "teachers",
            "all of them dedicated",
        ),
        (
            ("teacher=dedicated", "cluster=ray", "teacher.tensor_parallel=2"),
            "teacher.num_workers",
            "Set teacher.num_workers to a multiple of 2",
        ),
        (
            ("teacher=dedicated", "cluster=ray", "teacher.pack=true", "teacher.max_tokens_per_device=0"),
            "teacher.max_tokens_per_device",
            "8192",
        ),
        (("teacher=swap", "+model@teacher.model=base"), "teacher.model", "teacher=offload"),
        (("teacher=offload", "teacher.load=null"), "teacher.load", "teacher.load=DIR"),
    ],
)
def test_placements_refused(check: Any, arguments: tuple[str, ...], key: str, fix: str) -> None:
    assert not check(*arguments)
    assert key in check.keys, check.message
    assert fix in check.message


@pytest.mark.parametrize(
    "arguments",
    [
        ("teacher=offload",),
        ("teacher=swap",),
        ("teacher=dedicated", "cluster=ray", "teacher.num_workers=4", "teacher.tensor_parallel=2"),
        ("teacher=swap", "+teacher@teachers.maths=offload", "teachers.maths.load=demo:teacher"),
        ("teacher=dedicated", "cluster=inprocess", "opd=off"),
        ("reference.kl_coef=0.1", "reference.placement=swap"),
    ],
)
def test_placements_accepted(check: Any, arguments: tuple[str, ...]) -> None:
    assert check(*arguments), check.message


def test_a_run_made_tiny_may_have_too_few_samples_for_its_minibatches(check: Any) -> None:
    assert not check("loss.updates_per_rollout=300")
    assert check.keys == ["loss.updates_per_rollout"]
    assert check("loss.updates_per_rollout=16", "debug=two_steps"), check.message


def test_one_sample_per_prompt_is_fine_with_a_teacher(check: Any) -> None:
    assert check("rollout.samples_per_prompt=1"), check.message


@pytest.mark.parametrize(
    "arguments",
    [
        ("rollout.filter.zero_std=replace",),
        ("rollout.filter.zero_std=drop", "opd=off"),
        ("rollout.filter.mask_truncated=true", "estimator=none"),
    ],
)
def test_filters_accepted(check: Any, arguments: tuple[str, ...]) -> None:
    assert check(*arguments), check.message


@pytest.mark.parametrize(
    "arguments",
    [
        ("reward.scale=2", "reward.offset=-1"),
        ("reward.scale=0.4", "eval.correct_above=0.2"),
        ("reward=none", "eval.datasets.heldout.label_key=null", "data.label_key=null"),
        ("reward=length", "opd=off"),
        ("opd.kl_coef=0", "opd.schedule.kind=linear", "opd.schedule.final=1", "estimator=none"),
        ("reward=composite", "+reward@reward.parts.right=exact", "eval.correct_part=right"),
        (
            *("reward=composite", "+reward@reward.parts.right=exact"),
            *("rollout.filter.part=right", "rollout.filter.zero_std=drop"),
        ),
        ("reward=custom", "reward.path=math:sqrt", "eval.correct_part=style"),
        ("loss.correction=none", "loss.correction_low=1.5"),
        ("loss.correction_high=inf", "loss.correction=tis"),
        ("loss.correction_high=5", "rollout.mode=sync"),
        ("rollout.mode=one_step_off", "loss.correction_high=5"),
        ("opd.divergence.kind=sampled", "opd.divergence.top_k=4"),
        ("reference.kl_coef=0", "reference.apply=reward"),
        ("megatron.optimizer.min_lr=1e-5",),
        ("eval.temperature=1", "eval.top_p=0.9"),
    ],
)
def test_grading_accepted(check: Any, arguments: tuple[str, ...]) -> None:
    assert check(*arguments), check.message


def test_all_that_keeps_the_student_from_learning_is_named_with_its_fix(check: Any) -> None:
    assert not check("opd=off", "estimator=none", "reward=none")
    assert "estimator=none and reward=none with opd=off" in check.message
    assert "or estimator=grpo reward=exact" in check.message


def test_other_tasks_do_not_ask_for_a_teacher(check: Any, own: list[str]) -> None:
    assert check(*own, "task=sft"), check.message
    assert check("experiment=null", own[1], "task=evaluate"), check.message


def test_all_problems_together(check: Any) -> None:
    assert not check("experiment=null", "steps=-1", "rollout.temperature=0")
    assert set(check.keys) == {"opd.type", "data.path", "model.load", "steps", "rollout.temperature"}


def test_every_job_of_a_sweep_is_checked(check: Any) -> None:
    assert not check("-m", "rollout.temperature=1.0,0.0", "steps=1,-1")
    assert sorted(check.keys) == ["rollout.temperature", "steps"]
