"""A command line without a training run behind it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from opd_trainer.cli.composition import Composer
from opd_trainer.cli.entry import main
from opd_trainer.cli.plan import Plan
from opd_trainer.config import Config
from opd_trainer.errors import ConfigError, Problem
from tests.commands import CONF, planned


@dataclass
class Checker:
    """Looks at command lines without running anything."""

    shared: Composer
    problems: list[Problem] = field(default_factory=list)
    configs: list[Config] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    plan: Plan | None = None

    def __call__(self, *argv: str) -> bool:
        """Whether the command line is right."""
        self.problems, self.configs = [], []
        try:
            found = planned(self.shared, argv)
        except ConfigError as error:
            self.problems = error.problems
            return False
        self.configs, self.overrides, self.plan = found.configs, found.overrides, found
        return True

    @property
    def config(self) -> Config:
        """The only configuration."""
        assert len(self.configs) == 1, self.message
        return self.configs[0]

    @property
    def keys(self) -> list[str]:
        """The keys that have a problem."""
        return [problem.key for problem in self.problems]

    @property
    def message(self) -> str:
        """What the user reads."""
        return str(ConfigError(self.problems))


def put_data(folder: Path) -> None:
    """The datasets that command lines of the tests name."""
    for name in ("x", "x.jsonl", "prompts.jsonl"):
        (folder / name).write_text("")


@pytest.fixture
def check(compose: Composer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checker:
    """A checker whose working directory has data and nothing else."""
    monkeypatch.chdir(tmp_path)
    put_data(tmp_path)
    return Checker(compose)


@dataclass
class Launcher:
    """Runs `main` in this process, with Hydra, and remembers what would have been run."""

    capsys: pytest.CaptureFixture[str]
    runs: list[tuple[Config, Path]] = field(default_factory=list)
    fail: Callable[[Config], None] = lambda config: None
    out: str = ""
    err: str = ""

    def __call__(self, *argv: str) -> int:
        """The exit code."""
        self.runs.clear()
        code = main(CONF, argv, self.run)
        self.out, self.err = self.capsys.readouterr()
        return code

    def run(self, config: Config, output_dir: Path) -> float:
        self.runs.append((config, output_dir))
        self.fail(config)
        return 0.0

    @property
    def directory(self) -> Path:
        """The run directory of the only run."""
        assert len(self.runs) == 1, self.err
        return self.runs[0][1]


@pytest.fixture
def launch(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    """A launcher whose working directory has data and nothing else."""
    monkeypatch.chdir(tmp_path)
    put_data(tmp_path)
    return Launcher(capsys)


@pytest.fixture
def model_folder(tmp_path: Path) -> str:
    """A path that looks like a Hugging Face checkpoint."""
    folder = tmp_path / "models" / "student"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return str(folder)
