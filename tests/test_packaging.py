"""pyproject.toml against what the code says of it."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

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
