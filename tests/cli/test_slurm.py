"""Command lines that submit, or look as if they did."""

from pathlib import Path
from typing import Any

import pytest


def given(check: Any, key: str) -> list[str]:
    """The values of an override that Hydra is given."""
    return [text.partition("=")[2] for text in check.overrides if text.startswith(f"{key}=")]


def test_a_single_run_is_submitted_without_m(check: Any) -> None:
    assert check("cluster=slurm"), check.message
    assert given(check, "hydra.mode") == ["MULTIRUN"]
    assert given(check, "hydra.sweep.subdir") == ["."]
    assert check("cluster=slurm", "output_dir=runs/mine"), check.message
    assert given(check, "hydra.sweep.dir") == ["'runs/mine'"]


def test_a_sweep_keeps_its_mode(check: Any) -> None:
    assert check("-m", "cluster=slurm", "seed=0,1"), check.message
    assert given(check, "hydra.mode") == []


def test_a_sweep_is_the_same_whoever_waits_for_it(check: Any) -> None:
    sweeps = []
    for arguments in (["cluster.wait=false"], ["cluster.max_restarts=9"], ["cluster.nodes=2"]):
        assert check("-m", "cluster=slurm", "seed=0,1", *arguments), check.message
        sweeps += given(check, "hydra.sweep.dir")
    assert sweeps[0] == sweeps[1] != sweeps[2]


@pytest.mark.parametrize("task", ["preflight", "doctor"])
def test_what_only_looks_stays_here(check: Any, task: str) -> None:
    assert check("cluster=slurm", f"task={task}"), check.message
    assert given(check, "hydra.mode") == []


@pytest.mark.parametrize("multirun", [[], ["-m"]])
def test_the_stock_launcher_is_refused(check: Any, multirun: list[str]) -> None:
    assert not check(*multirun, "hydra/launcher=submitit_slurm")
    assert check.keys == ["hydra/launcher"]
    assert "a failed job looks finished" in check.message
    assert not check(*multirun, "cluster=slurm", "hydra/launcher=submitit_slurm")


def test_ours_without_the_cluster_is_refused(check: Any) -> None:
    assert not check("-m", "hydra/launcher=slurm", "seed=0,1")
    assert "Set cluster=slurm" in check.message


def test_settings_of_a_site(check: Any, tmp_path: Path) -> None:
    assert check("cluster=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.srun_args=['--mpi=none']")
    assert not check("cluster=slurm", "hydra.launcher.partiton=gpu")
    assert "partiton" in check.message
    assert not check("cluster=slurm", "hydra.launcher.timeout_min=soon")
    profile = tmp_path / "mine" / "hydra" / "launcher" / "site.yaml"
    profile.parent.mkdir(parents=True)
    profile.write_text("defaults: [slurm, _self_]\npartition: gpu\nsetup: ['module load cuda']\n")
    folder = f"--config-dir={tmp_path / 'mine'}"
    assert check("cluster=slurm", "hydra/launcher=site", folder), check.message
    profile.write_text("defaults: [slurm, _self_]\nqueue: gpu\n")
    assert not check("cluster=slurm", "hydra/launcher=site", folder)
    assert "queue" in check.message


def test_a_failed_submission_explains_itself(launch: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch("cluster=slurm", "cluster.cpus_per_node=4") == 2
    assert launch.runs == []
    assert "Run it where sbatch works, a login node" in launch.err
    assert "Traceback" not in launch.err


def test_the_nodes_must_hold_the_workers(launch: Any) -> None:
    assert launch("cluster=slurm", "cluster.nodes=2", "cluster.gpus_per_node=1", "cluster.num_workers=4") == 2
    assert "4 training workers of 1 GPU" in launch.err
    assert "there are 2 on the 2 nodes together" in launch.err


def test_the_nodes_must_hold_the_workers_of_every_trial(launch: Any) -> None:
    assert launch("-m", "cluster=slurm", "cluster.gpus_per_node=1", "cluster.num_workers=1,4") == 2
    assert "4 training workers of 1 GPU" in launch.err
    assert "there are 1 on the node" in launch.err


def test_time_to_go_back_into_the_queue(launch: Any) -> None:
    assert launch("cluster=slurm", "cluster.grace_s=300") == 2
    assert "hydra.launcher.signal_delay_s higher" in launch.err
