"""Where prompts come from."""

from dataclasses import dataclass, field
from enum import StrEnum, auto
from typing import Any


class OnBadRow(StrEnum):
    """What happens to a row that cannot be used."""

    error = auto()
    """The run stops and names file, line and reason."""
    skip = auto()
    """The row is left out, counted and listed."""


class DataFormat(StrEnum):
    """File formats."""

    jsonl = auto()
    """One JSON object per line."""
    json = auto()
    """One JSON list of objects."""
    parquet = auto()
    """Apache Parquet."""
    csv = auto()
    """Comma-separated, with a header line."""
    huggingface = auto()
    """A folder written by `datasets.Dataset.save_to_disk`."""
    auto = auto()
    """By the ending of the path; a folder is a Hugging Face dataset."""


@dataclass(slots=True)
class DataConfig:
    """A dataset of prompts.

    A key may be dotted (`reward_model.ground_truth`), and may list alternatives (`problem|prompt`): the first that a
    row has is taken.
    """

    path: str | None = None
    """File, or folder of a Hugging Face dataset on disk."""
    format: DataFormat = DataFormat.auto
    """auto, jsonl, json, parquet, csv or huggingface."""
    split: str = "train"
    """Split of a Hugging Face dataset that has several."""
    prompt_key: str = "prompt"
    """Column with the prompt: text, or a list of chat messages."""
    label_key: str | None = "label"
    """Column with the reference answer; null where there is none."""
    metadata_key: str | None = None
    """Column with an object whose entries join the other columns as metadata of the prompt; null for none."""
    teacher: str = "default"
    """Name of the teacher that scores the responses."""
    teacher_key: str | None = None
    """Column with the name of the teacher, row by row; null takes `teacher`."""
    offset: int = 0
    """Rows left out at the start of the file."""
    n_rows: int | None = None
    """Rows used after `offset`; null takes all that are left."""
    shuffle_seed: int = 0
    """Seed of the epoch shuffles."""
    weight: float = 1.0
    """Share of this dataset in a mixture, relative to the others' weights."""
    prompt_template: str | None = None
    """Wraps a text prompt; `{prompt}` stands for it. Chat messages are taken as they are."""
    system_prompt: str | None = None
    """System message put before a conversation that has none."""
    apply_chat_template: bool = False
    """Make a text prompt the user's message of a chat; lists of messages always use the chat template."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the chat template, e.g. `{enable_thinking: false}`."""
    on_bad_row: OnBadRow = OnBadRow.error
    """error or skip: what to do with a malformed row."""
    on_long_prompt: OnBadRow = OnBadRow.skip
    """error or skip: what to do with a prompt longer than `rollout.max_prompt_tokens`."""


@dataclass(slots=True)
class MixtureData(DataConfig):
    """Several datasets, drawn in proportion to their weights; `path` and the keys belong to each of `datasets`."""

    datasets: dict[str, DataConfig] = field(default_factory=dict)
    """The datasets by name."""
