"""The exception tree. `exit_code` is what `launch.py` exits with; a UserError is printed without a traceback.

OpdError                     1
├── UserError                2   the user can fix it: the message says what is wrong, why, and what to set
│   ├── ConfigError          2   one or more `Problem`s of the configuration, reported together
│   ├── DataError            2   a malformed row or a missing file
│   ├── CheckpointError      2   a path that is missing, or holds no checkpoint of the expected kind
│   ├── ShapeMismatch        2   a model does not fit the place that it is loaded into
│   ├── PreflightError       2   something outside the process is not as the run needs it (a server, a device)
│   └── MissingExtra         2   an optional package is not installed
├── Incomparable             1   two log-probs of different temperatures were about to be subtracted
├── WorkerError              1   a worker process died, hung or raised
│   └── WorkerDied           1   it died or hung, so that another attempt may go better
│       └── NodeLost         1   with the machine that it was on
├── Interrupted              1   the run was asked to stop, and its state is saved
├── JobFailed                1   a job that was submitted to a queue failed; the message quotes its own
├── TeacherError             1   the teacher failed more often than allowed
└── TrainingDiverged         1   a loss or gradient is not finite
"""

from dataclasses import dataclass


class OpdError(Exception):
    """Root of every error that this package raises on purpose."""

    exit_code = 1
    explains_itself = False
    """Whether the message says all, so that `launch.py` prints no traceback."""


class UserError(OpdError):
    """An error that the user can fix; printed without a traceback."""

    exit_code = 2
    explains_itself = True


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a configuration.

    Attributes:
        key: dotted configuration key, e.g. ``teacher.load``.
        what: what was found there.
        why: why it cannot work.
        fix: the override that repairs it, as the user would type it.
    """

    key: str
    what: str
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.key}: {self.what}: {self.why}. {self.fix}"


class ConfigError(UserError):
    """All problems of a configuration, reported together."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        count = len(self.problems)
        head = f"The configuration has {count} problem{'s' if count > 1 else ''}:"
        return "\n".join([head, *(f"  {number}. {problem}" for number, problem in enumerate(self.problems, 1))])


class DataError(UserError):
    """A malformed row, an unreadable file or an empty dataset."""


class CheckpointError(UserError):
    """A checkpoint path that is missing, or that holds no checkpoint of the expected kind."""


class ShapeMismatch(UserError):
    """A model does not fit the place that it is loaded into."""


class PreflightError(UserError):
    """Something outside the process is not as the run needs it."""


class MissingExtra(UserError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, needed_for: str) -> None:
        super().__init__(package, extra, needed_for)
        self.package, self.extra, self.needed_for = package, extra, needed_for

    def __str__(self) -> str:
        return f"{self.needed_for} needs the package {self.package}: pip install 'opd-trainer[{self.extra}]'"


class Incomparable(OpdError):
    """Two log-probs of different temperatures were about to be subtracted."""


class WorkerError(OpdError):
    """A worker process died, hung or raised."""


class WorkerDied(WorkerError):
    """A worker process died or hung: its machine or its memory, not its code."""


class NodeLost(WorkerDied):
    """A machine is gone, and its workers with it: another attempt needs another machine."""


class Interrupted(OpdError):
    """The run was asked to stop at a step boundary, where its state is saved."""

    explains_itself = True


class JobFailed(OpdError):
    """A job that was submitted to a queue failed."""

    explains_itself = True


class TeacherError(OpdError):
    """The teacher failed more often than allowed."""


class TrainingDiverged(OpdError):
    """A loss or gradient is not finite."""
