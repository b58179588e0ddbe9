"""pyproject.toml against what the code says of it."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from opd_trainer.megatron import compat

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def extras_named() -> Iterator[str]:
    """The second argument of every MissingExtra(package, extra, needed_for)."""
    for file in (ROOT / "opd_trainer").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "MissingExtra":
                extra = node.args[1]
                assert isinstance(extra, ast.Constant)
                yield str(extra.value)


def test_an_extra_that_a_message_recommends_exists() -> None:
    named = set(extras_named())
    assert named
    assert named <= set(PROJECT["optional-dependencies"])


def test_what_the_doctor_looks_for_is_a_dependency() -> None:
    from opd_trainer.doctor.packages import NEEDED

    direct = {text.split(">")[0].split("=")[0].split("<")[0] for text in PROJECT["dependencies"]}
    # hydra-submitit-launcher brings it.
    assert {wanted.name for wanted in NEEDED} - {"submitit"} <= direct


def test_the_versions_that_were_tested_are_allowed() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for requirement in map(Requirement, PROJECT["dependencies"]):
        assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_megatron_core_is_not_allowed_where_its_hacks_were_not_tried() -> None:
    """They replace its private functions, which another minor version may not have."""
    (megatron,) = (r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "megatron-core")
    said = (compat.__doc__ or "").rpartition("Version range of all: ")[2].strip().rstrip(".")
    assert not megatron.specifier.contains("0.15.3")
    assert megatron.specifier.contains(f"{said}.0")
    assert not megatron.specifier.contains("0.17.0")


def test_setup_and_readme_name_the_pythons_that_are_allowed() -> None:
    said = (ROOT / "README.md").read_text().partition("Python 3.")[2]
    oldest, newest = re.findall(r"^(\d+) to 3\.(\d+) ", said)[0]
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert [minor for minor in range(30) if allowed.contains(f"3.{minor}.1")] == [*range(int(oldest), int(newest) + 1)]
    named = {text.rpartition(".")[2] for text in PROJECT["classifiers"] if "Python :: 3." in text}
    assert named == {str(minor) for minor in range(int(oldest), int(newest) + 1)}


@pytest.mark.parametrize(("version", "taken"), [((3, 10), False), ((3, 11), True), ((3, 13), True), ((3, 14), False)])
def test_setup_refuses_other_pythons(tmp_path: Path, version: tuple[int, int], taken: bool) -> None:
    python = tmp_path / "python"
    as_if = f"import sys; sys.version_info = (*{version}, 1, 'final', 0); exec(sys.argv[2])"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{as_if}" "$@"\n')
    python.chmod(0o755)
    # The folder cannot be made, which is what ends it where the version is taken.
    (tmp_path / "file").touch()
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "setup.sh", tmp_path / "file" / "venv"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert ("3.11, 3.12 or 3.13 is needed" not in done.stderr) is taken, done.stderr
