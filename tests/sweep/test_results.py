import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opd_trainer.errors import DataError
from opd_trainer.run_record import RunStatus
from opd_trainer.sweep.plot import accuracy
from opd_trainer.sweep.record import Trial, joined, trial_name
from opd_trainer.sweep.report import summarize
from opd_trainer.sweep.results import Estimate, estimate, read_settings
from opd_trainer.sweep.table import STATUS


def leave(directory: Path, accuracy: float, status: RunStatus = RunStatus.finished, error: str | None = None) -> None:
    """What a run of 20 steps leaves behind; its reward rises from 0 to 1 at steps 18 and 19."""
    directory.mkdir(parents=True)
    (directory / "run.json").write_text(
        json.dumps({"config_hash": "x", "resume_hash": "x", "status": status, "error": error})
    )
    rows: list[dict[str, Any]] = [
        {"step": step, "rollout/reward": float(step > 17), "opd/reverse_kl": 1 / (step + 1)} for step in range(20)
    ]
    rows[9]["eval/heldout/pass@1"] = 0.25
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if status is RunStatus.finished:
        summary = {
            "evaluation": {"before": {"heldout": 0.1}, "after": {"heldout": accuracy}, "teacher": {"heldout": 0.9}},
            "reverse_kl": {"first": 0.5, "last": None},
            "steps": 20,
            "wall_s": {"total": 90.0},
        }
        (directory / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two coefficients, two seeds; of the second coefficient one trial failed and one is missing a seed."""
    values = [{"opd.kl_coef": coefficient, "seed": seed} for coefficient in (0.5, 1.0) for seed in (0, 1)]
    trials = [Trial(trial_name(one), one, (), str(number)) for number, one in enumerate(values)]
    directory = tmp_path / "sweep"
    joined(directory, trials).write()
    leave(directory / trials[0].directory, 0.6)
    leave(directory / trials[1].directory, 0.8)
    leave(directory / trials[2].directory, 0.0, RunStatus.failed, "TrainingDiverged: the loss is not finite")
    return directory


def test_mean_and_standard_error() -> None:
    assert estimate([0.5]) == Estimate(0.5, None, 1)
    found = estimate([1.0, 2.0, 3.0, 6.0])
    assert (found.mean, found.num) == (3.0, 4)
    # Deviations -2, -1, 0, 3: variance 14 / 3.
    assert found.standard_error == pytest.approx(math.sqrt(14 / 3 / 4))


def test_settings(sweep: Path) -> None:
    first, second = read_settings(sweep)
    assert (first.label, second.label) == ("opd.kl_coef=0.5", "opd.kl_coef=1.0")
    assert (first.num_finished, second.num_finished) == (2, 0)
    found = first.estimates()
    assert list(found) == ["pass@1 heldout", "reward", "minutes"]
    assert found["pass@1 heldout"].mean == pytest.approx(0.7)
    assert found["pass@1 heldout"].standard_error == pytest.approx(0.1)
    # Of the last two steps of 20.
    assert found["reward"].mean == 1.0
    assert found["minutes"].mean == 1.5
    assert second.estimates() == {}


def test_tables(sweep: Path) -> None:
    with Console(record=True, width=200) as console:
        summarize(sweep, console)
    printed = console.export_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "70.0% ± 10.0%" in printed
    assert "0 of 2" in printed
    assert "kl_coef-1.0_seed-0: failed: TrainingDiverged: the loss is not finite" in printed
    assert "kl_coef-1.0_seed-1: not begun" in printed
    head, rule, first, second, *_ = (sweep / "table.md").read_text().splitlines()
    assert head == "| opd.kl_coef | trials | pass@1 heldout | reward | minutes |"
    assert rule == "|---|---|---|---|---|"
    assert first == "| 0.5 | 2 | 70.0% ± 10.0% | 1 ± 0 | 1.5 |"
    assert second == "| 1.0 | 0 of 2 | - | - | - |"
    with (sweep / "table.csv").open() as file:
        settings = list(csv.DictReader(file))
    assert float(settings[0]["pass@1 heldout mean"]) == pytest.approx(0.7)
    assert float(settings[0]["pass@1 heldout standard error"]) == pytest.approx(0.1)
    assert settings[1]["pass@1 heldout mean"] == ""
    with (sweep / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert [trial["seed"] for trial in trials] == ["0", "1", "0", "1"]
    assert [trial["status"] for trial in trials] == ["finished", "finished", "failed", "not begun"]
    assert [trial["pass@1 heldout"] for trial in trials] == ["0.6", "0.8", "", ""]


def test_picture(sweep: Path) -> None:
    summarize(sweep, Console(quiet=True))
    assert (sweep / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(sweep.glob(".*"))


def test_accuracy_has_its_ends(sweep: Path) -> None:
    outcome = read_settings(sweep)[0].outcomes[0]
    curve = accuracy(outcome.rows, outcome.summary)
    assert list(curve.x) == [0, 10, 20]
    assert list(curve.y) == pytest.approx([0.1, 0.25, 0.6])
    assert list(accuracy(outcome.rows, None).x) == [10]


def test_a_sweep_that_has_not_begun(tmp_path: Path) -> None:
    joined(tmp_path, [Trial("seed-0", {"seed": 0}, (), "0"), Trial("seed-1", {"seed": 1}, (), "1")]).write()
    summarize(tmp_path, Console(quiet=True))
    assert "| 0 of 2 |" in (tmp_path / "table.md").read_text()


def test_every_status_has_words() -> None:
    assert set(STATUS) == {None, *RunStatus}


def test_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sweep\.json"):
        read_settings(tmp_path)
