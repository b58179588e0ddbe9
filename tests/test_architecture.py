"""The diagram of the house: imports point down, and every large dependency has one home."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "opd_trainer"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS: tuple[tuple[str, ...], ...] = (
    ("cli",),
    ("slurm",),
    ("app",),
    ("task", "demo"),
    ("memory", "doctor"),
    ("build", "sweep"),
    ("controller", "supervised", "evaluation", "run_record"),
    ("config",),
    ("prefetch",),
    ("experience", "checkpoint"),
    ("eval",),
    ("data", "reward", "rollout", "teacher", "tracking"),
    ("sglang",),
    ("megatron",),
    ("cluster",),
    ("model", "objective"),
    ("estimator", "opd"),
    ("loss", "divergence"),
    ("protocols", "files", "requests", "collation", "sample_state", "interruption", "references"),
    ("updates", "metrics"),
    ("types",),
    ("jagged", "vocabulary"),
    ("errors",),
)
"""A module imports from lower rows only: never upwards, never a neighbour. Schemas (`*.config`) are open to all."""
DEPTH = {name: depth for depth, row in enumerate(LAYERS) for name in row}

PURE = {"objective", "estimator", "opd", "loss", "divergence", "jagged", "vocabulary", "types", "updates", "errors"}
"""Mathematics: torch, jaxtyping, the standard library, and each other."""
STANDARD = sys.stdlib_module_names

HOMES: dict[str, tuple[str, ...]] = {
    "ray": ("cluster/ray.py", "cluster/session.py"),
    "megatron": ("megatron/",),
    "sglang": (),
    "wandb": ("tracking/wandb.py",),
    "matplotlib": ("tracking/curves.py", "sweep/plot.py"),
    "rich": ("tracking/", "sweep/", "memory/report.py", "doctor/report.py"),
    "transformers": ("model/", "data/", "rollout/embedded/", "sglang/fake_model.py", "demo/", "build/vocabulary.py"),
    "datasets": ("data/",),
    "math_verify": ("reward/",),
    "aiohttp": ("reward/remote.py", "sglang/"),
    "hydra": ("cli/",),
    "omegaconf": ("cli/", "app.py", "config.py"),
}
"""Where a dependency may be imported; a folder ends with a slash."""


def where(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


@cache
def imports(file: Path) -> tuple[str, ...]:
    """Dotted names of everything that a file imports, also inside functions."""
    return tuple(found(file))


def found(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_exists(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def own_module(name: str) -> tuple[str, ...]:
    """The module part of an import of ours, below the package: opd_trainer.opd.term.rkl -> (opd, term)."""
    while not module_exists(name):
        name = name.rpartition(".")[0]
    return tuple(name.split(".")[1:])


def ours(file: Path) -> list[tuple[str, ...]]:
    """Our modules that a file imports."""
    return [own_module(name) for name in imports(file) if name.split(".")[0] == "opd_trainer"]


def unit(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_has_a_place() -> None:
    assert {unit(file) for file in FILES} - {"__init__"} <= set(DEPTH)


@pytest.mark.parametrize("file", [f for f in FILES if f != PACKAGE / "__init__.py"], ids=where)
def test_imports_point_down(file: Path) -> None:
    own = unit(file)
    for module in ours(file):
        if not module or module[0] == own or (len(module) == 2 and module[1] == "config"):
            continue
        assert DEPTH[module[0]] > DEPTH[own], f"{where(file)} imports {'.'.join(module)}"


@pytest.mark.parametrize("file", [f for f in FILES if unit(f) in PURE], ids=where)
def test_mathematics_knows_nothing_else(file: Path) -> None:
    others = {name.split(".")[0] for name in imports(file)} - {"opd_trainer", "torch", "jaxtyping"}
    assert others <= STANDARD
    assert {module[0] for module in ours(file) if module} <= PURE | {"metrics"}


@pytest.mark.parametrize("dependency", sorted(HOMES))
def test_a_dependency_is_imported_at_home_only(dependency: str) -> None:
    guests = [where(file) for file in FILES if dependency in {name.split(".")[0] for name in imports(file)}]
    assert [guest for guest in guests if not guest.startswith(HOMES[dependency] or ("nowhere",))] == []


@pytest.mark.parametrize("file", [f for f in FILES if f.name == "config.py"], ids=where)
def test_schemas_are_light(file: Path) -> None:
    others = {name.split(".")[0] for name in imports(file)} - STANDARD - {"opd_trainer"}
    assert others <= ({"omegaconf"} if unit(file) == "config" else set())
    allowed = {"estimator", "errors"} if unit(file) == "config" else {"errors"}
    assert {module[0] for module in ours(file) if module[-1] != "config"} <= allowed


@pytest.mark.parametrize("file", [f for f in FILES if f.name == "__init__.py"], ids=where)
def test_packages_import_nothing_by_themselves(file: Path) -> None:
    assert imports(file) == ()


def test_the_core_runs_without_any_backend() -> None:
    """Configuration, loop and mathematics can be imported where no backend is installed."""
    blocked = sorted({"ray", "megatron", "sglang", "wandb", "transformers", "datasets", "matplotlib", "aiohttp"})
    modules = ["opd_trainer.cli.entry", "opd_trainer.controller", "opd_trainer.experience", "opd_trainer.protocols"]
    modules += [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in FILES
        if unit(file) in PURE and file.name != "__init__.py"
    ]
    script = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n" + "\n".join(
        f"import {m}" for m in modules
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
