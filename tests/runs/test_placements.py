"""A whole run with the teacher in each of its places: the same numbers."""

from dataclasses import replace
from pathlib import Path

import pytest

from opd_trainer.demo import arithmetic
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.families.registry import architecture_from_config, architecture_from_hf
from opd_trainer.model.config import Family
from opd_trainer.model.folder import load_config
from tests.gloo import run_gloo
from tests.megatron import foreign
from tests.megatron.models import hf_model
from tests.runs.runs import SHAPE, distil, launch, start, steps, summary, world

DEDICATED = ("teacher=dedicated", "teacher.num_workers=2", "teacher.tensor_parallel=2", "cluster=ray")
CLUSTER = ("cluster.num_workers=1", "cluster.cpus_per_worker=0.25")
ROUNDED = ("train/loss", "train/grad_norm", "opd/reverse_kl", "opd/teacher_log_prob", "rollout/log_prob")
"""Metrics that another layout may round differently."""


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


def dedicated(small: Path, output: Path, *overrides: str) -> None:
    """A run with the teacher on two tensor-parallel workers of its own."""
    process = start(small, output, *overrides, *DEDICATED, *CLUSTER)
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed


def same_but_for_rounding(output: Path, other: Path) -> None:
    for ours, theirs in zip(steps(output), steps(other), strict=True):
        for name in ROUNDED:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


@pytest.mark.ray
def test_a_dedicated_teacher_in_a_layout_of_its_own_is_the_same_but_for_rounding(small: Path, resident: Path) -> None:
    output = small / "dedicated"
    dedicated(small, output, *distil(small))
    same_but_for_rounding(output, resident)
    assert set(summary(output)["evaluation"]) == {"before", "after", "teacher"}
    assert summary(output)["evaluation"]["teacher"] == summary(resident)["evaluation"]["teacher"]
    assert summary(output)["reverse_kl"]["first"] == pytest.approx(summary(resident)["reverse_kl"]["first"], rel=1e-4)


@pytest.mark.ray
def test_a_teacher_of_another_architecture_is_the_same_in_every_place(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another family, width and depth, with more rows in its output head than there are words; each number of rows
    is padded by another one over the two workers of its own."""
    shape = replace(SHAPE, family=Family.llama, hidden_size=48, num_layers=3, tie_embeddings=False)
    architecture = architecture_from_config(shape, len(arithmetic.VOCABULARY) + 43)
    hf_model(architecture, 3).save_pretrained(small / "another")
    arithmetic.save_tokenizer(small / "another")
    teacher = distil(small, "another")
    for placement in ("resident", "offload"):
        own = (f"teacher={placement}", "+model@teacher.model=base")
        assert launch(small, small / f"another_{placement}", *teacher, *own) == 0
    assert steps(small / "another_offload") == steps(small / "another_resident")
    dedicated(small, small / "another_dedicated", *teacher, "+model@teacher.model=base")
    same_but_for_rounding(small / "another_dedicated", small / "another_resident")
    capsys.readouterr()
    assert launch(small, small / "another_swap", *teacher, "teacher=swap") == 2
    assert "the teacher does not have the student's shape" in capsys.readouterr().err


def test_a_step_of_megatron_lms_checkpoints_is_the_teacher_that_it_was_made_from(small: Path, resident: Path) -> None:
    """Rank files of two tensor-parallel ranks in each of two pipeline stages, the vocabulary padded."""
    checkpoints = small / "megatron"
    settings = MegatronConfig(tensor_parallel=2, pipeline_parallel=2, timeout_s=300)
    for step, model in ((100, "teacher"), (200, "student")):
        rows = 64
        foreign.pad_vocabulary(small / model, small / f"padded_{model}", rows)
        architecture = replace(architecture_from_hf(load_config(small / model)), vocab_size=rows)
        target = checkpoints / f"iter_{step:07d}"
        job = foreign.Job(small / f"padded_{model}", target, architecture, settings)
        run_gloo(foreign.save_ranks, 4, job)
    (checkpoints / foreign.MARKER).write_text("200")
    by_flags = ("opd_type=megatron", f"opd_teacher_load={checkpoints}", "opd_teacher_ckpt_step=100")
    by_path = ("opd=megatron", f"teacher.load={checkpoints / 'iter_0000100'}")
    for name, overrides in (("flags", by_flags), ("path", by_path)):
        assert launch(small, small / name, *overrides) == 0
        assert steps(small / name) == steps(resident)
    # The marker names the later one, which is the student itself.
    latest = ("opd=megatron", f"teacher.load={checkpoints}", "steps=1")
    assert launch(small, small / "latest", *latest) == 0
    assert summary(small / "latest")["reverse_kl"]["first"] == pytest.approx(0, abs=1e-6)


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
