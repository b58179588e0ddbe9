"""Whole runs with server rollouts and a server teacher, against the fake server that ships with the project."""

from pathlib import Path

import pytest

from opd_trainer.cli.entry import main
from opd_trainer.opd.overlap import OVERLAP_NAMES
from opd_trainer.sglang.config import LaunchConfig
from tests.runs.outages import rollout_server_dies, teacher_is_away
from tests.runs.runs import ROOT, column, distil, launch, start, steps, world

FAKE = "opd_trainer.sglang.fake"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("world"))


def test_a_server_teacher_gives_the_numbers_of_a_resident_one(small: Path) -> None:
    candidates = "opd.log_prob_top_k=4"
    assert launch(small, small / "resident", *distil(small), candidates, "steps=2") == 0
    served = (
        "opd=sglang",
        "teacher=sglang_managed",
        f"teacher.load={small / 'teacher'}",
        "teacher.check_trained=false",
    )
    assert launch(small, small / "served", *served, f"teacher.launch.module={FAKE}", candidates, "steps=2") == 0
    for metric in ("train/loss", "train/grad_norm", "opd/reverse_kl", "opd/teacher_log_prob"):
        ours, theirs = list(column(small / "resident", metric)), list(column(small / "served", metric))
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-5), metric
    # Inline, the teacher's candidates meet the trainer's; from a server, they meet those of the embedded engine.
    for metric in OVERLAP_NAMES:
        ours, theirs = list(column(small / "resident", metric)), list(column(small / "served", metric))
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-3), metric
        assert 0 < ours[0] <= 1
    assert all(line["teacher/failed_fraction"] == 0 for line in steps(small / "served"))


def test_rollouts_from_servers_follow_the_student(small: Path) -> None:
    rollout = ("rollout=sglang", f"rollout.launch.module={FAKE}", "steps=2", "eval.teacher=false")
    process = start(small, small / "rollouts", *distil(small), *rollout)
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed
    # New weights every step: a server that kept the old ones would disagree from the second step on.
    assert all(gap < 1e-4 for gap in column(small / "rollouts", "train/rollout_log_prob_diff"))


def test_a_megatron_checkpoint_is_served_from_its_shape(small: Path, tmp_path: Path) -> None:
    """SGLang does not read torch_dist: the server starts without weights, and gets the student's."""
    source = ("task=convert", f"task.source={small / 'student'}", f"task.target={tmp_path / 'megatron'}")
    assert main(ROOT / "conf", ["experiment=null", *source, f"output_dir={tmp_path / 'convert'}"]) == 0
    rollout = ("rollout=sglang", f"rollout.launch.module={FAKE}", "rollout.release_memory=true", "eval.teacher=false")
    assert (
        launch(small, tmp_path / "run", *distil(small), f"model.load={tmp_path / 'megatron'}", *rollout, "steps=2") == 0
    )
    assert all(gap < 1e-4 for gap in column(tmp_path / "run", "train/rollout_log_prob_diff"))


def test_a_rollout_server_dies_in_the_middle_of_a_run(small: Path) -> None:
    servers = [f"{owner}.launch.module={FAKE}" for owner in ("rollout", "teacher")]
    teacher = [
        "opd=sglang",
        "teacher=sglang_managed",
        f"teacher.load={small / 'teacher'}",
        "teacher.check_trained=false",
    ]
    rollout_server_dies(small, small / "rollout_dies", [*teacher, *servers], limit_s=900)


def test_the_teacher_is_away_for_a_part_of_a_run(small: Path) -> None:
    teacher_is_away(small, small / "teacher_away", LaunchConfig(module=FAKE), [], limit_s=900)
