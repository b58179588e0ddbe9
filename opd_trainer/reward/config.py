"""Task rewards. Placeholder base; options are dataclasses of their own module."""

from dataclasses import dataclass


@dataclass(slots=True)
class RewardConfig:
    """What every reward knows."""

    scale: float = 1.0
    """The reward is scale * value + offset."""
    offset: float = 0.0
    """See `scale`."""
    timeout_s: float = 10.0
    """Limit on scoring one sample, seconds; a sample that exceeds it is dropped and counted."""
