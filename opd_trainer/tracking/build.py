"""From the configuration to a tracker."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd_trainer.tracking.config import TrackingConfig, WandbMode
from opd_trainer.tracking.console import ConsoleSink
from opd_trainer.tracking.curves import CurvesSink
from opd_trainer.tracking.files import RunFiles
from opd_trainer.tracking.provenance import git_state, package_versions
from opd_trainer.tracking.sink import Sink
from opd_trainer.tracking.tracker import Tracker


def build_tracker(
    config: TrackingConfig,
    directory: Path,
    *,
    total_steps: int,
    config_hash: str,
    run_config: Mapping[str, Any],
    title: str,
) -> Tracker:
    """A tracker that writes into `directory`, which exists.

    Args:
        config: which sinks, and how often.
        directory: of the run.
        total_steps: for the progress bar.
        config_hash: fingerprint of the configuration, for the summary.
        run_config: the resolved configuration as plain values, for wandb.
        title: of the progress bar and of the curves, a few words.
    """
    # The curves are drawn from the files, and named on the console and sent to wandb once they are drawn.
    curves = CurvesSink(directory, config.plot_every, title)
    sinks: list[Sink] = [RunFiles(directory, config.samples_per_step), curves]
    if config.wandb is not WandbMode.disabled:
        from opd_trainer.tracking.wandb import WandbSink

        sinks.append(WandbSink(config, directory, run_config))
    if config.console:
        sinks.append(ConsoleSink(total_steps, every=config.console_every, curves=curves.path, title=title))
    return Tracker(sinks, config_hash=config_hash, git=git_state(), versions=package_versions())
