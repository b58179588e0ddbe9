import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import demo_runs, divergences, estimators, machine, pages, results, sglang_demo
from opd_trainer.cli.composition import Composer
from tests.commands import planned

ROOT = Path(__file__).parents[2]
ORIGIN = {
    "command": "python launch.py seed=0",
    "code": {"commit": "0123456789abcdef", "changed": False},
    "start": "2026-11-27T21:00:00+00:00",
    "process_s": 100.0,
    "machine": {
        "processor": "Abacus",
        "cores": 2,
        "memory_gib": 15.5,
        "system": "Linux x86_64",
        "nice": 0,
        "load_average": [0.5, 2.5],
    },
}


def run_directory(directory: Path, *, after: float, teacher: float | None, kl: tuple[float, float] | None) -> Path:
    directory.mkdir(parents=True)
    summary = {
        "evaluation": {
            "before": {"heldout": 0.5},
            "after": {"heldout": after},
            "teacher": {} if teacher is None else {"heldout": teacher},
        },
        "reverse_kl": {"first": kl[0] if kl else None, "last": kl[1] if kl else None},
        "steps": 2,
        "wall_s": {"total": 90.0},
        "config_hash": "fedcba9876543210",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "megatron-core": "0.16.1", "transformers": "5.23.0"},
    }
    (directory / "origin.json").write_text(json.dumps(ORIGIN))
    (directory / "summary.json").write_text(json.dumps(summary))
    rows = [
        {"step": step, "rollout/reward": 0.5, "opd/reverse_kl": kl[step] if kl else None, "train/lr": 1.0}
        for step in range(2)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_table_page_and_plot(tmp_path: Path) -> None:
    runs = []
    for variant, seed in results.PAGE.planned:
        alone = variant.name.startswith("grpo")
        directory = run_directory(
            tmp_path / f"{variant.name}{seed}",
            after=(0.8, 0.9, 0.85)[seed],
            teacher=None if alone else 0.96,
            kl=None if alone else (0.25, 0.0125),
        )
        runs.append(demo_runs.load(directory, variant, seed))

    lines = pages.table(runs).splitlines()
    assert len(lines) == 2 + 15
    tail = "| 1.5 | `fedcba9876543210` |"
    assert lines[2] == f"| GRPO with distillation | 0 | 96.0% | 50.0% | 80.0% | 83.3% | 0.25 | 0.0125 {tail}"
    assert lines[5] == f"| GRPO alone | 0 | - | 50.0% | 80.0% | - | - | - {tail}"

    page = results.PAGE.text(runs)
    assert "* Code: commit 0123456789ab\n" in page
    assert "* Machine: 2 cores of Abacus, 15.5 GiB, Linux x86_64\n* Load average: 0.5 to 2.5 when" in page
    assert "python launch.py -m seed=0,1,2 eval.every=10 opd=off\n" in page

    accuracy = results.PAGE.figure(runs).axes[0]
    first = next(line for line in accuracy.get_lines() if line.get_label() == "GRPO with distillation")
    assert np.asarray(first.get_xydata()).tolist() == [[0, 0.5], [2, pytest.approx(0.85)]]


def test_runs_of_different_code_are_told() -> None:
    changed = {**ORIGIN, "code": {"commit": "f" * 40, "changed": True}, "start": "2026-11-28T01:00:00+00:00"}
    versions = {"python": "3.11.7", "torch": "2.13.0", "megatron-core": "0.16.1", "transformers": "5.23.0"}
    told = pages.made_at([ORIGIN, changed, {**ORIGIN, "code": None}], versions)
    assert "* Code: commit 0123456789ab, commit ffffffffffff with changes, an unknown commit\n" in told
    assert "* Date: 2026-11-27, 2026-11-28\n" in told


def test_what_is_kept_of_a_run_is_a_run_directory(tmp_path: Path) -> None:
    variant = results.VARIANTS[0]
    source = run_directory(tmp_path / "run", after=0.8, teacher=0.96, kl=(0.25, 0.0125))
    demo_runs.keep(source, tmp_path / "raw" / "run")
    before, after = (demo_runs.load(folder, variant, 0) for folder in (source, tmp_path / "raw" / "run"))
    assert (after.origin, after.summary) == (before.origin, before.summary)
    assert after.rows == [
        {"step": step, "rollout/reward": 0.5, "opd/reverse_kl": kl} for step, kl in enumerate((0.25, 0.0125))
    ]


def head() -> str:
    code = demo_runs.code_state()
    assert code is not None
    return code["commit"]


def test_only_finished_runs_of_this_code_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = tmp_path / "origin.json"
    assert not demo_runs.is_current(origin)
    for code, current in (
        ({"commit": head(), "changed": False}, True),
        ({"commit": head(), "changed": True}, False),
        ({"commit": "0" * 40, "changed": False}, False),
        (None, False),
    ):
        origin.write_text(json.dumps({"code": code}))
        monkeypatch.setattr(machine, "CODE", ("LICENSE",))  # whatever is being worked on here
        assert demo_runs.is_current(origin) is current, code


def test_a_run_of_other_code_is_set_aside_and_a_broken_off_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CODE", ("LICENSE",))
    directory = tmp_path / "runs" / "opd-0"
    demo_runs.set_aside_if_stale(directory)
    directory.mkdir()
    demo_runs.set_aside_if_stale(directory)
    assert directory.exists()
    (tmp_path / "runs" / "opd-0.begun").write_text(json.dumps({"commit": "0" * 40, "changed": False}))
    demo_runs.set_aside_if_stale(directory)
    assert not directory.exists()
    assert len(list(directory.parent.glob("opd-0-until-*"))) == 1


def test_a_run_is_launched_with_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_TEST", "2")
    directory = tmp_path / "runs" / "tiny"
    tiny = ["seed=0", "experiment=null", "task=doctor", "steps=$OF_THE_TEST"]
    with pytest.raises(SystemExit, match=r"tiny\.log"):
        demo_runs.launch(["seed=0", "no.such.key=1"], directory)
    directory.mkdir()
    demo_runs.launch(tiny, directory, "name=other")
    origin = json.loads((directory / "origin.json").read_text())
    assert origin["command"] == "python launch.py seed=0 experiment=null task=doctor steps=$OF_THE_TEST"
    assert origin["code"]["commit"] == head()
    assert origin["machine"]["cores"] >= 1
    assert origin["process_s"] > 0


def test_the_commands_of_the_pages_are_valid(compose: Composer) -> None:
    decays = set[float]()
    for page in (results.PAGE, estimators.PAGE, divergences.PAGE, sglang_demo.PAGE):
        for variant in dict.fromkeys(variant for variant, _ in page.planned):
            given = [override.replace("$", "") for override in demo_runs.overrides(variant, 0)]
            decays.update(config.megatron.optimizer.weight_decay for config in planned(compose, given).configs)
    assert 0.0 in decays
