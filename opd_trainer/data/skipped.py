"""Rows that were left out: told in short, and recorded one by one."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SHOWN_ROWS = 5


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that was left out.

    Attributes:
        place: file and line.
        reason: why.
    """

    place: str
    reason: str


def listed(skipped: Sequence[Skipped]) -> str:
    """The first few of the rows left out."""
    shown = "; ".join(f"{row.place}: {row.reason}" for row in skipped[:SHOWN_ROWS])
    return shown + (f"; and {len(skipped) - SHOWN_ROWS} more" if len(skipped) > SHOWN_ROWS else "")


def write_skipped(path: Path, skipped: Sequence[tuple[str, Skipped]]) -> None:
    """One JSON object per row left out, with its dataset; no file where there is none."""
    if skipped:
        rows = ({"dataset": name, **dataclasses.asdict(row)} for name, row in skipped)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
