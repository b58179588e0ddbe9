"""Where prompts come from."""

from dataclasses import dataclass


@dataclass(slots=True)
class DataConfig:
    """A dataset of prompts."""

    path: str | None = None
    """JSONL file."""
    prompt_key: str = "prompt"
    """Column with the prompt: text, or a list of chat messages."""
    label_key: str = "label"
    """Column with the reference answer."""
    shuffle_seed: int = 0
    """Seed of the epoch shuffles."""
