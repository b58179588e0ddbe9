"""Where metrics go besides the run directory."""

from dataclasses import dataclass
from enum import StrEnum, auto


class WandbMode(StrEnum):
    """How wandb runs."""

    disabled = auto()
    offline = auto()
    online = auto()


@dataclass(slots=True)
class TrackingConfig:
    """Console, files and wandb."""

    console: bool = True
    """Show progress and a line per step."""
    console_every: int | None = None
    """Steps between two lines on the console; null gives a run about a hundred. Evaluations always show."""
    samples_per_step: int = 4
    """Samples of each step written to samples.jsonl."""
    plot_every: int = 50
    """Steps between two drawings of curves.png; it is drawn at the end in any case, and only then with 0."""
    wandb: WandbMode = WandbMode.disabled
    """disabled, offline (no account needed) or online."""
    wandb_project: str = "opd_trainer"
    """wandb project."""
    wandb_group: str | None = None
    """wandb group."""
    wandb_name: str | None = None
    """wandb run name; null takes the run directory's."""
