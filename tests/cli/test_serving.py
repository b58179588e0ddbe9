"""Command lines of `task=serve_teacher` and `task=serve`, and settings of servers that cannot work."""

from pathlib import Path
from typing import Any

import pytest

TEACHER = ("task=serve_teacher", "teacher=sglang_managed")
STUDENT = ("task=serve", "rollout=sglang")


@pytest.mark.parametrize("arguments", [TEACHER, STUDENT])
def test_the_demos_models_can_be_served(check: Any, arguments: tuple[str, ...]) -> None:
    assert check(*arguments), check.message


@pytest.mark.parametrize(("arguments", "key"), [(TEACHER, "teacher.load"), (STUDENT, "model.load")])
def test_serving_needs_a_model_and_nothing_else(
    check: Any, model_folder: str, arguments: tuple[str, ...], key: str
) -> None:
    assert check("experiment=null", *arguments, f"{key}={model_folder}"), check.message
    assert not check("experiment=null", *arguments)
    assert check.keys == [key]
    assert f"Set {key}=DIR" in check.message


@pytest.mark.parametrize(
    ("arguments", "key", "fix"),
    [
        (("task=serve_teacher",), "teacher", "teacher=sglang_managed"),
        (("task=serve",), "rollout", "rollout=sglang"),
        ((*STUDENT, "rollout.urls=[http://host:1]"), "rollout.urls", "rollout.urls=[]"),
        ((*TEACHER, "experiment=null", "teacher.load=demo:teacher"), "teacher.load", "experiment=arithmetic"),
        ((*TEACHER, "teacher.load=no/such/place"), "teacher.load", "Hugging Face folder"),
        ((*TEACHER, "teacher.launch.servers=0"), "teacher.launch.servers", "=1 or more"),
        (("rollout=sglang", "rollout.launch.max_restarts=-1"), "rollout.launch.max_restarts", "=0 or more"),
        (
            ("rollout=sglang", "rollout.launch.servers=2", "rollout.launch.devices=[0]"),
            "rollout.launch.devices",
            "Name 2 GPUs",
        ),
        (
            ("rollout=sglang", "rollout.release_memory=true", "rollout.mode=one_step_off"),
            "rollout.release_memory",
            "Set one of them back",
        ),
        (("rollout=sglang", "rollout.max_parity_gap=0"), "rollout.max_parity_gap", "null not to look"),
    ],
)
def test_refused(check: Any, arguments: tuple[str, ...], key: str, fix: str) -> None:
    assert not check(*arguments)
    assert check.keys == [key], check.message
    assert fix in check.message


def test_another_format_is_converted_first(check: Any, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "iter_0000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / ".metadata").write_text("")
    assert not check("experiment=null", *STUDENT, f"model.load={tmp_path / 'run'}")
    assert check.keys == ["model.load"]
    assert f"task=convert task.format=huggingface task.source={checkpoint}" in check.message


def test_a_runs_directory_stands_for_the_model_that_it_exported(check: Any, tmp_path: Path) -> None:
    exported = tmp_path / "run" / "model"
    exported.mkdir(parents=True)
    (exported / "config.json").write_text("{}")
    assert check("experiment=null", *STUDENT, f"model.load={tmp_path / 'run'}"), check.message
