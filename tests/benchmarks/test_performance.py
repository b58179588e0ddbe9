import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import performance
from benchmarks.machine import measuring, shortened

FIGURES: dict[str, Any] = {
    "step_demo": {
        "step_s": 0.3,
        "tokens_per_s": 20000.0,
        "rollout": 0.25,
        "teacher": 0.2,
        "train": 0.5,
        "sync": 0.03,
        "controller": 0.02,
        "start_s": 9.0,
    },
    "rollout_demo": {
        "fixed": {"engine": 90.0, "bare loop": 100.0, "transformers loop": 50.0, "generate": 45.0},
        "free": {"engine": 90.0, "generate": 30.0},
    },
    "train_step": {
        "bare_loop": {"speed_of_bare_loop": 0.97},
        "teacher": {"cost_of_teacher": 1.5},
        "packing": [{"ranks": 8, "efficiency": 0.99, "fill": 0.9}],
        "two_processes": {"speedup": 1.8},
    },
    "log_prob_memory": [{"forward_ratio": 0.05, "ratio": 0.2}],
}


def test_goals_met_missed_and_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performance, "FIGURES", tmp_path)
    for name, figures in FIGURES.items():
        measuring()(tmp_path / f"{name}.json", figures)
    lines = performance.table().splitlines()
    assert "| demo: weight sync, of a step | 3.0% | <= 2.0% | **no** | 0 | `step_demo` |" in lines
    assert "| demo: all else, of a step | 2.0% | <= 5.0% | yes | 0 | `step_demo` |" in lines
    assert "| engine / bare loop, demo's shape | 0.90 | >= 0.80 | yes | 1 | `rollout_demo` |" in lines
    assert "| update / bare loop, speed | 0.970 | >= 0.950 | yes | 1 | `train_step` |" in lines
    assert "| SmolLM2 pair: weight sync, of a step | not measured | <= 2.0% | - | 0 | `step_smollm2` |" in lines
    assert any(line.startswith("| update with / without a teacher of equal size, time | 1.500 |") for line in lines)
    assert sum(line.startswith(("| `step_demo` | `python", "| `step_smollm2` |")) for line in lines) == 1


def test_a_measurement_tells_where_it_is_from(tmp_path: Path) -> None:
    measuring()(tmp_path / "there" / "one.json", [1, 2])
    content = json.loads((tmp_path / "there" / "one.json").read_text())
    assert content["figures"] == [1, 2]
    assert content["command"].startswith("python ")
    assert len(content["machine"]["load_average"]) == 2
    assert {"torch", "python"} <= set(content["versions"])


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("model.load=/data/models/student/", "model.load=student"),
        ("/data/models/student", "student"),
        ("docs/results/one.json", "docs/results/one.json"),
        ("megatron.optimizer.lr=1e-3", "megatron.optimizer.lr=1e-3"),
    ],
)
def test_commands_name_no_folders_of_this_machine(argument: str, told: str) -> None:
    assert shortened(argument) == told


def test_the_page_is_of_the_measurements() -> None:
    """`python -m benchmarks.performance` after a measurement."""
    assert performance.PAGE.read_text(encoding="utf-8") == performance.page()


def test_every_measurement_has_its_lines() -> None:
    sources = {line.source for line in performance.LINES}
    assert sources == {*performance.MEASUREMENTS, *performance.OF_YOURS}
