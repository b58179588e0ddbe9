"""Rows of a file, each with the place it came from; a row that cannot be read is a value, not an exception."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from opd_trainer.data.config import DataConfig, DataFormat
from opd_trainer.errors import DataError

ENDINGS = {
    ".jsonl": DataFormat.jsonl,
    ".ndjson": DataFormat.jsonl,
    ".json": DataFormat.json,
    ".parquet": DataFormat.parquet,
    ".csv": DataFormat.csv,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file.

    Attributes:
        number: position in the file, from 0, whatever part of the file is used.
        place: where a person finds it, e.g. ``train.jsonl, line 12``.
        columns: the row; None when it could not be read.
        reason: why it could not be read.
    """

    number: int
    place: str
    columns: dict[str, Any] | None
    reason: str = ""


def read_rows(config: DataConfig, name: str, at: str = "data") -> Iterator[Row]:
    """Rows ``offset`` to ``offset + n_rows`` of ``config.path``, in the order of the file.

    Args:
        config: which file, and which part of it.
        name: what the dataset is called in messages.
        at: its dotted key, for messages.

    Raises:
        DataError: the file is missing, of unknown format, or unreadable as a whole.
    """
    if config.path is None:
        raise DataError(f"{name}: no path is set, so there are no prompts. Set {at}.path")
    path = Path(config.path).expanduser()
    if not path.exists():
        raise DataError(f"{name}: {path} does not exist. Set {at}.path to a file that does")
    stop = None if config.n_rows is None else config.offset + config.n_rows
    chosen = format_of(path, config.format, at)
    try:
        yield from islice(READERS[chosen](path, config.split, at), config.offset, stop)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"{path}: it cannot be read as {chosen} ({reason}). Set {at}.path and {at}.format to what is there"
        ) from error


def format_of(path: Path, chosen: DataFormat, at: str) -> DataFormat:
    """The format that was chosen, or the one that the path's ending tells."""
    if chosen is not DataFormat.auto:
        return chosen
    if path.is_dir():
        return DataFormat.huggingface
    if path.suffix not in ENDINGS:
        raise DataError(
            f"{path}: the ending {path.suffix!r} names no known format. Set {at}.format={'|'.join(DataFormat)}"
        )
    return ENDINGS[path.suffix]


def checked(number: int, place: str, value: Any) -> Row:
    """A row if `value` is an object."""
    if isinstance(value, dict):
        return Row(number, place, value)
    return Row(number, place, None, f"it is a {type(value).__name__}, not an object")


def read_jsonl(path: Path, _split: str, at: str) -> Iterator[Row]:
    """One object per line; blank lines are no rows."""
    number = 0
    with path.open("rb") as file:
        for line_number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {line_number}"
            try:
                yield checked(number, place, json.loads(line.decode("utf-8")))
            except ValueError as error:
                yield Row(number, place, None, f"it is not JSON ({error})")
            number += 1


def read_json(path: Path, _split: str, at: str) -> Iterator[Row]:
    """One list of objects."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: it is not JSON ({error}). For one object per line set {at}.format=jsonl") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: it holds a {type(rows).__name__}, not a list of rows. Write a list of objects")
    for number, value in enumerate(rows):
        yield checked(number, f"{path}, item {number + 1}", value)


def read_csv(path: Path, _split: str, at: str) -> Iterator[Row]:
    """A header line and one line per row."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        number = 0
        while True:
            try:
                columns = next(reader, None)
            except (csv.Error, UnicodeDecodeError) as error:
                raise DataError(
                    f"{path}, line {reader.line_num + 1}: it is not CSV ({error}). Repair the file"
                ) from error
            if columns is None:
                return
            place = f"{path}, line {reader.line_num}"
            if None in columns or None in columns.values():
                expected = len(reader.fieldnames or ())
                yield Row(number, place, None, f"it does not have the {expected} columns of the header")
            else:
                yield Row(number, place, columns)
            number += 1


def read_parquet(path: Path, _split: str, at: str) -> Iterator[Row]:
    """Record batches of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: it is not Parquet ({error}). Set {at}.path to another file") from error
    number = 0
    with file:
        for batch in file.iter_batches(batch_size=1024):
            for columns in batch.to_pylist():
                yield Row(number, f"{path}, row {number + 1}", columns)
                number += 1


def read_huggingface(path: Path, split: str, at: str) -> Iterator[Row]:
    """A folder written by `save_to_disk`: one dataset, or a dictionary of splits."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: it is not the folder of a Hugging Face dataset on disk. "
            f"Set {at}.path to a file and {at}.format=auto, or write the folder with Dataset.save_to_disk"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{path}: it has no split {split!r}. Set {at}.split={'|'.join(map(str, loaded))}")
        loaded = loaded[split]
    for number, columns in enumerate(loaded):
        yield checked(number, f"{path}, row {number + 1}", columns)


READERS = {
    DataFormat.jsonl: read_jsonl,
    DataFormat.json: read_json,
    DataFormat.csv: read_csv,
    DataFormat.parquet: read_parquet,
    DataFormat.huggingface: read_huggingface,
}
