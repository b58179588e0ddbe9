import subprocess
import sys
from pathlib import Path

import pytest

from opd_trainer.errors import PreflightError
from opd_trainer.tracking.build import build_tracker
from opd_trainer.tracking.config import TrackingConfig, WandbMode
from opd_trainer.tracking.summary import Evaluated
from opd_trainer.tracking.tracker import Tracker


def build(config: TrackingConfig, directory: Path) -> Tracker:
    return build_tracker(
        config, directory, total_steps=2, config_hash="c0ffee", run_config={"opd": {"kl_coef": 1.0}}, title="demo"
    )


def short_run(config: TrackingConfig, directory: Path) -> None:
    with build(config, directory) as tracker:
        tracker.truncate_after(-1)
        tracker.evaluated(Evaluated.before, {"heldout": 0.5}, reverse_kl=0.3)
        for step in range(2):
            with tracker.step(step) as log:
                log.add({"opd/reverse_kl": 0.3 - step / 10})
        tracker.finish()


def test_a_run_directory_holds_the_documented_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short_run(TrackingConfig(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "summary.json", "curves.png"}
    assert capsys.readouterr().out.rstrip().endswith(f"curves: {tmp_path / 'curves.png'}")


def test_a_silent_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short_run(TrackingConfig(console=False), tmp_path)
    assert capsys.readouterr().out == ""


def test_wandb_is_imported_only_when_it_is_asked_for() -> None:
    code = "import opd_trainer.tracking.build, sys; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_wandb_offline_keeps_metrics_results_and_the_curves(tmp_path: Path) -> None:
    config = TrackingConfig(console=False, wandb=WandbMode.offline, wandb_group="tests")
    short_run(config, tmp_path)
    first_id = (tmp_path / "wandb_run_id").read_text()
    (log,) = (tmp_path / "wandb").glob(f"offline-run-*-{first_id}/run-{first_id}.wandb")
    content = log.read_bytes()
    for expected in (b"opd/reverse_kl", b"evaluation/before/heldout", b"kl_coef", b"tests", b"curves"):
        assert expected in content
    assert list(log.parent.glob("files/media/images/curves*.png"))

    short_run(config, tmp_path)  # a resume in the same directory continues the same wandb run
    assert (tmp_path / "wandb_run_id").read_text() == first_id


def test_wandb_online_without_an_account_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "not a key")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(PreflightError, match=r"tracking\.wandb=online.*tracking\.wandb=offline"):
        build(TrackingConfig(console=False, wandb=WandbMode.online), tmp_path)
