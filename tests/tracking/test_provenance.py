import subprocess
from pathlib import Path

import opd_trainer
from opd_trainer.tracking.provenance import git_state, package_versions


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_and_changes_of_the_checkout_that_tracks_the_file(tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_text("x = 1\n")
    git(tmp_path, "init", "-q")
    assert git_state(file) is None  # inside a checkout that does not know it, like an installed package
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(file) == {"commit": commit, "dirty": False}
    (tmp_path / "notes.txt").write_text("untracked files do not change what runs")
    assert git_state(file) == {"commit": commit, "dirty": False}
    file.write_text("x = 2\n")
    assert git_state(file) == {"commit": commit, "dirty": True}


def test_no_checkout(tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_text("")
    assert git_state(file) is None


def test_versions_are_those_that_are_installed() -> None:
    import torch

    versions = package_versions()
    assert versions["torch"] == torch.__version__
    assert versions["opd_trainer"] == opd_trainer.__version__
    assert {"python", "megatron-core", "ray", "hydra-core", "transformers"} <= set(versions)
