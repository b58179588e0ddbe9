import subprocess
from pathlib import Path
from typing import Any

import pytest

from opd_trainer.doctor import machine
from opd_trainer.doctor.machine import ask_slurm, examine, free_space, memory_limit
from opd_trainer.doctor.wandb_key import wandb_key


def test_this_machine(tmp_path: Path) -> None:
    found = examine([tmp_path / "not" / "there"])
    assert found.cpus >= 1
    assert 0 < found.memory_free <= found.memory_total
    assert found.disks[str(tmp_path / "not" / "there")] > 0
    assert set(found.commands) == set(machine.COMMANDS)
    assert not (tmp_path / "not").exists()


def test_the_limit_of_a_container(tmp_path: Path) -> None:
    limited, unlimited = tmp_path / "limited", tmp_path / "unlimited"
    limited.write_text("1073741824\n")
    unlimited.write_text("max\n")
    assert memory_limit([tmp_path / "missing", limited]) == 2**30
    assert memory_limit([unlimited, limited]) is None
    assert memory_limit([tmp_path / "missing"]) is None


def test_a_container_has_the_less_of_the_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_limit", lambda: 2**20)
    found = examine([])
    assert (found.memory_free, found.memory_total) == (2**20, 2**20)


def test_free_space_of_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert free_space(tmp_path / "a" / "b") > 0


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        (subprocess.CompletedProcess([], 0, "long\nshort\nlong\n", ""), (("long", "short"), "")),
        (subprocess.CompletedProcess([], 1, "", "sinfo: error: x\nsinfo: fatal: Munge\n"), ((), "sinfo: fatal: Munge")),
        (subprocess.CompletedProcess([], 1, "", ""), ((), "sinfo ended with 1")),
    ],
)
def test_asking_slurm(monkeypatch: pytest.MonkeyPatch, done: Any, expected: Any) -> None:
    monkeypatch.setattr(machine.subprocess, "run", lambda *args, **kwargs: done)
    assert ask_slurm() == expected


def test_slurm_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: Any, **kwargs: Any) -> None:
        raise subprocess.TimeoutExpired("sinfo", 20)

    monkeypatch.setattr(machine.subprocess, "run", run)
    assert ask_slurm()[0] == ()
    assert "timed out" in ask_slurm()[1]


def test_where_the_key_of_wandb_is(tmp_path: Path) -> None:
    assert wandb_key({}, tmp_path) is None
    assert wandb_key({"WANDB_API_KEY": "x"}, tmp_path) == "WANDB_API_KEY"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    assert wandb_key({}, tmp_path) == str(tmp_path / ".netrc")
    assert wandb_key({"WANDB_BASE_URL": "https://wandb.example.org"}, tmp_path) is None
    assert wandb_key({"NETRC": str(tmp_path / "none")}, tmp_path) is None
