import json
from pathlib import Path
from typing import Any

from opd_trainer.run_record import RunStatus
from opd_trainer.sweep.record import SWEEP_FILE, Sweep, Trial, joined, trial_name


def trial(seed: int, coefficient: float = 0.5, overrides: tuple[str, ...] = ()) -> Trial:
    values = {"opd.kl_coef": coefficient, "seed": seed}
    return Trial(trial_name(values), values, overrides, f"hash-{coefficient}-{seed}")


def leave(directory: Path, status: RunStatus) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "run.json").write_text(json.dumps({"config_hash": "x", "resume_hash": "x", "status": status}))


def test_names_need_no_quotes() -> None:
    assert trial_name({"opd.kl_coef": 0.25, "seed": 1}) == "kl_coef-0.25_seed-1"
    assert trial_name({"model.load": "/models/Qwen3 8B", "opd": "off"}) == "load-models-Qwen3-8B_opd-off"
    assert trial_name({"data.path": "a=b'ü'"}) == "path-a-b"
    assert trial_name({"megatron.optimizer.lr": 1e30}) == "lr-1e30"
    assert trial_name({"megatron.optimizer.lr": 1e-30}) == "lr-1e-30"
    assert len(trial_name({"data.path": "x" * 500})) == 80


def test_a_setting_is_what_trials_share_besides_the_seed() -> None:
    assert trial(0).setting == trial(1).setting
    assert trial(0).setting != trial(0, 1.0).setting
    assert trial(0).label == "opd.kl_coef=0.5 seed=0"


def test_it_is_read_back(tmp_path: Path) -> None:
    sweep = joined(tmp_path / "deep" / "sweep", [trial(0, overrides=("seed=0", "opd.kl_coef=0.5")), trial(1)])
    sweep.write()
    assert Sweep.read(tmp_path / "deep" / "sweep") == sweep
    assert Sweep.read(tmp_path) is None
    assert (tmp_path / "deep" / "sweep" / SWEEP_FILE).is_file()


def test_only_finished_trials_are_not_launched_again(tmp_path: Path) -> None:
    leave(tmp_path / "kl_coef-0.5_seed-0", RunStatus.finished)
    leave(tmp_path / "kl_coef-0.5_seed-1", RunStatus.failed)
    leave(tmp_path / "kl_coef-0.5_seed-2", RunStatus.running)
    sweep = joined(tmp_path, [trial(seed) for seed in range(4)])
    assert sweep.launch == tuple(f"kl_coef-0.5_seed-{seed}" for seed in (1, 2, 3))
    assert [sweep.status(one) for one in sweep.trials] == [
        RunStatus.finished,
        RunStatus.failed,
        RunStatus.running,
        None,
    ]


def test_a_sweep_can_grow(tmp_path: Path) -> None:
    joined(tmp_path, [trial(0), trial(1)]).write()
    leave(tmp_path / "kl_coef-0.5_seed-0", RunStatus.finished)
    grown = joined(tmp_path, [trial(1), trial(0), trial(2)])
    assert [one.values["seed"] for one in grown.trials] == [0, 1, 2]
    assert grown.launch == ("kl_coef-0.5_seed-1", "kl_coef-0.5_seed-2")
    # Trials of an earlier command stay in the table, and are not started by this one.
    narrowed = joined(tmp_path, [trial(2)])
    assert len(narrowed.trials) == 3
    assert narrowed.launch == ("kl_coef-0.5_seed-2",)


def test_two_trials_of_the_same_name_have_two_directories(tmp_path: Path) -> None:
    def named(load: Any) -> Trial:
        return Trial("load-a-b", {"model.load": load}, (), f"hash{load}")

    first, second = joined(tmp_path, [named("a/b"), named("a b")]).trials
    assert first.directory == "load-a-b"
    assert second.directory == "load-a-b-hasha "[:15]
    assert first.directory != second.directory
