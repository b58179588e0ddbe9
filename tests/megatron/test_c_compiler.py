import os
import sysconfig
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from opd_trainer.megatron import log_probs
from opd_trainer.megatron.c_compiler import c_compiler, has_python_headers

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts commands on a PATH that has nothing else."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "")  # so that it is as before afterwards
    monkeypatch.delenv("CC")

    def put(*names: str) -> None:
        for name in names:
            (tmp_path / name).touch(0o755)

    return put


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Asked on a machine with Triton."""
    monkeypatch.setattr(log_probs, "find_spec", lambda name: ModuleSpec(name, None))
    return log_probs._triton_builds.__wrapped__


def test_none(install: Install, builds: Callable[[], bool]) -> None:
    assert c_compiler() is None
    with pytest.warns(UserWarning, match="Install gcc, or name a compiler in CC"):
        assert not builds()
    assert "CC" not in os.environ


@pytest.mark.parametrize("there", [("gcc", "clang", "cc"), ("clang", "cc"), ("cc",)])
def test_the_first_of_those_that_are_there(install: Install, builds: Callable[[], bool], there: tuple[str]) -> None:
    install(*there)
    found = c_compiler()
    assert found is not None
    assert Path(found).name == there[0]
    assert builds()
    # Triton looks for gcc and clang only.
    assert os.environ["CC"] == found


def test_the_one_that_is_named(install: Install, builds: Callable[[], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    install("gcc", "mine")
    monkeypatch.setenv("CC", "mine")
    assert Path(c_compiler() or "").name == "mine"
    assert builds()
    assert os.environ["CC"] == "mine"
    monkeypatch.setenv("CC", "not-there")
    assert c_compiler() is None


def test_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert not has_python_headers()
    (tmp_path / "Python.h").touch()
    assert has_python_headers()
