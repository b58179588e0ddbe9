"""Whole runs with server rollouts and a server teacher, against the fake server that ships with the project."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from opd_trainer.cli.entry import main
from opd_trainer.opd.overlap import OVERLAP_NAMES
from opd_trainer.sglang.config import LaunchConfig
from opd_trainer.sglang.faults import Fault
from opd_trainer.sglang.fleet import Fleet
from tests.runs.outages import PROMPTS, SIBLINGS, complete, inject, logged, rollout_server_dies, teacher_is_away, until
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


def test_a_run_meets_every_fault(small: Path, tmp_path: Path) -> None:
    """What a teacher's server does wrong costs its sample the term; what a rollout server does costs another try."""
    number, output = 30, tmp_path / "run"
    fleets = {
        name: Fleet.launch(name, str(small / name), LaunchConfig(module=FAKE), tmp_path)
        for name in ("teacher", "student")
    }
    (teacher,), (student,) = (fleet.urls for fleet in fleets.values())
    served = ("opd=sglang", "teacher=sglang_external", f"teacher.url={teacher}", "teacher.check_trained=false")
    patient = ("teacher.attempts=1", "teacher.concurrency=1", "teacher.timeout_s=15", "teacher.max_failed_fraction=1.0")
    mine = (*served, *patient, "rollout=sglang", f"rollout.urls=[{student}]", f"steps={number}")
    rest = ("eval.every=0", "eval.reverse_kl_prompts=0", "eval.teacher=false", "tracking.samples_per_step=1000")
    again = (Fault.error_500, Fault.reset, Fault.cut)
    # Never three in a row that look as if the server were down: it would be left alone for a while.
    unanswered = (Fault.delay, *again, Fault.drip)
    wrong = [fault for fault in Fault if fault not in unanswered]
    sequence = [fault for pair in zip(unanswered, wrong, strict=False) for fault in pair] + wrong[len(unanswered) :]
    try:
        for fleet in fleets.values():
            asyncio.run(fleet.start())
        process = start(small, output, *mine, *rest)
        try:
            until(process, lambda: len(logged(output)) >= 1, 900)
            for fault in sequence:
                inject(teacher, fault, 2.0 if fault is Fault.drip else 40.0)
            for fault in again:
                inject(student, fault, 0.0)
            printed, _ = process.communicate(timeout=900)
            assert process.returncode == 0, printed
        finally:
            process.kill()
            process.communicate()
    finally:
        for fleet in fleets.values():
            asyncio.run(fleet.close())
    complete(output, number)
    lines = logged(output)
    counts = Counter[str]()
    for line in lines:
        counts.update({key.rpartition("/")[2]: int(n) for key, n in line.items() if key.startswith("teacher/status/")})
    failed = {"timeout": 2, "http_error": 3, "refused": 1, "misaligned": 3, "nonfinite": 2}
    assert sum(failed.values()) == len(sequence) == len(Fault)
    assert counts == {**failed, "ok": number * PROMPTS * SIBLINGS - len(Fault)}
    assert sum(line["rollout/retries"] for line in lines) == len(again)
