"""Task rewards: what each option can be told. The reward of a sample is scale * value + offset."""

from dataclasses import dataclass, field
from enum import StrEnum, auto


class Per(StrEnum):
    """What a custom reward is called with."""

    sample = auto()
    """One sample; it returns a number or a dictionary of parts."""
    group = auto()
    """The list of all samples of one prompt; it returns a list with one number or dictionary for each."""


@dataclass(slots=True)
class RewardConfig:
    """What every reward knows."""

    scale: float = 1.0
    """The reward is scale * value + offset."""
    offset: float = 0.0
    """See `scale`."""
    timeout_s: float = 10.0
    """Limit on scoring one sample, seconds; a sample that exceeds it is dropped and counted."""


@dataclass(slots=True)
class NoReward(RewardConfig):
    """0 for every sample: distillation alone, for prompts without labels. Evaluation grades nothing then."""


@dataclass(slots=True)
class ExactReward(RewardConfig):
    """1 when what follows the last `mark` equals the label, character by character, else 0."""

    mark: str = "####"
    """What announces the answer."""


@dataclass(slots=True)
class Gsm8kReward(RewardConfig):
    """1 when the number after the last `####` equals the label's, else 0."""


@dataclass(slots=True)
class MathReward(RewardConfig):
    r"""1 when the answer in the last \boxed{}, `Answer:` or `####` means the same as the label, else 0."""

    num_workers: int = 1
    """Processes that compare expressions; one hostile expression costs its own process only."""


@dataclass(slots=True)
class FormatReward(RewardConfig):
    """1 when the whole response matches `pattern`, else 0."""

    pattern: str = r"<think>.*</think>.*"
    """Regular expression; `.` matches line breaks too."""
    num_workers: int = 1
    """Processes that match: a pattern that backtracks without end costs its own process only."""


@dataclass(slots=True)
class LengthReward(RewardConfig):
    """0 up to `free_tokens` response tokens, then falling linearly to -1 at `max_tokens` and beyond.

    The soft overlong punishment of DAPO (arXiv:2503.14476, equation 13).
    """

    free_tokens: int = 768
    """Longest response without a penalty, tokens."""
    max_tokens: int = 1024
    """Shortest response with the full penalty, tokens."""


@dataclass(slots=True)
class CompositeReward(RewardConfig):
    """The sum of its parts; a part's own `scale` is its weight."""

    parts: dict[str, RewardConfig] = field(default_factory=dict)
    """The parts by name: `+reward@reward.parts.correct=math reward.parts.correct.scale=2`."""


@dataclass(slots=True)
class RemoteReward(RewardConfig):
    """A number that an HTTP server answers."""

    url: str = ""
    """Receives {"prompt", "response", "label", "metadata"} by POST; answers a number or an object with "reward"."""
    retries: int = 3
    """Attempts after the first when the server cannot be reached, times out or answers 429 or 5xx; each has
    `timeout_s`."""
    max_connections: int = 64
    """Requests in flight at once."""


@dataclass(slots=True)
class CustomReward(RewardConfig):
    """A function of yours."""

    path: str = ""
    """package.module:function, sync or async; it gets a Sample (or a list of them) and returns a number or parts."""
    per: Per = Per.sample
    """sample or group."""
    max_threads: int = 16
    """Calls of a sync function at once."""
