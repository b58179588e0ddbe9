"""From a command line to the trials of a sweep, their directories and their exit code."""

import json
from pathlib import Path
from typing import Any

import pytest

from opd_trainer.config import Config
from opd_trainer.errors import DataError
from opd_trainer.run_record import RunStatus, write_record
from opd_trainer.sweep.record import Sweep


def finishing(launch: Any, *failing: int) -> Any:
    """A launcher whose runs keep their record; those of some seeds fail."""
    original = launch.run

    def run(config: Config, directory: Path) -> float:
        try:
            if config.seed in failing:
                raise DataError(f"bad file of seed {config.seed}")
        except DataError as error:
            write_record(directory, config, RunStatus.failed, error)
            original(config, directory)
            raise
        write_record(directory, config, RunStatus.finished)
        (directory / "summary.json").write_text(
            json.dumps(
                {
                    "evaluation": {"before": {}, "after": {}, "teacher": {}},
                    "reverse_kl": {"first": None, "last": None},
                    "steps": 0,
                    "wall_s": {"total": 1.0},
                }
            )
        )
        return original(config, directory)

    launch.run = run
    return launch


def ran(launch: Any) -> list[str]:
    return [directory.name for _, directory in launch.runs]


def test_every_spelling_names_the_same_sweep(check: Any) -> None:
    found = set()
    for argv in (
        ("opd.kl_coef=0.25,0.5", "seed=0,1"),
        ("seed=1,0", "opd_kl_coef=0.5,0.25"),
        ("--opd-kl-coef", "0.25,0.5", "seed=range(0,2)"),
    ):
        assert check("-m", *argv), check.message
        found.add(check.plan.sweep.directory)
        assert len(check.plan.sweep.trials) == 4
    assert len(found) == 1
    assert check("-m", "opd.kl_coef=0.25,0.5", "seed=0,2"), check.message
    assert check.plan.sweep.directory not in found


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("opd_kl_coef=0.25,0.5", "opd.kl_coef"),
        ("advantage_estimator=grpo,rloo", "estimator"),
        ("opd_only_reward=true,false", "opd.only_reward"),
        ("opd_type=off,megatron", "opd"),
        ("opd_teacher_timeout_s=3,4", "teacher.timeout_s"),
        ("opd_log_prob_top_k=0,4", "opd.log_prob_top_k"),
    ],
)
def test_aliases_sweep(check: Any, theirs: str, ours: str) -> None:
    assert check("-m", theirs), check.message
    assert [list(trial.values) for trial in check.plan.sweep.trials] == [[ours], [ours]]


def test_directories_and_the_same_command_again(launch: Any, tmp_path: Path) -> None:
    launch = finishing(launch, 1)
    assert launch("-m", "seed=0,1", "opd.kl_coef=0.5,1.0") == 2
    assert ran(launch) == [f"seed-{seed}_kl_coef-{value}" for seed in (0, 1) for value in (0.5, 1.0)]
    directory = launch.runs[0][1].parent
    assert directory.parent == tmp_path / "outputs" / "arithmetic"
    assert launch.err.count("bad file of seed 1") == 2
    assert "2 of 4 trials failed" in launch.err
    assert "4 of 4 trials to run" in launch.out
    assert "failed: DataError: bad file of seed 1" in launch.out
    assert launch("-m", "seed=0,1", "opd.kl_coef=0.5,1.0") == 2
    assert ran(launch) == ["seed-1_kl_coef-0.5", "seed-1_kl_coef-1.0"]
    assert {where.parent for _, where in launch.runs} == {directory}


def test_a_finished_sweep_runs_nothing(launch: Any) -> None:
    launch = finishing(launch)
    assert launch("-m", "seed=0,1", "output_dir='my sweep'") == 0, launch.err
    assert launch("-m", "seed=0,1", "output_dir='my sweep'") == 0, launch.err
    assert launch.runs == []
    assert "0 of 2 trials to run" in launch.out
    assert "Sweep: mean" in launch.out
    # More seeds join it.
    assert launch("-m", "seed=0,1,2", "output_dir='my sweep'") == 0, launch.err
    assert ran(launch) == ["seed-2"]
    sweep = Sweep.read(Path("my sweep"))
    assert sweep is not None
    assert len(sweep.trials) == 3
    assert not launch("task=summarize", "sweep_dir='my sweep'")


def test_trials_differ(check: Any) -> None:
    assert not check("-m", "tracking.plot_every=1,2")
    assert "compute the same thing" in check.message


def test_what_a_sweep_cannot_do(check: Any) -> None:
    assert not check("-m", "opd.kl_coef=interval(0,1)", "hydra/sweeper=basic")
    assert check.keys == ["opd.kl_coef", "hydra/sweeper"]


def test_never_resume_a_sweep_that_is_there(check: Any) -> None:
    assert check("-m", "seed=0,1", "output_dir=here"), check.message
    check.plan.sweep.write()
    assert check("-m", "seed=0,1", "output_dir=here", "resume=auto"), check.message
    assert not check("-m", "seed=0,1", "output_dir=here", "resume=never")
    assert check.keys == ["resume"]


def test_wandb_groups_the_trials(launch: Any) -> None:
    assert launch("-m", "seed=0,1", "output_dir='my sweep'") == 0, launch.err
    assert {config.tracking.wandb_group for config, _ in launch.runs} == {"my-sweep"}
    assert launch("-m", "seed=0,1", "output_dir=other", "tracking.wandb_group=mine") == 0, launch.err
    assert {config.tracking.wandb_group for config, _ in launch.runs} == {"mine"}


def test_a_multirun_of_one_job_is_a_run(launch: Any, tmp_path: Path) -> None:
    assert launch("-m", "seed=3", "output_dir=here") == 0, launch.err
    assert launch.directory == tmp_path / "here"
    assert launch("-m", "seed=3") == 0, launch.err
    assert launch.directory.parent == tmp_path / "outputs" / "arithmetic"
    assert not (launch.directory / "sweep.json").exists()


def test_options_and_new_keys_can_be_swept(launch: Any, model_folder: str) -> None:
    more = ("data.chat_template_kwargs.a=1,2", "experiment=null,arithmetic", "estimator=grpo,none")
    given = (f"model.load={model_folder}", "data.path=x", "opd=off", "estimator=grpo")
    assert launch("-m", *given[:3], *more[:2]) == 0, launch.err
    assert [(config.demo is None, config.data.chat_template_kwargs) for config, _ in launch.runs] == [
        (True, {"a": 1}),
        (False, {"a": 1}),
        (True, {"a": 2}),
        (False, {"a": 2}),
    ]


def test_a_summary_needs_a_sweep(check: Any, tmp_path: Path) -> None:
    assert not check("task=summarize")
    assert check.keys == ["task.sweep_dir"]
    assert not check("task=summarize", f"sweep_dir={tmp_path}")
    assert "sweep.json" in check.message
