import asyncio
import importlib.metadata
import sys
from pathlib import Path

import pytest

from opd_trainer.doctor import packages
from opd_trainer.doctor.packages import Package, Wanted, accepted_versions, ended_with, probe


def write_package(folder: Path, name: str, body: str) -> None:
    (folder / f"{name}.py").write_text(body)
    metadata = folder / f"{name}-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("", None),
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "its process ended with SIGSEGV"),
        ("raise SystemExit(3)", "its process ended with code 3"),
    ],
)
def test_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, error: str | None) -> None:
    write_package(tmp_path, "pretend_package", body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = asyncio.run(probe(Wanted("pretend-package", "pretend_package"), {"pretend-package": ">=2"}))
    assert found == Package(name="pretend-package", version="1.2", accepted=">=2", error=error)
    assert found.works is (error is None)
    assert found.other_version


def test_a_package_that_is_not_there() -> None:
    found = asyncio.run(probe(Wanted("no-such-package", "no_such_package"), {}))
    assert found == Package(name="no-such-package", version=None)
    assert found.complaint == "no-such-package is not installed"


def test_an_import_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path, "endless_package", "import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(packages, "IMPORT_TIMEOUT_S", 1.0)
    found = asyncio.run(probe(Wanted("endless-package", "endless_package"), {}))
    assert found.error == "not done after 1 s"


def test_a_python_that_is_not_there() -> None:
    found = asyncio.run(probe(Wanted("sglang", "sglang"), {}, "/no/such/python"))
    assert found.version is None
    assert found.error == "/no/such/python: No such file or directory"


def test_versions_that_the_project_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def requires(name: str) -> list[str]:
        asked.append(name)
        return ["torch>=2.9", "ray>=2.48,<3", "ruff>=0.12; extra == 'dev'"]

    monkeypatch.setattr(packages, "requires", requires)
    assert accepted_versions()["torch"] == ">=2.9"
    assert asked == ["opd-trainer"]


def test_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages, "requires", requires)
    assert accepted_versions() == {}


def test_the_last_line_is_the_reason() -> None:
    assert ended_with(0, "a warning") is None
    assert ended_with(1, "Traceback ...\nImportError: x\n\n") == "ImportError: x"


def test_other_versions() -> None:
    assert not Package(name="torch", version="2.13.0+cpu", accepted=">=2.9").other_version
    assert not Package(name="torch", version="2.13.0a0", accepted=">=2.9").other_version
    assert Package(name="torch", version="2.8.1", accepted=">=2.9").other_version
    assert sys.version_info >= (3, 11)
