"""What the rules share."""

from collections.abc import Callable, Iterator

from opd_trainer.cli.named import Named
from opd_trainer.config import Config
from opd_trainer.data.config import DataConfig, MixtureData
from opd_trainer.errors import Problem
from opd_trainer.teacher.config import (
    ServerTeacher,
    TeacherConfig,
)

Rule = Callable[[Config, Named], Iterator[Problem]]
DEMO_PREFIX = "demo:"


def teachers(config: Config) -> Iterator[tuple[str, TeacherConfig]]:
    """Every teacher with its dotted key."""
    yield "teacher", config.teacher
    for name, teacher in config.teachers.items():
        yield f"teachers.{name}", teacher


def is_server(teacher: TeacherConfig) -> bool:
    """Whether the teacher is reached over HTTP."""
    return isinstance(teacher, ServerTeacher)


def files(key: str, data: DataConfig) -> Iterator[tuple[str, DataConfig]]:
    """The datasets that have a file of their own."""
    if isinstance(data, MixtureData):
        for name, part in data.datasets.items():
            yield from files(f"{key}.datasets.{name}", part)
    else:
        yield key, data
