"""Shell completion: Hydra's own, behind our spellings."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opd_trainer.cli.completion import hydras_line
from opd_trainer.cli.composition import Composer

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python launch.py est", "est"),
        ("python launch.py ", ""),
        ("python launch.py", ""),
        (".venv/bin/python launch.py teacher=sw", "teacher=sw"),
        ("python launch.py experiment=null data.", "~experiment data."),
        ("python launch.py -m opd=off,megatron opd.", "opd."),
        ("python launch.py --use-opd --opd-type sglang teacher.", "opd=sglang teacher=sglang_external teacher."),
        ("python launch.py opd=xx no_such_key=3 opd.kl_coef=1 rew", "rew"),
        ("python launch.py eval.datasets.math.path=x eval.", "+data@eval.datasets.math=file eval."),
        ("python launch.py estimator=ppo estimator=grpo '( est", "estimator=grpo est"),
    ],
)
def test_what_hydra_is_asked(compose: Composer, line: str, expected: str) -> None:
    assert hydras_line(compose, line).split() == ["python", "launch.py", *expected.split()]


@pytest.mark.parametrize(
    ("line", "suggested"),
    [
        ("python launch.py task=doc", ["task=doctor"]),
        ("python launch.py opd.kl", ["opd.kl_coef="]),
        ("python launch.py experiment=null opd_type=sglang teacher.ur", ["teacher.url="]),
        ("python launch.py teacher=sglang_managed teacher.launch.ser", ["teacher.launch.servers="]),
    ],
)
def test_suggestions(launch: Any, monkeypatch: pytest.MonkeyPatch, line: str, suggested: list[str]) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    assert launch("-sc", "query=bash") == 0, launch.err
    assert launch.out.split() == suggested
    assert launch.runs == []
    assert os.environ["COMP_LINE"] == line


@pytest.mark.parametrize("python", ["python", sys.executable], ids=["by name", "by path"])
def test_in_a_shell(tmp_path: Path, python: str) -> None:
    """What the README says to type, and then the function that bash calls for <TAB>."""
    (tmp_path / "launch.py").symlink_to(ROOT / "launch.py")
    script = (
        'eval "$(python launch.py -sc install=bash)"\n'
        f'COMP_LINE="{python} launch.py estimator=gs" COMP_CWORD=2\n'
        "hydra_bash_completion\n"
        'echo "${COMPREPLY[@]}"'
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.split() == ["estimator=gspo"], done.stderr
