"""pyproject.toml against what the code says of it."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

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
