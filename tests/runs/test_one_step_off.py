"""Whole runs whose rollouts overlap the updates: staleness, correction, and an exact resume after a kill."""

import json
import math
from pathlib import Path

import pytest

from tests.runs.runs import column, distil, kill_after, launch, start, steps, summary, world

MODE = ("rollout.mode=one_step_off", "steps=6", "checkpoint.every=2", "eval.every=3")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def uninterrupted(small: Path) -> Path:
    output = small / "uninterrupted"
    assert launch(small, output, *distil(small), *MODE) == 0
    return output


def test_samples_are_one_version_old(uninterrupted: Path) -> None:
    assert list(column(uninterrupted, "rollout/staleness")) == [0, 1, 1, 1, 1, 1]
    shown = [json.loads(line) for line in (uninterrupted / "samples.jsonl").read_text().splitlines()]
    assert {(row["step"], row["version"]) for row in shown} == {(0, 0), (1, 0), (2, 1), (3, 2), (4, 3), (5, 4)}
    # The engine's log-probs are of other weights than the student's: what the correction is for.
    gaps = list(column(uninterrupted, "train/rollout_log_prob_diff"))
    assert gaps[0] < 1e-5
    assert all(gap > 1e-3 for gap in gaps[1:])
    assert all(math.isfinite(loss) for loss in column(uninterrupted, "train/loss"))
    weights = list(column(uninterrupted, "train/correction_weight"))
    assert weights[0] == pytest.approx(1, abs=1e-4)
    assert all(0 < weight < 2 and weight != pytest.approx(1, abs=1e-6) for weight in weights[1:])


def test_a_step_that_no_step_precedes_is_that_of_a_synchronous_run(small: Path, uninterrupted: Path) -> None:
    output = small / "sync"
    assert launch(small, output, *distil(small), "steps=6", "loss.correction=tis") == 0
    assert list(column(output, "rollout/staleness")) == [0] * 6
    first, theirs = steps(uninterrupted)[0], steps(output)[0]
    assert {key: first[key] for key in theirs} == theirs
    assert steps(uninterrupted)[2]["rollout/log_prob"] != steps(output)[2]["rollout/log_prob"]


def test_correction_is_on_unless_it_is_switched_off(small: Path, uninterrupted: Path) -> None:
    output = small / "uncorrected"
    assert launch(small, output, *distil(small), *MODE, "loss.correction=none") == 0
    assert "train/correction_weight" not in steps(output)[0]
    # The first samples are on-policy: weights are 1 but for what engine and trainer round differently.
    assert steps(output)[0]["train/loss"] == pytest.approx(steps(uninterrupted)[0]["train/loss"], rel=1e-5)
    assert steps(output)[1]["train/loss"] != steps(uninterrupted)[1]["train/loss"]


@pytest.mark.parametrize("after", [1, 3, 4])
def test_kill_and_resume_equals_the_uninterrupted_run_bit_for_bit(
    small: Path, uninterrupted: Path, tmp_path: Path, after: int
) -> None:
    output = tmp_path / "killed"
    kill_after(small, output, after, *distil(small), *MODE)
    assert launch(small, output, *distil(small), *MODE, "resume=auto") == 0
    assert steps(output) == steps(uninterrupted)
    for key in ("evaluation", "reverse_kl", "steps"):
        assert summary(output)[key] == summary(uninterrupted)[key]


@pytest.mark.ray
def test_workers_on_ray_sample_and_learn_the_same(small: Path, uninterrupted: Path) -> None:
    output = small / "ray"
    more = ("cluster=ray", "cluster.num_workers=1", "cluster.num_cpus=2")
    assert launch(small, output, *distil(small), *MODE, *more) == 0
    assert list(column(output, "rollout/staleness")) == [0, 1, 1, 1, 1, 1]
    for name in ("train/loss", "rollout/log_prob", "opd/reverse_kl"):
        assert list(column(output, name)) == pytest.approx(list(column(uninterrupted, name)), rel=1e-4, abs=1e-6)


def test_servers_generate_during_the_update(small: Path, uninterrupted: Path) -> None:
    output = small / "served"
    servers = ("rollout=sglang", "rollout.launch.module=opd_trainer.sglang.fake", "eval.teacher=false")
    process = start(small, output, *distil(small), *MODE, *servers)
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed
    assert list(column(output, "rollout/staleness")) == [0, 1, 1, 1, 1, 1]
    gaps = list(column(output, "train/rollout_log_prob_diff"))
    assert gaps[0] < 1e-4
    assert all(gap > 1e-3 for gap in gaps[1:])


def test_what_makes_no_sense_is_refused(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ("opd.student_log_prob=rollout", "loss.correction_high=0.5", "steps=1")
    assert launch(small, tmp_path, *distil(small), *MODE[:1], *wrong) == 2
    message = capsys.readouterr().err
    for key in ("opd.student_log_prob", "loss.correction_high", "rollout.mode"):
        assert f". {key}:" in message
