"""docs/extending.md: its diffs apply, together too, and what they add works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "extending.md"
DIFFS = re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
TESTS = (
    "tests/estimator/test_opo.py",
    "tests/laws/test_laws.py",
    "tests/reward/test_repetition.py",
    "tests/teacher/test_placements.py::test_every_placement_gives_the_same_scores",
    "tests/megatron/test_families.py::test_gradients_equal_transformers",
    "tests/rollout/test_decoder.py",
)
"""What they bring, and what finds them by itself."""
NAMES = "opo or repetition or disk or mistral"


def apply(diff: str, folder: Path, *options: str) -> None:
    done = subprocess.run(
        ["git", "apply", *options, "-"], cwd=folder, input=diff, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"mend the diff in {PAGE.name}: {done.stderr}"


@pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: re.findall(r"^\+\+\+ b/(\S+)", diff, re.MULTILINE)[0])
def test_a_diff_applies_to_this_tree(diff: str) -> None:
    apply(diff, ROOT, "--check")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree with all four."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("opd_trainer", "conf", "hydra_plugins", "tests"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("pyproject.toml", "launch.py"):
        shutil.copy(ROOT / name, folder / name)
    assert len(DIFFS) == 4
    # Git must not take the copy for a part of a checkout around it.
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    for diff in DIFFS:
        apply(diff, folder)
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_what_they_bring_passes(extended: Path) -> None:
    done = run(extended, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", NAMES, *TESTS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    for name in ("test_laws.py::.*opo", "repetition", "disk", "mistral"):
        assert re.search(rf"{name}.* PASSED", done.stdout), f"no test of {name} was run"


def test_their_options_can_be_chosen(extended: Path) -> None:
    done = run(extended, "launch.py", "--cfg", "job", "estimator=opo", "reward=repetition", "teacher=disk")
    assert done.returncode == 0, done.stderr
    assert "ngram: 8" in done.stdout
