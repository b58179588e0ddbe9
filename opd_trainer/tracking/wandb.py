"""The wandb sink; the only module that imports wandb."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import wandb

from opd_trainer.errors import PreflightError
from opd_trainer.tracking.config import TrackingConfig, WandbMode
from opd_trainer.tracking.sink import StepRecord
from opd_trainer.tracking.summary import Evaluated, Results, Summary

_MODES: dict[WandbMode, Literal["disabled", "offline", "online"]] = {
    WandbMode.disabled: "disabled",
    WandbMode.offline: "offline",
    WandbMode.online: "online",
}

RUN_ID = "wandb_run_id"
"""File in the run directory with wandb's id of the run, so that a resume continues the same curves."""


class WandbSink:
    """Metrics, held-out results, summary and curves in wandb, offline or online."""

    def __init__(self, config: TrackingConfig, directory: Path, run_config: Mapping[str, Any]) -> None:
        id_file = directory / RUN_ID
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        self._curves = directory / "curves.png"
        self._finished = False
        try:
            self._run = wandb.init(
                mode=_MODES[config.wandb],
                project=config.wandb_project,
                group=config.wandb_group,
                name=config.wandb_name or directory.name,
                id=id_file.read_text(encoding="utf-8"),
                resume="allow",
                dir=directory,
                config=dict(run_config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise PreflightError(
                f"tracking.wandb={config.wandb.value}: wandb did not start: {error}. "
                "Log in (wandb login, or WANDB_API_KEY), or set tracking.wandb=offline"
            ) from error
        # Our own axis: wandb's refuses to go back, which a resume from a checkpoint does.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def truncate_after(self, step: int) -> None:
        """Nothing: wandb keeps what it has; the later value at a step is the one of the run that stands."""

    def evaluated(self, who: Evaluated, results: Results) -> None:
        """Held-out results go to wandb's summary."""
        for dataset, score in results.evaluation[who].items():
            self._run.summary[f"evaluation/{who.value}/{dataset}"] = score

    def write(self, record: StepRecord) -> None:
        """Every metric of the step."""
        self._run.log({"step": record.step, **record.values})

    def finish(self, summary: Summary) -> None:
        """The summary and the picture."""
        self._finished = True
        self._run.summary.update(summary.to_json())
        if self._curves.exists():
            self._run.log({"curves": wandb.Image(str(self._curves))})

    def close(self) -> None:
        """Ends wandb's run, as failed unless it finished, and wandb's background process with it."""
        self._run.finish(exit_code=0 if self._finished else 1)
        # The run's file is complete only when that process is gone.
        wandb.teardown()
