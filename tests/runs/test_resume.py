"""A run that is killed, at any point, goes on to the same numbers."""

from pathlib import Path

import pytest

from tests.runs.runs import distil, kill_after, launch, start, steps, summary, world

STEPS = ("steps=6", "checkpoint.every=2", "eval.every=3", "opd.schedule.kind=target_kl")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def uninterrupted(small: Path) -> Path:
    output = small / "uninterrupted"
    process = start(small, output, *distil(small), *STEPS)
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed
    return output


@pytest.mark.parametrize("after", [1, 3, 4])
def test_kill_and_resume_equals_the_uninterrupted_run_bit_for_bit(
    small: Path, uninterrupted: Path, tmp_path: Path, after: int
) -> None:
    output = tmp_path / "killed"
    kill_after(small, output, after, *distil(small), *STEPS)
    assert launch(small, output, *distil(small), *STEPS, "resume=auto") == 0
    assert steps(output) == steps(uninterrupted)
    for key in ("evaluation", "reverse_kl", "steps"):
        assert summary(output)[key] == summary(uninterrupted)[key]


@pytest.mark.ray
def test_a_run_of_one_process_goes_on_with_two_tensor_parallel_workers_and_another_placement(
    small: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "moved"
    kill_after(small, output, 3, *distil(small), *STEPS)
    elsewhere = ("cluster=ray", "cluster.num_workers=2", "megatron.tensor_parallel=2", "teacher=offload")
    process = start(small, output, *distil(small), *STEPS, *elsewhere, "resume=auto")
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed
    ours, theirs = steps(output), steps(uninterrupted)
    assert ours[:2] == theirs[:2]
    for metric in ("train/loss", "train/grad_norm", "opd/reverse_kl", "opd/kl_coef"):
        expected = [line[metric] for line in theirs]
        assert [line[metric] for line in ours] == pytest.approx(expected, rel=1e-3, abs=1e-5), metric


def test_a_finished_run_is_not_continued(small: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(small, uninterrupted, *distil(small), *STEPS, "resume=auto") == 2
    assert "nothing to continue" in capsys.readouterr().err
