"""What a sweep directory says about its sweep: `sweep.json` with the trials, each of which has a run directory below.

Everything here is read from and written to files, so that it does not matter which process ran a trial.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from opd_trainer.files import write_atomically
from opd_trainer.run_record import RunStatus, read_record

SWEEP_FILE = "sweep.json"
SEED = "seed"
"""The key whose values repeat a setting instead of making another one."""
MAX_NAME = 80
"""Characters of a trial's directory name."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep.

    Attributes:
        directory: its name below the sweep's directory.
        values: swept key or group -> the value of this trial.
        overrides: all that Hydra is given for it.
        config_hash: of its configuration, which tells it from the others.
    """

    directory: str
    values: Mapping[str, Any]
    overrides: tuple[str, ...]
    config_hash: str

    @property
    def setting(self) -> tuple[tuple[str, str], ...]:
        """Its values apart from the seed, which trials of one setting share."""
        return tuple((key, str(value)) for key, value in self.values.items() if key != SEED)

    @property
    def label(self) -> str:
        """Its values, for people."""
        return " ".join(f"{key}={value}" for key, value in self.values.items())


def plain_name(text: str) -> str:
    """`text` in letters, digits and `.-_`, which no shell and no Hydra wants quoted; never empty."""
    return re.sub(r"[^\w.]+", "-", text.replace("+", ""), flags=re.ASCII).strip("-.")[:MAX_NAME] or "unnamed"


def trial_name(values: Mapping[str, Any]) -> str:
    """A directory name that tells the values."""
    return plain_name("_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in values.items()))


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep directory.

    Attributes:
        directory: of the sweep.
        trials: all that were ever asked for in it.
        launch: directories of those that the latest command starts.
    """

    directory: Path
    trials: tuple[Trial, ...]
    launch: tuple[str, ...]

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """The sweep in `directory`, None where there is none."""
        file = directory / SWEEP_FILE
        if not file.is_file():
            return None
        content = json.loads(file.read_text(encoding="utf-8"))
        trials = (Trial(**{**trial, "overrides": tuple(trial["overrides"])}) for trial in content["trials"])
        return cls(directory, tuple(trials), tuple(content["launch"]))

    def write(self) -> None:
        """Writes `sweep.json`."""
        content = {"trials": [dataclasses.asdict(trial) for trial in self.trials], "launch": self.launch}
        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomically(self.directory / SWEEP_FILE, json.dumps(content, indent=2) + "\n")

    def place(self, trial: Trial) -> Path:
        """The run directory of a trial."""
        return self.directory / trial.directory

    def status(self, trial: Trial) -> RunStatus | None:
        """How far a trial has come; None before it has begun."""
        record = read_record(self.place(trial))
        return None if record is None else record.status


def joined(directory: Path, asked: Sequence[Trial]) -> Sweep:
    """The sweep in `directory` with the trials of a command, of which those that are not finished are to be launched.

    A trial that is there already, by the hash of its configuration, keeps its directory.
    """
    earlier = Sweep.read(directory)
    trials = {} if earlier is None else {trial.config_hash: trial for trial in earlier.trials}
    mine: list[str] = []
    for trial in asked:
        known = trials.get(trial.config_hash)
        if known is not None:
            name = known.directory
        elif trial.directory in {other.directory for other in trials.values()}:
            name = f"{trial.directory}-{trial.config_hash[:6]}"
        else:
            name = trial.directory
        placed = dataclasses.replace(trial, directory=name)
        trials[trial.config_hash] = placed
        record = read_record(directory / name)
        if record is None or record.status is not RunStatus.finished:
            mine.append(name)
    return Sweep(directory, tuple(trials.values()), tuple(mine))
