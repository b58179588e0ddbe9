"""A whole run with the teacher in each of its places: the same numbers."""

from pathlib import Path

import pytest

from tests.runs.runs import distil, launch, start, steps, summary, world

DEDICATED = ("teacher=dedicated", "teacher.num_workers=2", "teacher.tensor_parallel=2", "cluster=ray")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def resident(small: Path) -> Path:
    assert launch(small, small / "resident", *distil(small), "teacher=resident") == 0
    return small / "resident"


@pytest.mark.parametrize("placement", ["offload", "swap"])
def test_a_run_in_one_process_is_the_same_bit_for_bit(placement: str, small: Path, resident: Path) -> None:
    output = small / placement
    assert launch(small, output, *distil(small), f"teacher={placement}") == 0
    assert steps(output) == steps(resident)
    for key in ("evaluation", "reverse_kl"):
        assert summary(output)[key] == summary(resident)[key]


def test_a_dedicated_teacher_in_a_layout_of_its_own_is_the_same_but_for_rounding(small: Path, resident: Path) -> None:
    output = small / "dedicated"
    cluster = ("cluster.num_workers=1", "cluster.cpus_per_worker=0.25")
    process = start(small, output, *distil(small), *DEDICATED, *cluster)
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed
    for ours, theirs in zip(steps(output), steps(resident), strict=True):
        for name in ("train/loss", "train/grad_norm", "opd/reverse_kl", "opd/teacher_log_prob", "rollout/log_prob"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    assert set(summary(output)["evaluation"]) == {"before", "after", "teacher"}
    assert summary(output)["evaluation"]["teacher"] == summary(resident)["evaluation"]["teacher"]
    assert summary(output)["reverse_kl"]["first"] == pytest.approx(summary(resident)["reverse_kl"]["first"], rel=1e-4)


def test_a_swapped_reference_is_the_same_bit_for_bit(small: Path) -> None:
    penalty = ("reference.kl_coef=0.1", f"reference.load={small / 'teacher'}")
    for placement in ("resident", "offload", "swap"):
        output = small / f"reference_{placement}"
        assert launch(small, output, *distil(small), *penalty, f"reference.placement={placement}") == 0
        assert steps(output) == steps(small / "reference_resident")


def test_two_teachers_in_one_run(small: Path) -> None:
    teachers = (f"+teachers.maths.load={small / 'student'}", "+teacher@teachers.maths=offload", "teacher=swap")
    assert launch(small, small / "two", *distil(small), *teachers, "steps=1") == 0


def test_a_teacher_that_is_the_student_is_a_loud_warning(small: Path, tmp_path: Path) -> None:
    told = {}
    for name in ("student", "teacher"):
        process = start(small, tmp_path / name, *distil(small, name), "steps=2")
        told[name], _ = process.communicate(timeout=900)
        assert process.returncode == 0, told[name]
    assert told["student"].count("THE TEACHER CANNOT BE TOLD FROM THE STUDENT") == 1
    assert "CANNOT BE TOLD" not in told["teacher"]
