"""`task=doctor` through launch.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opd_trainer.task.config import DoctorTask

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("more", [(), ("experiment=null",), ("opd=sglang", "teacher=sglang_managed")])
def test_it_needs_nothing(check: Any, more: tuple[str, ...]) -> None:
    assert check("task=doctor", *more), check.message
    assert isinstance(check.config.task, DoctorTask)


def test_it_reports(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "task=doctor", "output_dir=report"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for heading in ("This machine", "Packages", "What works here"):
        assert heading in done.stdout
    written = json.loads((tmp_path / "report" / "doctor.json").read_text())
    assert written["facts"]["packages"]["torch"]["error"] is None
    uses = {one["use"]: one["answer"] for one in written["verdicts"]}
    assert uses["cluster=inprocess with teacher=resident, offload or swap"] in ("yes", "partly")
    assert not (tmp_path / "checkpoints").exists()
