import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import demo_runs, estimators, results

ROOT = Path(__file__).parents[2]


def run_directory(directory: Path, *, after: float, teacher: float | None, kl: tuple[float, float] | None) -> Path:
    directory.mkdir()
    summary = {
        "evaluation": {
            "before": {"heldout": 0.5},
            "after": {"heldout": after},
            "teacher": {} if teacher is None else {"heldout": teacher},
        },
        "reverse_kl": {"first": kl[0] if kl else None, "last": kl[1] if kl else None},
        "steps": 2,
        "wall_s": {"total": 90.0},
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "versions": {"torch": "2.13.0", "megatron-core": "0.16.1"},
    }
    (directory / "summary.json").write_text(json.dumps(summary))
    rows = [{"step": step, "rollout/reward": 0.5, "opd/reverse_kl": kl[step] if kl else None} for step in range(2)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_table_page_and_plot(tmp_path: Path) -> None:
    runs = []
    for variant in results.VARIANTS:
        for seed, after in ((0, 0.8), (1, 0.9)):
            alone = variant.name.startswith("grpo")
            directory = run_directory(
                tmp_path / f"{variant.name}{seed}",
                after=after,
                teacher=None if alone else 0.96,
                kl=None if alone else (0.25, 0.0125),
            )
            runs.append(demo_runs.load(directory, variant, seed))

    lines = demo_runs.table(runs).splitlines()
    assert len(lines) == 2 + 10
    assert lines[2] == "| GRPO with distillation | 0 | 96.0% | 50.0% | 80.0% | 83.3% | 0.25 | 0.0125 | 1.5 |"
    assert lines[4] == "| GRPO alone | 0 | - | 50.0% | 80.0% | - | - | - | 1.5 |"

    page = results.page(runs)
    assert "commit 0123456789ab\nwith torch 2.13.0" in page
    assert "python launch.py seed=0 eval.every=10 opd=off" in page

    accuracy = demo_runs.plot(runs, results.VARIANTS).axes[0]
    first = next(line for line in accuracy.get_lines() if line.get_label() == "GRPO with distillation")
    assert np.asarray(first.get_xydata()).tolist() == [[0, 0.5], [2, pytest.approx(0.85)]]


def test_the_commands_of_the_control_runs_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    from opd_trainer.cli.entry import main

    for variant in [*results.VARIANTS, *estimators.variants()]:
        assert main(ROOT / "conf", [*demo_runs.overrides(variant, 0), "--cfg", "job"]) == 0, variant.name
    assert "weight_decay: 0" in capsys.readouterr().out
