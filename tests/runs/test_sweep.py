"""Sweeps of whole runs: several trials in one process, failures, and the same command again."""

import json
from pathlib import Path

import pytest
import ray
import torch

from opd_trainer.checkpoint import LATEST
from opd_trainer.cli.entry import main
from tests.runs.runs import ROOT, arguments, distil, launch, steps, summary, world

SWEPT = ("opd_kl_coef=0.25,1.0", "megatron.optimizer.eps=0.1")
"""With a large epsilon Adam does not undo a factor of the gradient."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("world"))


def sweep(world: Path, output: Path, *overrides: str) -> int:
    return main(ROOT / "conf", ["-m", *arguments(world, output, *distil(world), "checkpoint.every=1", *overrides)])


@pytest.fixture(scope="module")
def swept(small: Path) -> Path:
    output = small / "swept"
    assert sweep(small, output, *SWEPT) == 0
    return output


def test_trials_of_one_process_equal_runs_of_their_own(small: Path, swept: Path, tmp_path: Path) -> None:
    quarter, whole = steps(swept / "kl_coef-0.25"), steps(swept / "kl_coef-1.0")
    assert quarter != whole
    for coefficient, trial in ((0.25, quarter), (1.0, whole)):
        alone = tmp_path / str(coefficient)
        more = (f"opd.kl_coef={coefficient}", SWEPT[1])
        assert launch(small, alone, *distil(small), *more) == 0
        assert steps(alone) == trial


def test_nothing_global_is_left_behind(swept: Path) -> None:
    from megatron.core import parallel_state

    assert not torch.distributed.is_initialized()
    assert not parallel_state.is_initialized()


def test_the_sum(swept: Path) -> None:
    table = (swept / "table.md").read_text()
    assert "| 0.25 | 1 |" in table
    assert "| 1.0 | 1 |" in table
    assert (swept / "curves.png").is_file()


def test_the_same_command_goes_on_with_a_broken_trial_only(small: Path, swept: Path) -> None:
    broken, whole = swept / "kl_coef-0.25", swept / "kl_coef-1.0"
    wanted, untouched = steps(broken), (whole / "metrics.jsonl").stat().st_mtime_ns
    # As after kill -9 between the second and the third step.
    record = json.loads((broken / "run.json").read_text())
    (broken / "run.json").write_text(json.dumps(record | {"status": "running"}))
    (broken / "summary.json").unlink()
    (broken / "checkpoints" / LATEST).write_text("2")
    assert sweep(small, swept, *SWEPT) == 0
    assert steps(broken) == wanted
    assert summary(broken)["steps"] == 3
    assert (whole / "metrics.jsonl").stat().st_mtime_ns == untouched


def test_a_failed_trial_loses_no_other(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": 7}\n')
    good = small / "data" / "train.jsonl"
    assert sweep(small, tmp_path / "sweep", f"data.path={bad},{good}", "steps=1") == 2
    printed = capsys.readouterr()
    assert "1 of 2 trials failed" in printed.err
    table = (tmp_path / "sweep" / "table.md").read_text()
    assert "failed: DataError" in table
    finished = [path.parent.name for path in (tmp_path / "sweep").glob("*/summary.json")]
    assert len(finished) == 1
    assert finished[0].endswith("train.jsonl")


def test_a_trial_that_fails_half_way_leaves_nothing_to_the_next(
    small: Path, swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "diverging"
    more = ("opd_kl_coef=0.25", SWEPT[1], "megatron.optimizer.clip_grad=0", "megatron.optimizer.lr=1e30,1e-3")
    assert sweep(small, output, *more) == 1
    assert "TrainingDiverged" in capsys.readouterr().err
    record = json.loads((output / "lr-1e30" / "run.json").read_text())
    assert record["status"] == "failed"
    assert record["error"].startswith("TrainingDiverged")
    assert (output / "lr-1e30" / "metrics.jsonl").is_file()
    alone = tmp_path / "alone"
    more = (
        *distil(small),
        "opd.kl_coef=0.25",
        SWEPT[1],
        "megatron.optimizer.clip_grad=0",
        "megatron.optimizer.lr=1e-3",
    )
    assert launch(small, alone, *more) == 0
    assert steps(output / "lr-0.001") == steps(alone)


@pytest.mark.ray
def test_ray_is_closed_between_trials(small: Path, tmp_path: Path) -> None:
    output = tmp_path / "ray"
    more = ("cluster=ray", "cluster.num_workers=1", "cluster.num_cpus=2", "eval.teacher=false")
    assert sweep(small, output, "seed=0,1", "steps=1", *more) == 0
    assert not ray.is_initialized()
    assert len(list(output.glob("*/summary.json"))) == 2


def test_wandb_runs_of_a_sweep_share_a_group(small: Path, tmp_path: Path) -> None:
    output = tmp_path / "grouped"
    assert sweep(small, output, "seed=0,1", "steps=1", "tracking=wandb_offline") == 0
    files = sorted(output.glob("*/wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert all(b"grouped" in file.read_bytes() for file in files)


def test_summarize_reads_files_only(small: Path, swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (swept / "table.md").unlink()
    assert main(ROOT / "conf", ["task=summarize", f"sweep_dir={swept}", f"output_dir={small / 'summary'}"]) == 0
    assert "opd.kl_coef" in capsys.readouterr().out
    assert (swept / "table.md").is_file()
